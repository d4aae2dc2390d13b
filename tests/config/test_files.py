"""YAML configs: what is written is read back equal, and what is wrong has a line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.files import FileValues, dump, load, loads
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.flags.settings import FlagSetting, settings
from megatron_lite.config.sections.run import RunConfig


def rebuilt(values: FileValues) -> RunConfig:
    config = RunConfig()
    for key, value in values.values.items():
        section, name = key.split(".")
        changed = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def test_a_whole_run_is_read_back_equal(tmp_path: Path) -> None:
    argv = ["--preset", "gpt3-175b", "--lr", "6e-5", "--split", "949,50,1", "--fp16"]
    argv += ["--data-path", "0.35", "a", "0.65", "b"]
    parsed = parse([*argv, "--step-batch-size-schedule", "0:16 2.4B:1536", "--save", "off"])
    text = dump(parsed.config, parsed.origin)
    assert "  lr: 6.0e-05  # flag --lr\n" in text
    assert "  num_layers: 96  # preset gpt3-175b\n" in text
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert parse(["--config", str(file)]).config == parsed.config


def test_a_length_on_the_command_line_replaces_that_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("train:\n  train_iters: 9\n  train_epochs: 2\n")
    parsed = parse(["--config", str(file), "--train-samples", "30"])
    train = parsed.config.train
    assert (train.train_iters, train.train_samples, train.train_epochs) == (None, 30, None)
    assert parsed.notices[0].endswith("--train-iters 9 gives way to --train-samples")
    both = parse(
        ["--config", str(file), "--train-samples", "30", "--train-epochs", "4"]
    ).config.train
    assert (both.train_iters, both.train_samples, both.train_epochs) == (
        9,
        30,
        4,
    )  # a rule's to refuse


def items(setting: FlagSetting) -> st.SearchStrategy[object]:
    """Values a setting can hold."""
    letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    by_kind: dict[type, st.SearchStrategy[object]] = {
        bool: st.booleans(),
        int: st.integers(-(2**63) + 1, 2**63 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.text(letters, min_size=1),
    }
    one = st.sampled_from(setting.choices) if setting.choices else by_kind[setting.kind]
    value: st.SearchStrategy[object] = st.lists(one) if setting.many else one
    return st.none() | value if setting.optional else value


@effort(max_examples=25, deadline=None)
@given(st.fixed_dictionaries({key: items(setting) for key, setting in settings().items()}))
def test_any_config_is_read_back_equal(values: dict[str, object]) -> None:
    config = rebuilt(FileValues(values=values))
    assert rebuilt(loads(dump(config), name="run.yaml")) == config


@pytest.mark.parametrize("text", ["", "# nothing\n", "model:\n", "model: {}\n", "---\n"])
def test_an_empty_file_sets_nothing(text: str) -> None:
    assert loads(text, name="run.yaml") == FileValues()


def test_numbers_are_read_as_people_write_them() -> None:
    text = "learning_rate: {lr: 1e-5, min_lr: 0}\ndata: {data_path: [0.35, wiki, 1, owt]}\n"
    assert loads(text, name="run.yaml").values == {
        "learning_rate.lr": 1e-5,
        "learning_rate.min_lr": 0.0,
        "data.data_path": ["0.35", "wiki", "1", "owt"],
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("modle: {}", "run.yaml:1: modle: no such section; did you mean model? there are model, "),
        (
            "\nnum_layers: 3",
            "run.yaml:2: num_layers: no such section; write it below its section, "
            "as model.num_layers",
        ),
        ("model:\n  num_layer: 3", "run.yaml:2: model.num_layer: no such key; did you mean num_la"),
        ("model:\n  lr: 3", "run.yaml:2: model.lr: no such key; did you mean learning_rate.lr?"),
        ("model:\n  num_layers: 3.5", "model.num_layers (--num-layers) takes a whole number"),
        ("model:\n  num_layers: true", "(--num-layers) takes int, got True"),
        ("model:\n  num_layers: [3]", "(--num-layers) takes int, got [3]"),
        ("model:\n  num_layers:", "(--num-layers) takes int, got nothing"),
        ("optim: {adam_eps: .nan}", "(--adam-eps) takes a finite number"),
        ("precision: {bf16: 1}", "(--bf16) takes true or false, got 1"),
        ("data: {split: 98}", "(--split) takes text, got 98; put it in quotes"),
        ("data: {data_path: wiki}", "(--data-path) takes a list, got 'wiki'"),
        ("model: 3", "run.yaml:1: model must hold `key: value` lines, got scalar"),
        ("- 3", "run.yaml:1: a config file holds `key: value` lines, got sequence"),
        ("model: {}\nmodel: {}", "run.yaml:2: model stands at line 1 already"),
        ("train:\n  seed: 1\n  seed: 2", "run.yaml:3: train.seed stands at line 2 already"),
        ("? [a]\n: 3", "run.yaml:1: a key must be a name"),
        ("model: {", "run.yaml:1: not valid YAML: "),
        ("model: !!python/object/apply:os.getcwd []", "run.yaml:1: model must hold"),
        (
            "train: {seed: !!python/object/apply:os.getcwd []}",
            "not valid YAML: could not determine",
        ),
        ("\x07", "run.yaml: not valid YAML: "),
        pytest.param("[" * 5000, "run.yaml: nested far too deep", id="5,000 brackets"),
    ],
)
def test_what_is_wrong_has_a_line_and_a_way_out(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loads(text, name="run.yaml")
    assert message in str(caught.value)


def test_all_problems_of_a_file_are_reported_together() -> None:
    with pytest.raises(ConfigError, match="3 problems in run.yaml:") as caught:
        loads("modle: {}\nmodel:\n  layers: 3\n  swiglu: 3\n", name="run.yaml")
    assert [line[:16] for line in str(caught.value).splitlines()[1:]] == [
        "  1. run.yaml:1:",
        "  2. run.yaml:3:",
        "  3. run.yaml:4:",
    ]


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"run\.yaml: cannot be read"):
        load(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        load(str(tmp_path))
