"""4-bit NormalFloat: the quantiles are the paper's, and packing is exact where it can be, else bounded."""

from __future__ import annotations

import warnings
from statistics import NormalDist

import numpy as np
import pytest
import torch

from megatron_lite.blueprint.figure.parts import WEIGHT_BYTES
from megatron_lite.config.sections.lora import NF4_BLOCK
from megatron_lite.kernels import nf4
from tests.support.extras import needs

PAIRS = nf4.quantile_pairs(torch.device("cpu"))
WIDEST = float(np.diff(nf4.QUANTILES).max()) / 2


def there_and_back(weight, dtype=torch.float32):
    return nf4.unpack(*nf4.pack(weight, NF4_BLOCK), PAIRS, dtype)


def test_the_quantiles_are_those_of_the_normal_distribution() -> None:
    """8 evenly spaced probabilities above one half, 7 below, a zero; over the largest (arXiv:2305.14314)."""
    quantile = NormalDist().inv_cdf
    # half way between the outermost probabilities of 2^4 and of 2^4 - 1 quantiles
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    above = [quantile(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    expected = np.array(sorted([*below, 0.0, *above])) / quantile(outermost)
    assert len(nf4.QUANTILES) == 16
    np.testing.assert_allclose(nf4.QUANTILES, expected, rtol=0, atol=1e-6)
    assert (nf4.QUANTILES[0], nf4.QUANTILES[7], nf4.QUANTILES[15]) == (-1.0, 0.0, 1.0)


@pytest.mark.parametrize("at_once", [1 << 22, 200], ids=["at once", "in parts"])
def test_every_value_becomes_the_nearest_quantile_of_its_block(monkeypatch, at_once) -> None:
    """As NumPy finds it by looking at all sixteen."""
    monkeypatch.setattr(nf4, "_AT_ONCE", at_once)
    weight = torch.randn(7, 3 * NF4_BLOCK, generator=torch.Generator().manual_seed(0))
    blocks = weight.numpy().reshape(-1, NF4_BLOCK)
    scales = np.abs(blocks).max(1, keepdims=True)
    quantiles = np.array(nf4.QUANTILES, np.float32)
    nearest = np.abs((blocks / scales)[..., None] - quantiles).argmin(-1)
    codes, absmax = nf4.pack(weight, NF4_BLOCK)
    halves = np.stack([codes.numpy() >> 4, codes.numpy() & 15], -1).reshape(nearest.shape)
    assert np.array_equal(halves, nearest)
    assert np.array_equal(absmax.numpy().reshape(-1, 1), scales)
    expected = (quantiles[nearest] * scales).reshape(weight.shape)
    back = nf4.unpack(codes, absmax, PAIRS, torch.float32)
    assert np.array_equal(back.numpy(), expected)
    half = nf4.unpack(codes, absmax, PAIRS, torch.bfloat16)
    assert torch.equal(half, torch.from_numpy(expected).bfloat16()), "rounded once"
    assert torch.equal(nf4.unpack_at_once(codes, absmax, PAIRS, torch.bfloat16), half)


def test_the_error_is_at_most_half_the_widest_gap_of_the_blocks_largest() -> None:
    weight = torch.randn(16, 4 * NF4_BLOCK, generator=torch.Generator().manual_seed(1))
    error = (there_and_back(weight) - weight).view(-1, NF4_BLOCK).abs().amax(1)
    scales = weight.view(-1, NF4_BLOCK).abs().amax(1)
    assert (error <= scales * WIDEST * 1.0001).all()
    assert 0.01 < error.mean() < WIDEST * scales.mean(), "and 4 bits are not 16"


def test_zeros_the_largest_and_what_was_packed_before_stay_as_they_are() -> None:
    weight = torch.randn(4, 2 * NF4_BLOCK, generator=torch.Generator().manual_seed(2))
    weight[0, :NF4_BLOCK] = 0.0
    weight[1, ::3] = 0.0
    once = there_and_back(weight)
    assert (once[0, :NF4_BLOCK] == 0).all() and (once[1, ::3] == 0).all()
    largest = weight.view(-1, NF4_BLOCK).abs().argmax(1, keepdim=True)
    for values in (weight, once):
        taken = values.view(-1, NF4_BLOCK).gather(1, largest)
        assert torch.equal(taken, weight.view(-1, NF4_BLOCK).gather(1, largest))
    assert torch.equal(there_and_back(once), once)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_scale(bad) -> None:
    weight = torch.ones(2, 2 * NF4_BLOCK)
    weight[1, 70] = bad
    _, absmax = nf4.pack(weight, NF4_BLOCK)
    assert absmax.isfinite().tolist() == [[True, True], [True, False]]


def test_the_plan_counts_the_bytes_that_are_kept() -> None:
    codes, absmax = nf4.pack(torch.ones(8, 2 * NF4_BLOCK), NF4_BLOCK)
    assert codes.nbytes + absmax.nbytes == WEIGHT_BYTES["nf4"] * 16 * NF4_BLOCK


@pytest.mark.oracles
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bitsandbytes_makes_the_same_bits_and_reads_ours(dtype) -> None:
    library = needs("bitsandbytes.functional")
    weight = torch.randn(24, 4 * NF4_BLOCK, generator=torch.Generator().manual_seed(3)).to(dtype)
    weight[3, :NF4_BLOCK] = 0.0
    theirs, state = library.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    codes, absmax = nf4.pack(weight, NF4_BLOCK)
    assert torch.equal(state.code, PAIRS[:16, 1])
    assert torch.equal(state.absmax.view(-1), absmax.view(-1))
    assert torch.equal(theirs.view(-1), codes.view(-1))
    ours = nf4.unpack(codes, absmax, PAIRS, dtype)
    assert torch.equal(library.dequantize_4bit(theirs, state), ours)
    assert torch.equal(nf4.unpack_by_bitsandbytes(codes, absmax, PAIRS, dtype), ours)


def test_a_matrix_that_lies_the_other_way_round_is_packed_alike_and_in_silence() -> None:
    """As one of GPT-2's folder does; torch warns of what it has to copy."""
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(3)).t()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = nf4.pack(weight, 64)
    finally:
        torch.set_warn_always(False)
    for one, other in zip(found, nf4.pack(weight.contiguous(), 64), strict=True):
        assert torch.equal(one, other)
