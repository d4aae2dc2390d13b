"""Saved at any layout, schedule, sharding and precision, loaded at any other: the same bits, the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.axes import BF16, CHUNKS, PP, SCHEDULE, SP, TP, UNTIED, ZERO
from tests.support.checkpoints import load_and_save_again, train_and_save, whole
from tests.support.spawn import spawn

MICRO, FIRST = "train__micro_batch_size", "parallel__decoder_first_pipeline_num_layers"

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "serial": (1, {}),
    "tp2": (2, {TP: 2}),
    "tp2-sp": (2, {TP: 2, SP: True}),
    "tp4": (4, {TP: 4}),
    "pp2-gpipe": (2, {PP: 2, SCHEDULE: "gpipe"}),
    "pp4": (4, {PP: 4}),
    "pp2-uneven": (2, {PP: 2, FIRST: 1}),
    "pp2-interleaved": (2, {PP: 2, CHUNKS: 2}),
    "pp2-zb-h1": (2, {PP: 2, SCHEDULE: "zb-h1"}),
    "pp2-zb-v": (2, {PP: 2, SCHEDULE: "zb-v"}),
    "tp2-pp2-sp": (4, {TP: 2, PP: 2, SP: True}),
    "tp2-pp2-zb-v": (4, {TP: 2, PP: 2, SCHEDULE: "zb-v"}),
    "dp4": (4, {}),
    "dp2-micro1": (2, {MICRO: 1}),
    "dp4-zero": (4, {ZERO: 1}),
    "tp2-dp2-zero-sp": (4, {TP: 2, SP: True, ZERO: 1}),
    "pp2-dp2-zero": (4, {PP: 2, ZERO: 1}),
    "pp2-dp2-zero-zb-v": (4, {PP: 2, ZERO: 1, SCHEDULE: "zb-v"}),
    "pp2-dp2-zero-interleaved": (4, {PP: 2, ZERO: 1, CHUNKS: 2}),
    "dp2-stage2": (2, {ZERO: 2}),
    "tp2-dp2-stage3": (4, {TP: 2, SP: True, ZERO: 3}),
    "bf16": (1, {BF16: True}),
    "bf16-tp2-pp2": (4, {TP: 2, PP: 2, BF16: True}),
    "bf16-dp2-zero": (2, {ZERO: 1, BF16: True}),
    "bf16-pp2-dp2-stage3": (4, {PP: 2, ZERO: 3, BF16: True}),
}
NAMES = list(LAYOUTS)

QUICK = [
    ("tp2-sp", "pp2-interleaved"),
    ("pp2-dp2-zero-zb-v", "pp2-uneven"),
    ("bf16-dp2-zero", "serial"),
    ("tp4", "bf16-tp2-pp2"),
    ("tp2-dp2-stage3", "dp2-stage2"),
]  # fmt: skip
"""Saved and loaded in `make test`, beside those of test_store.py."""


def pairs(*steps: int) -> list[tuple[str, str]]:
    """Every layout saved, and loaded at the one so many rows further down."""
    found = [(a, NAMES[(k + step) % len(NAMES)]) for step in steps for k, a in enumerate(NAMES)]
    return [pair for pair in found if pair not in QUICK]


PAIRS, FURTHER = pairs(7), pairs(3, 12, 17)


def exact(hashes: dict[str, str]) -> dict[str, str]:
    """fp32 state under one name, whether it was a master or the weight itself."""
    return {
        name.removeprefix("master."): value
        for name, value in hashes.items()
        if name.startswith("master.") or f"master.{name}" not in hashes
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """source(layout, model's changes) -> (folder, losses of the two steps that followed); once each."""
    made: dict[str, tuple[Path, list[float]]] = {}

    def make(name: str, model: dict[str, Any]) -> tuple[Path, list[float]]:
        key = f"{name} {model}"
        if key not in made:
            folder = tmp_path_factory.mktemp("saved")
            ranks, changes = LAYOUTS[name]
            losses = spawn(train_and_save, ranks, {**changes, **model}, str(folder), 2, 2)[0]
            made[key] = folder, losses
        return made[key]

    return make


def check(source: Any, saved: str, loaded: str, tmp_path: Path, model: dict[str, Any]) -> None:
    folder, went_on = source(saved, model)
    ranks, changes = LAYOUTS[loaded]
    again = tmp_path / "again"
    resumed = spawn(load_and_save_again, ranks, {**changes, **model}, str(folder), str(again), 2)[0]
    first, second = whole(folder), whole(again)
    assert exact(first) == exact(second)
    assert len(exact(first)) > 30
    if set(first) == set(second):  # both keep masters, or neither
        assert first == second
    half = "bf16" in saved or "bf16" in loaded
    assert resumed == pytest.approx(went_on, rel=5e-3 if half else 1e-6)


@pytest.mark.parametrize(("saved", "loaded"), QUICK)
def test_some_layouts_load_others_bit_by_bit(source, saved, loaded, tmp_path) -> None:
    check(source, saved, loaded, tmp_path, {})


@pytest.mark.ci
@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_every_layout_loads_others_bit_by_bit(source, saved, loaded, tmp_path) -> None:
    check(source, saved, loaded, tmp_path, {})


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "loaded"), FURTHER)
def test_still_more_layouts_load_others_bit_by_bit(source, saved, loaded, tmp_path) -> None:
    check(source, saved, loaded, tmp_path, {})


@pytest.mark.ci
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("tp2-pp2-zb-v", "serial"),
        ("pp2-dp2-zero", "tp2-sp"),
        ("bf16-tp2-pp2", "bf16-dp2-zero"),
    ],
)
def test_with_an_output_matrix_of_its_own(source, saved, loaded, tmp_path) -> None:
    check(source, saved, loaded, tmp_path, {UNTIED: True})


CLEX = {
    "model__position_embedding_type": "rope", "model__rope_scaling_type": "clex",
    "model__rope_scaling_factor": 4.0, "model__rope_original_length": 8,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("tp2-pp2-zb-v", "serial"),
        ("serial", "pp2-interleaved"),
        ("pp2-dp2-zero", "tp2-sp"),
        ("bf16-tp2-pp2", "bf16-dp2-zero"),
    ],
)
def test_with_what_all_stages_learn_together(source, saved, loaded, tmp_path) -> None:
    check(source, saved, loaded, tmp_path, CLEX)


def test_the_table_saves_and_loads_every_layout() -> None:
    tried = PAIRS + QUICK
    assert {a for a, _ in tried} == {b for _, b in tried} == set(NAMES)
