"""docs/FLAGS.md is what tools/flags.py writes, and every setting does something or says so."""

from __future__ import annotations

import dataclasses
import re

import pytest

from megatron_lite.cli.flags import DOCUMENT, GUIDE, INTRODUCTION, document, guide, readers
from megatron_lite.config.deepspeed.keys import KEYS
from megatron_lite.config.flags.explain import usage
from megatron_lite.config.flags.legacy import LEGACY
from megatron_lite.config.flags.parser import parse, spellings
from megatron_lite.config.flags.settings import FlagSetting, settings
from megatron_lite.config.rules.table import notices, problems

GOOD = (
    "--num-layers 8 --hidden-size 96 --num-attention-heads 12 --seq-length 64 --lr 1e-3 "
    "--mock-data --vocab-size 100 --train-iters 10"
)
UNREAD = [setting for key, setting in settings().items() if not readers()[key]]


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "stale: run `make flags`"


def test_the_table_of_deepspeeds_keys_is_up_to_date_and_whole() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert text == guide(), "stale: run `make flags`"
    assert all(f"`{name}`" in text for name in KEYS)


def test_every_flag_has_its_row() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for setting in settings().values():
        assert re.search(
            rf"^\| `{re.escape(usage(setting).replace('|', chr(92) + '|'))}`", text, re.M
        )
    for flag in LEGACY:
        assert f"| `{flag}` |" in text


def test_the_twenty_to_begin_with_exist() -> None:
    text = INTRODUCTION.read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("| `--")]
    assert len(table) == 20
    named = {flag for line in table for flag in re.findall(r"`(--[a-z0-9-]+)`", line)}
    assert named - set(spellings()) == {"--preset"}
    assert all(re.search(r"[\u4e00-\u9fff]", line.split("|")[3]) for line in table)


def other_value(setting: FlagSetting) -> object:
    """A value that is not the default."""
    if setting.many:
        return ["mlp"]
    if setting.kind is bool:
        return not setting.default
    if setting.choices:
        return next(c for c in setting.choices if c != setting.default)
    return "Et|L" if setting.kind is str else 2


@pytest.mark.parametrize("setting", UNREAD, ids=lambda setting: setting.flag)
def test_what_nothing_reads_is_refused_or_noticed(setting: FlagSetting) -> None:
    config = parse(GOOD.split()).config
    assert problems(config, 2) == [] and notices(config, 2) == ()
    section = getattr(config, setting.section)
    changed = dataclasses.replace(section, **{setting.name: other_value(setting)})
    config = dataclasses.replace(config, **{setting.section: changed})
    said = " ".join([*problems(config, 2), *notices(config, 2)])
    stem = setting.flag.removeprefix("--")
    assert re.search(rf"--(no-)?{re.escape(stem)}\b", said)


def test_the_scan_tells_reads_from_calls() -> None:
    """Most settings are read, and those that only look alike are not counted."""
    found = readers()
    assert len(UNREAD) < 25
    assert "engines/zero.py" in found["optim.clip_grad"]
    assert "blueprint/draw_up.py" in found["parallel.tensor_model_parallel_size"]  # by `tp`
    assert not any(name.startswith("data/indexed") for name in found["data.split"])
