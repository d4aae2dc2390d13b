"""Random numbers are a function of global coordinates, and look random."""

import pytest
import torch

from megatron_lite.kernels.random import feature_bits, keep_mask, key, normal, token_numbers


def test_a_slice_gets_the_numbers_of_the_whole() -> None:
    whole = normal(torch.empty(50, 33), key(1, "a"), std=0.5, offset=(0, 0), columns=33)
    part = normal(torch.empty(7, 10), key(1, "a"), std=0.5, offset=(12, 20), columns=33)
    assert torch.equal(part, whole[12:19, 20:30])


def test_moments_are_those_of_the_normal_distribution() -> None:
    x = normal(torch.empty(1000, 300), key(7, "w"), std=2.0, offset=(0, 0), columns=300) / 2.0
    assert abs(x.mean()) < 5 / 300_000**0.5
    assert abs(x.var() - 1) < 5 * (2 / 300_000) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / 300_000) ** 0.5
    rows, columns = (x[1:] * x[:-1]).mean(), (x[:, 1:] * x[:, :-1]).mean()
    assert max(abs(rows), abs(columns)) < 5 / 300_000**0.5


def test_names_and_seeds_give_other_numbers() -> None:
    def draw(*parts):
        return normal(torch.empty(100), key(*parts), std=1.0, offset=(0,), columns=100)

    a = draw(1, "a")
    for other in (draw(1, "b"), draw(2, "a")):
        assert abs(torch.corrcoef(torch.stack((a, other)))[0, 1]) < 0.5
        assert not torch.equal(a, other)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_masks_keep_the_right_share_without_pattern(rate) -> None:
    tokens = token_numbers(torch.arange(8), torch.arange(256))
    keep = keep_mask(
        torch.tensor(key(1, 2, 3)), tokens, feature_bits(torch.arange(128)), rate
    ).double()
    n, variance = keep.numel(), rate * (1 - rate)
    assert abs(keep.mean() - (1 - rate)) < 5 * (variance / n) ** 0.5
    x = keep - (1 - rate)
    for dim in range(3):
        a, b = x.narrow(dim, 0, x.shape[dim] - 1), x.narrow(dim, 1, x.shape[dim] - 1)
        assert abs((a * b).mean()) < 5 * variance / n**0.5, f"neighbours along dim {dim}"
    for dim in range(3):  # no row, sample or feature that is always dropped
        others = [d for d in range(3) if d != dim]
        spread = x.mean(others).std() / (variance / (n / x.shape[dim])) ** 0.5
        assert 0.7 < spread < 1.3, f"share kept varies along dim {dim}"


def test_a_mask_slice_is_the_slice_of_the_mask() -> None:
    tokens = token_numbers(torch.arange(4, 10), torch.arange(32))
    drawn = torch.tensor(key(5))
    whole = keep_mask(drawn, tokens, feature_bits(torch.arange(64)), 0.3)
    part = keep_mask(drawn, tokens[8:16, 2:4], feature_bits(torch.arange(16, 32)), 0.3)
    assert torch.equal(part, whole[8:16, 2:4, 16:32])
