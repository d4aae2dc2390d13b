"""The console lines are fixed to the byte: scripts parse them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_lite.telemetry.console import (
    duration,
    format_evaluation,
    format_line,
    format_record,
    format_save,
)
from megatron_lite.telemetry.record import EvaluationRecord, SaveRecord, from_json
from tests.telemetry.records import EVALUATION, STEP

# the field widths and separators of a published Megatron-DeepSpeed log of the 175B run
GOLDEN = (
    " iteration        5/      10 | consumed samples:         7680 |"
    " consumed tokens:     15728640 | elapsed time per iteration (ms): 344656.1 |"
    " learning rate: 2.270E-05 | global batch size:  1536 | lm loss: 1.100078E+01 |"
    " loss scale: 4294967296.0 | grad norm: 1.235 | actual seqlen:  2048 |"
    " number of skipped iterations:   2 | number of nan iterations:   0 |"
    " samples per second: 4.457 | tokens per gpu per second (tgs): 142.612 | TFLOPs: 153.38 |"
    " MFU: 49.16% |"
)


def test_training_line_is_megatron_deepspeeds_with_mfu_at_the_end():
    assert format_line(STEP) == GOLDEN
    assert format_record(STEP) == GOLDEN


def test_a_second_learning_rate_stands_behind_the_first():
    two = replace(STEP, decoupled_learning_rate=5e-4)
    first, second = " learning rate: 2.270E-05 |", " decoupled learning rate: 5.000E-04 |"
    assert format_line(two) == GOLDEN.replace(first, first + second)
    assert "| lr 2.270E-05 | decoupled lr 5.000E-04 |" in format_record(two, "short")
    assert from_json(format_record(two, "json")) == two


def test_an_objectives_metrics_stand_behind_the_loss():
    told = replace(STEP, metrics={"accuracy": 0.25, "hits": math.nan})
    loss = " lm loss: 1.100078E+01 |"
    metrics = " accuracy: 2.500000E-01 | hits: nan |"
    assert format_line(told) == GOLDEN.replace(loss, loss + metrics)
    assert "| loss 11.0008 | accuracy 0.2500 | hits nan | lr" in format_record(told, "short")
    found = replace(EVALUATION, metrics={"accuracy": 0.25})
    assert "| accuracy value: 2.500000E-01 | \n" in format_evaluation(found)
    assert "| accuracy 0.2500 | " in format_record(found, "short")


def test_only_a_language_model_has_an_lm_loss_and_a_perplexity() -> None:
    assert " | loss: 1.100078E+01 |" in format_line(replace(STEP, loss_name="loss"))
    found = replace(EVALUATION, loss_name="loss")
    assert found.perplexity is None
    assert " | loss value: 2.500000E+00 | \n" in format_evaluation(found)
    assert format_record(found, "short") == " test at iteration 5 | loss 2.5000 | 0.5 s"


def test_a_terminal_gets_a_short_line_of_the_same_numbers():
    assert format_record(STEP, "short") == (
        "  5/10 | loss 11.0008 | lr 2.270E-05 | grad norm 1.235 | scale 4294967296 | batch 1536 | "
        "344656.1 ms | 143 tokens/s/rank | MFU 49.16% | 2 skipped | ETA 28 min 43 s"
    )
    plain = replace(STEP, loss_scale=1.0, mfu=None, skipped_iterations=0, eta_seconds=0.0)
    assert format_record(replace(plain, grad_norm=None, loss=math.nan), "short") == (
        "  5/10 | loss nan | lr 2.270E-05 | batch 1536 | 344656.1 ms | 143 tokens/s/rank | "
        "153.38 TFLOPs"
    )
    final = EvaluationRecord(
        iteration=6, split="test", samples=9, loss=2.5, seconds=1.0, final=True
    )
    said = format_record(final, "short")
    assert said == " final test at iteration 6 | loss 2.5000 | PPL 12.18 | 1.0 s"


def test_json_lines_are_those_of_the_metrics():
    assert from_json(format_record(STEP, "json")) == STEP


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3600, "1 h 0 min"), (273900, "3 d 4 h"), (math.nan, "-")],
)
def test_a_duration_has_two_units(seconds: float, text: str):
    assert duration(seconds) == text


def test_unknown_peak_prints_a_dash():
    assert format_line(replace(STEP, mfu=None)) == GOLDEN.replace("MFU: 49.16%", "MFU: -")


def test_optional_fields_stand_between_grad_norm_and_seqlen():
    line = format_line(replace(STEP, num_zeros=12, params_norm=345.6789))
    assert " grad norm: 1.235 | num zeros: 12.0 | params norm: 345.679 | actual seqlen:" in line
    without = format_line(replace(STEP, grad_norm=None))
    assert without == GOLDEN.replace(" grad norm: 1.235 |", "")


def test_the_loss_is_printed_when_it_is_nan_or_infinite():
    assert " | lm loss: nan | " in format_line(replace(STEP, loss=math.nan))
    assert " | lm loss: inf | " in format_line(replace(STEP, loss=math.inf))


def test_evaluation_stands_between_dashes_one_longer_than_the_line():
    record = EvaluationRecord(
        iteration=1000, split="validation", samples=1, loss=math.log(50.0), seconds=1.5
    )
    line = (
        " validation loss at iteration 1000 | lm loss value: 3.912023E+00"
        " | lm loss PPL: 5.000000E+01 | "
    )
    dashes = "-" * (len(line) + 1)
    assert format_evaluation(record) == f"{dashes}\n{line}\n{dashes}"
    assert " at iteration 1000 on validation set | " in format_record(replace(record, final=True))
    assert " at iteration 1000 on test set | " in format_record(replace(record, split="test"))


def test_save_line():
    record = SaveRecord(iteration=100, bytes=1_500_000_000, seconds=2.0, folder="runs/a")
    golden = (
        "  successfully saved checkpoint from iteration     100 to runs/a | 1.500 GB in 2.00 s |"
    )
    assert format_save(record) == format_record(record) == golden
    small = replace(record, bytes=1_234_567)
    assert format_save(small) == golden.replace("1.500 GB", "1.235 MB")
