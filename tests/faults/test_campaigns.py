"""A share of `make faults` in CI: kills, flips of every kind of file, crafted files, planted pickles."""

from __future__ import annotations

import pytest

from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.store import Store
from megatron_lite.parallel.context import ParallelContext
from tests.faults import damage, kills, planted
from tests.faults.kills import Counted
from tests.faults.table import ROWS
from tests.support.places import ROOT


def require(counted: Counted, least: int) -> None:
    assert counted.wrong == []
    assert counted.kills >= least, counted


@pytest.mark.parametrize("kind", damage.FLIPPED)
def test_flipped_bits_are_found(tmp_path, no_fsync, kind) -> None:
    counted = damage.flips(kind)(10, 2, tmp_path, print)
    require(counted, 10)
    found = sum(n for what, n in counted.outcomes.items() if what.startswith("found"))
    # the others have bytes that mean nothing: a newline, a description's words, padding
    assert found == 10 or kind in ("pointer", ".meta.json", "index cache")


@pytest.mark.parametrize("kind", ["crafted", "pickles"])
def test_hostile_files_are_refused(tmp_path, no_fsync, kind) -> None:
    require(damage.CAMPAIGNS[kind](0, 0, tmp_path, print), 12)


def test_a_canary_would_be_seen(tmp_path) -> None:
    import pickle

    pickle.loads(pickle.dumps(planted.Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def test_a_loader_that_does_not_verify_would_be_seen(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_lite.checkpoint.store.verify_files", lambda *a, **k: None)
    counted = damage.flips("weights")(20, 3, tmp_path, print)
    assert counted.wrong


def test_a_save_that_is_not_atomic_would_be_seen(tmp_path) -> None:
    """The kill campaign's check finds a checkpoint whose tensors are another iteration's."""
    root = tmp_path / "saves"
    store = Store(root, ParallelContext.serial())
    mixed = store.snapshot(
        7,
        weights=kills.state(7),
        optimizer=kills.state(6, "exp_avg."),
        progress=Progress(7, 7, lr_samples=7),
        config={},
    )
    store.save(mixed)
    with pytest.raises(AssertionError, match="is not of 7"):
        kills.intact(root)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "count"),
    [("save", 12), ("load", 6), ("train", 8), ("train on two ranks", 2), ("preprocess", 10)],
)
def test_kills_lose_nothing(tmp_path, name, count) -> None:
    require(kills.CAMPAIGNS[name](count, 3, tmp_path, print), count)


def test_every_row_has_its_proof() -> None:
    assert len({row.id for row in ROWS}) == len(ROWS)
    campaigns = kills.CAMPAIGNS | damage.CAMPAIGNS
    assert {row.campaign for row in ROWS} - {""} == set(campaigns)
    killing = [row for row in ROWS if row.campaign in kills.CAMPAIGNS]
    assert sum(round(200 * row.share) for row in killing) == 200
    for row in ROWS:
        assert bool(row.campaign) != bool(row.tests), row.id
        for test in row.tests:
            file, _, name = test.partition("::")
            text = (ROOT / file).read_text()
            assert not name or f"def {name.partition('[')[0]}" in text, test
