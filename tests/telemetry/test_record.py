"""Records survive metrics.jsonl unchanged, whatever their floats are."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lite.config.errors import DataError
from megatron_lite.telemetry.record import (
    from_json,
    read_metrics,
    record_json,
)
from tests.telemetry.records import EVALUATION, SAVE, STEP, TIMING


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")


MEASURED = replace(STEP, loss_name="loss", metrics={"accuracy": 0.25, "hits": math.inf})


OTHER = replace(EVALUATION, loss_name="loss")


@pytest.mark.parametrize("record", [STEP, MEASURED, EVALUATION, OTHER, SAVE, TIMING])
def test_json_round_trip(record):
    assert from_json(record_json(record)) == record


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity_is_valid_json_and_comes_back(value):
    line = record_json(replace(STEP, loss=value))
    json.loads(line, parse_constant=refuse)
    assert from_json(line) == replace(STEP, loss=value)


def test_nan_is_valid_json_and_comes_back():
    line = record_json(replace(STEP, loss=math.nan, grad_norm=math.nan))
    assert json.loads(line, parse_constant=refuse)["loss"] == "NaN"
    back = from_json(line)
    assert math.isnan(back.loss) and math.isnan(back.grad_norm)


def test_a_whole_number_in_a_float_field_reads_as_float():
    line = record_json(STEP).replace('"loss_scale": 65536.0', '"loss_scale": 65536')
    assert isinstance(from_json(line).loss_scale, float)


def test_perplexity_is_capped_and_keeps_nan():
    assert replace(EVALUATION, loss=2.0).perplexity == math.exp(2.0)
    assert replace(EVALUATION, loss=50.0).perplexity == math.exp(20.0)
    assert math.isnan(replace(EVALUATION, loss=math.nan).perplexity)


def test_reader_leaves_out_only_a_torn_last_line(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        record_json(STEP) + "\n" + record_json(EVALUATION) + "\n" + record_json(SAVE)[:20]
    )
    assert read_metrics(file) == [STEP, EVALUATION]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2"),
        ("[1]", "an object"),
        ('{"kind": "trian"}', "'trian'"),
        ('{"kind": "save", "iteration": 1}', "bytes"),
        (record_json(SAVE).replace("123", '"123"'), "int"),
        (record_json(SAVE).replace('"bytes"', '"octets"'), "octets"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, words: str):
    file = tmp_path / "metrics.jsonl"
    file.write_text(record_json(STEP) + "\n" + line + "\n")
    with pytest.raises(DataError, match="metrics.jsonl, line 2") as caught:
        read_metrics(file)
    assert words in str(caught.value)


def test_a_missing_file_is_a_data_error(tmp_path: Path):
    with pytest.raises(DataError, match="No such file"):
        read_metrics(tmp_path / "metrics.jsonl")
