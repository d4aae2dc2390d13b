"""Lists of weights and prefixes mean what was written, and a typo is never a dataset."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.config.blend import MAX_DATASETS, Blend, blends, parse_blend, parse_split
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.sections.data import DataConfig


@pytest.mark.parametrize(
    "items, prefixes, weights",
    [
        ("wiki", ("wiki",), None),
        ("wiki owt", ("wiki", "owt"), None),
        ("wiki owt c4", ("wiki", "owt", "c4"), None),
        ("0.35 wiki 0.65 owt", ("wiki", "owt"), (0.35, 0.65)),
        ("3 wiki", ("wiki",), (3.0,)),
        ("1e-3 a 2E2 b", ("a", "b"), (0.001, 200.0)),
        ("1 ./2024 2 2023-01", ("./2024", "2023-01"), (1.0, 2.0)),
        ("./2024", ("./2024",), None),
    ],
)
def test_the_three_forms(
    items: str, prefixes: tuple[str, ...], weights: tuple[float, ...] | None
) -> None:
    assert parse_blend(items.split()) == Blend(prefixes, weights)


@pytest.mark.parametrize(
    "items, message",
    [
        ([], "names no dataset"),
        (["-0.35", "a", "0.65", "b"], "item 1, '-0.35', stands where a weight belongs"),
        (["0.35", "a", "0", "b"], "item 3, '0', stands where a weight belongs"),
        (["0.35", "a", "nan", "b"], "item 3, 'nan', stands where a weight belongs"),
        (["inf", "a", "1", "b"], "item 1, 'inf', stands where a weight belongs"),
        (["1e999", "a", "1", "b"], "item 1, '1e999', stands where a weight belongs"),
        (["O.35", "a", "0.65", "b"], "item 1, 'O.35', stands where a weight belongs"),
        (["0.35", "a", "0.65x", "b"], "item 3, '0.65x', stands where a weight belongs"),
        (["0,35", "a", "0,65", "b"], "item 1, '0,35', stands where a weight belongs"),
        (["35%", "a", "65%", "b"], "item 1, '35%', stands where a weight belongs"),
        (["", "a", "0.65", "b"], "item 1, '', stands where a weight belongs"),
        (["0.35", "a", "0.65"], "the weight 0.65 at the end has no prefix"),
        (["a", "0.35", "b"], "item 1, 'a', stands where a weight belongs"),
        (["a", "0.35", "b", "0.65"], "item 1, 'a', stands where a weight belongs"),
        (["0.3", "0.7", "a", "b"], "item 2, '0.7', stands where a prefix belongs"),
        (["2024"], "(a prefix that is a number: ./2024)"),
        (["a", "b", "a"], "a is named twice"),
        (["1", "a", "2", "x/../a"], "x/../a is named twice"),
        (["1", "", "2", "b"], "an empty prefix"),
        (["a.bin"], "a.bin is a file; give the prefix without .bin: a"),
        (["1e308", "a", "1e308", "b"], "the weights' sum is not finite"),
        ([f"d{i}" for i in range(MAX_DATASETS + 1)], "at most 32766 can be mixed"),
    ],
)
def test_what_is_wrong_with_a_list_is_named(items: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_blend(items)
    assert str(caught.value).startswith("--data-path") and message in str(caught.value)


@pytest.mark.parametrize(
    "text, shares",
    [
        ("949,50,1", (0.949, 0.05, 0.001)),
        ("969, 30, 1", (0.969, 0.03, 0.001)),
        ("98/2/0", (0.98, 0.02, 0.0)),
        ("1 1", (0.5, 0.5, 0.0)),
        ("100", (1.0, 0.0, 0.0)),
        (".5,.25,.25", (0.5, 0.25, 0.25)),
        ("'99,1,0'", (0.99, 0.01, 0.0)),
        ('"99, 1, 0"', (0.99, 0.01, 0.0)),
        ("[99,1,0]", (0.99, 0.01, 0.0)),
    ],
)
def test_splits(text: str, shares: tuple[float, float, float]) -> None:
    assert parse_split(text) == shares


@pytest.mark.parametrize("text", ["", "0,0,0", "-1,2,3", "a,b", "nan", "1,2,3,4", "inf,1", "1;2"])
def test_bad_splits_are_named(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_split(text)
    assert f"--split {text!r}" in str(caught.value)


def test_each_source_gives_its_blends(tmp_path: Path) -> None:
    listed = tmp_path / "args.txt"
    listed.write_text("0.35 wiki\n0.65 owt\n")
    json = tmp_path / "splits.json"
    json.write_text('{"train": [0.35, "wiki", "0.65", "owt"], "valid": ["c4"], "test": null}')
    mixed, single = Blend(("wiki", "owt"), (0.35, 0.65)), Blend(("c4",), None)

    whole = blends(DataConfig(data_path=["0.35", "wiki", "0.65", "owt"], split="98,2,0"))
    assert (whole.shared, whole.split, whole.by_split) == (mixed, (0.98, 0.02, 0.0), {})
    from_file = blends(DataConfig(data_args_path=str(listed)))
    assert (from_file.shared, from_file.split) == (mixed, (0.969, 0.03, 0.001))
    three = blends(
        DataConfig(train_data_path=["0.35", "wiki", "0.65", "owt"], test_data_path=["c4"])
    )
    assert (three.shared, three.split) == (None, None)
    assert three.by_split == {"train": mixed, "test": single}
    described = blends(DataConfig(per_split_data_args_path=str(json)))
    assert described.by_split == {"train": mixed, "valid": single}
    mock = blends(DataConfig(mock_data=True))
    assert mock.mock and mock.shared is None


@pytest.mark.parametrize(
    "data, message",
    [
        (DataConfig(), "exactly one source of data is needed, got none"),
        (DataConfig(mock_data=True, data_path=["a"]), "got --data-path and --mock-data"),
        (DataConfig(train_data_path=["a"], split="1,1,1"), "--split 1,1,1 cuts one blend"),
        (DataConfig(data_args_path="/nowhere"), "--data-args-path /nowhere: cannot be read"),
        (DataConfig(valid_data_path=["a", "1"]), "--valid-data-path: item 1, 'a'"),
    ],
)
def test_wrong_sources(data: DataConfig, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        blends(data)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON"),
        ("[1]", "must be an object"),
        ('{"trian": ["a"]}', "must be an object"),
        ('{"train": "a"}', "'train' must be a list"),
        ('{"train": [NaN, "a"]}', "item 1, 'nan', stands where a weight belongs"),
        ('{"train": [true, "a"]}', "'train' must be a list of weights and prefixes"),
        ("{}", "names no dataset for any split"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_per_split_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "splits.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        blends(DataConfig(per_split_data_args_path=str(file)))
    assert str(caught.value).startswith(f"--per-split-data-args-path {file}")
    assert message in str(caught.value)
