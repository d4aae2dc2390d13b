"""--step-batch-size-schedule is read exactly."""

from __future__ import annotations

import pytest

from megatron_lite.config.batch_schedule import BatchStep, parse_schedule
from megatron_lite.config.errors import ConfigError


@pytest.mark.parametrize("comma", [" ", ",", ", "])
def test_the_175b_schedule(comma: str) -> None:
    text = "0:16 2.4B:320 4.8B:624 7.2B:928 9.6B:1232 12B:1536".replace(" ", comma)
    tokens = [0, 2_400_000_000, 4_800_000_000, 7_200_000_000, 9_600_000_000, 12_000_000_000]
    sizes = [16, 320, 624, 928, 1232, 1536]
    assert parse_schedule(text) == tuple(map(BatchStep, tokens, sizes))


def test_units() -> None:
    steps = parse_schedule("0:1 1.5k:2 2M:3 1T:4")
    assert [step.tokens for step in steps] == [0, 1500, 2_000_000, 10**12]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "'' is not tokens:size"),
        ("16", "'16' is not tokens:size"),
        ("0:16 2.4B", "'2.4B' is not tokens:size"),
        ("0:16 2.4X:3", "'2.4X:3' is not tokens:size"),
        ("1:16", "the first entry must start at 0 tokens"),
        ("0:16 5:32 5:64", "thresholds must ascend, but 5 follows 5"),
        ("0:16 1.0005K:3", "'1.0005K:3' is not a whole number of tokens"),
        ("0:0", "batch size 0 must be between 1"),
        ("0:16 nan:3", "'nan:3' is not tokens:size"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_schedule(text)
    assert str(caught.value).startswith("--step-batch-size-schedule")
    assert message in str(caught.value)
