"""The run folder: one run at a time, its own description, and starts that only look."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags import files
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.flags.settings import settings
from megatron_lite.config.sections.checkpoint import CheckpointConfig
from megatron_lite.storage import lock as lock_file
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.lock import LOCK, FolderLock, Owner
from megatron_lite.telemetry.summary import describe_losses
from megatron_lite.train import program
from megatron_lite.train.ending.faults import NoFaults
from megatron_lite.train.folder import of_the_run, of_this_start, require_own
from tests.support.folders import removed, renamed
from tests.support.launch import TINY, start
from tests.train.runs import alone, argv, evaluations, records, run_main, steps

Befall = Callable[[Path], None]


def content(folder: Path) -> dict[str, str]:
    """Name -> hash of everything in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def saving(folder: Path, *more: str) -> list[str]:
    schedule = ["--save-interval", "2", "--lr-decay-iters", "10"]
    return ["--mock-data", "--save", str(folder), *schedule, *more]


class At(NoFaults):
    """Something befalls the run the n-th time it comes to a named point."""

    def __init__(self, point: str, number: int, befall: Callable[[], None]) -> None:
        self.point, self.left, self.befall = point, number, befall

    def at(self, point: str) -> None:
        """Called by the run."""
        if point == self.point:
            self.left -= 1
            if self.left == 0:
                self.befall()


def befalls(
    monkeypatch: pytest.MonkeyPatch, point: str, number: int, befall: Callable[[], None]
) -> None:
    monkeypatch.setattr(program, "read_fault", lambda *_: At(point, number, befall))


# -- two starts into one folder ---------------------------------------------------------------


def test_a_second_start_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert alone(*saving(run)).rc == 0
    (run / "errors").mkdir()
    (run / "errors" / "rank1.json").write_text("{}")  # what the run that goes on has to say
    held = FolderLock.take(run, Disk(), print)
    before = content(run)
    for more in (["--load", str(run)], ["--overwrite-run"], ["--lr", "-1"], ["--train-iters", "0"]):
        done = alone(*saving(run, *more))
        assert done.rc == (2 if len(more) == 2 and more[0] != "--load" else 5), done.err
        assert content(run) == before
    held.release()
    assert "in use by process" in alone_while_held(run).err
    assert alone(*saving(run, "--load", str(run), "--train-iters", "6")).rc == 0
    assert not (run / LOCK).exists()


def alone_while_held(run: Path):  # type: ignore[no-untyped-def]
    held = FolderLock.take(run, Disk(), print)
    try:
        return alone(*saving(run, "--load", str(run)))
    finally:
        held.release()


@pytest.mark.ci
def test_two_starts_of_one_line_on_ranks(tmp_path: Path) -> None:
    line = [*TINY, *saving(tmp_path / "run", "--load", str(tmp_path / "run"))[1:], "--use-cpu"]
    with start(2, line, fault="step3.forward:1:sleep6") as first:
        first.wait_for(1, "iteration        2/")
        with start(2, line) as second:
            ended = second.wait()
        assert [rank.rc for rank in ended] == [5, 5]
        assert "in use by process" in ended[0].fatal and ended[1].fatal == ""
        assert [rank.rc for rank in first.wait()] == [0, 0]
    assert [r.iteration for r in steps(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def take_over(folder: Path) -> None:
    """Another run has the folder now."""
    owner = Owner.from_bytes((folder / LOCK).read_bytes())
    assert owner is not None
    (folder / LOCK).unlink()
    (folder / LOCK).write_bytes(dataclasses.replace(owner, token="another").to_bytes(1))


POLICIES = {
    "stop": [], "warn": ["--save-failure", "warn"], "async": ["--async-save"],
    "both": ["--async-save", "--save-failure", "warn"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "point"),
    [
        ("both", "save.before_complete"),
        pytest.param("stop", "save.begin", marks=pytest.mark.ci),
        pytest.param("warn", "save.begin", marks=pytest.mark.ci),
        pytest.param("warn", "save.before_complete", marks=pytest.mark.ci),
        pytest.param("async", "save.before_complete", marks=pytest.mark.ci),
    ],
)
def test_no_checkpoint_appears_in_a_folder_that_was_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, point: str
) -> None:
    run = tmp_path / "run"
    befalls(monkeypatch, point, 2, lambda: take_over(run))
    done = alone(*saving(run, "--train-iters", "8", *POLICIES[policy]))
    assert done.rc == 5 and "taken over by process" in done.err, done.err
    assert [folder.name for folder in run.glob("iter_*")] == ["iter_0000002"]
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "2\n"
    assert b"another" in (run / LOCK).read_bytes() and not (run / "ended.json").exists()


@pytest.mark.parametrize(
    ("policy", "befall"),
    [
        ("stop", renamed),
        pytest.param("warn", renamed, marks=pytest.mark.ci),
        pytest.param("stop", removed, marks=pytest.mark.ci),
        pytest.param("both", removed, marks=pytest.mark.ci),
    ],
)
def test_a_folder_lost_in_mid_run_is_noticed_before_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, befall: Befall
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(lock_file, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lock_file, "LOCK_PATIENCE_SECONDS", 0.05)

    def lose() -> None:
        befall(run)
        time.sleep(0.4)

    befalls(monkeypatch, "step", 3, lose)
    words = ["--save-interval", "50", "--train-iters", "5", *POLICIES[policy]]
    done = alone(*saving(run), *words)
    assert done.rc == 5 and "renamed, removed or unmounted" in done.err, done.err
    assert not run.exists()
    goes_on = "warn" in POLICIES[policy]
    assert ("iteration        5/" in done.out) == goes_on
    assert done.err.count("training continues") == goes_on


# -- another run's checkpoints ----------------------------------------------------------------


def test_another_runs_checkpoints_are_left_or_removed_whole(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    assert alone(*saving(run, "--train-iters", "6")).rc == 0
    assert alone(*saving(other)).rc == 0
    before = content(run)
    refused = {
        (): "--overwrite-run to remove that run",
        ("--load", str(other)): f"give --load {run}",
        ("--load", str(run), "--finetune"): "give another --save",
        ("--load", str(run), "--overwrite-run"): "leave one of them out",
    }
    for words, said in refused.items():
        done = alone(*saving(run, *words))
        assert done.rc == 2 and said in done.err, done.err
        assert content(run) == before
    done = alone(*saving(run, "--overwrite-run", "--lr", "1e-3"))
    assert done.rc == 0 and "removed 3 checkpoints" in done.out, done.err
    assert sorted(path.name for path in run.glob("iter_*")) == ["iter_0000002", "iter_0000004"]
    assert [record.iteration for record in steps(run)] == [1, 2, 3, 4]
    assert len((run / "starts.jsonl").read_text().splitlines()) == 1


@pytest.mark.ci
def test_a_refused_start_with_overwrite_removes_nothing(data: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert alone(*saving(run)).rc == 0
    before = content(run)
    done = alone(*saving(run, "--overwrite-run")[1:], "--data-path", str(tmp_path / "nowhere"))
    assert done.rc == 3, done.err
    del before["ended.json"]  # how the last start ended, cleared by every start
    assert content(run).items() >= before.items()


def test_a_restart_does_not_remove_its_own_checkpoints() -> None:
    asked = CheckpointConfig(save="run", overwrite_run=True)
    require_own(asked, [4], attempt=0)
    with pytest.raises(ConfigError, match="restart 1.*start again with --load run"):
        require_own(asked, [4], attempt=1)


# -- the run and the start --------------------------------------------------------------------


def test_config_yaml_describes_the_run_and_not_one_start(tmp_path: Path) -> None:
    first, tuned = tmp_path / "first", tmp_path / "tuned"
    assert alone(*saving(first)).rc == 0
    one = ["--load", str(first), "--finetune", "--ckpt-step", "2", "--allow-data-change"]
    assert alone(*saving(tuned, *one, "--exit-on-missing-checkpoint")).rc == 0
    kept = files.load(str(tuned / "config.yaml")).values
    assert kept["checkpoint.load"] == str(tuned) and kept["checkpoint.finetune"] is False
    assert kept["checkpoint.ckpt_step"] is None and kept["checkpoint.allow_data_change"] is False
    (told,) = map(json.loads, (tuned / "starts.jsonl").read_text().splitlines())
    assert told["asked"] == {
        "checkpoint.load": str(first), "checkpoint.finetune": True, "checkpoint.ckpt_step": 2,
        "checkpoint.allow_data_change": True,
    }  # fmt: skip
    # an evaluation leaves all that as it is, and the next start goes on
    before = content(tuned)
    looked = alone(*saving(tuned, "--load", str(tuned), "--skip-train", "--eval-iters", "1"))
    assert looked.rc == 0 and content(tuned) == before
    done = run_main("--config", str(tuned / "config.yaml"), "--train-iters", "6")
    assert done.rc == 0 and [r.iteration for r in steps(tuned)] == [1, 2, 3, 4, 5, 6], done.err
    told = [json.loads(line) for line in (tuned / "starts.jsonl").read_text().splitlines()]
    assert [(start["iteration"], start["asked"]) for start in told[1:]] == [(4, {})]


def test_what_is_asked_of_one_start_is_no_part_of_any_run() -> None:
    given = argv(
        "--mock-data", "--save", "run", "--save-interval", "2", "--load", "start", "--finetune",
        "--keep-optim", "--no-load-optim", "--no-load-rng", "--ckpt-step", "3", "--allow-data-change",
        "--overwrite-run", "--skip-train", "--override-opt-param-scheduler", "--profile",
        "--exit-on-missing-checkpoint",
    )  # fmt: skip
    config = parse(given).config
    run = of_the_run(config)
    assert of_the_run(run) == run and of_this_start(run) == {}
    asked = of_this_start(config)
    assert set(asked) == {
        "checkpoint.load", "checkpoint.finetune", "checkpoint.keep_optim", "checkpoint.load_optim",
        "checkpoint.load_rng",
        "checkpoint.ckpt_step", "checkpoint.allow_data_change", "checkpoint.overwrite_run",
        "train.skip_train", "learning_rate.override_opt_param_scheduler", "telemetry.profile",
    }  # fmt: skip
    assert run.checkpoint.load == "run" and run.checkpoint.exit_on_missing_checkpoint
    fresh = of_the_run(parse(argv("--mock-data", "--save", "run", "--save-interval", "2")).config)
    assert fresh.checkpoint.load is None  # the same run, from its beginning, in another folder
    unsaved = of_the_run(parse(argv("--mock-data", "--load", "run", "--finetune")).config)
    assert unsaved.checkpoint.load is None  # nothing of it could be gone on with


def test_permissions_and_overrides_are_always_of_one_start() -> None:
    """A new flag of this kind must say so, too; data of another tokenizer stay so at every start."""
    kinds, lasting = ("allow_", "override_", "overwrite_"), "data.allow_tokenizer_mismatch"
    named = [s for s in settings().values() if s.name.startswith(kinds) and s.key != lasting]
    assert len(named) >= 3
    assert [s.key for s in named if not s.one_start] == []


# -- starts that only look --------------------------------------------------------------------


def test_an_evaluation_writes_into_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    board = ["--tensorboard-dir", str(tmp_path / "board")]
    assert alone(*saving(run, "--eval-iters", "1", *board)).rc == 0
    said = describe_losses(records(run))
    before, curves = content(run), content(tmp_path / "board")
    look = ["--load", str(run), "--skip-train", "--eval-iters", "2", *board]
    held = FolderLock.take(run, Disk(), print)  # the training goes on
    done = alone(*saving(run, *look))
    held.release()
    assert done.rc == 0, done.err
    assert content(run) == before and content(tmp_path / "board") == curves
    assert describe_losses(records(run)) == said
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"records go to runs/{folder.name}" in done.out
    assert not (folder / "config.yaml").exists() and all(r.alone for r in evaluations(folder))
    told = describe_losses(records(folder))
    assert told[0].startswith("evaluated alone at iteration 4: validation loss ")
    # a failure of it is not the run's either
    assert alone(*saving(run, *look, "--ckpt-step", "3")).rc == 4 and content(run) == before


@pytest.mark.ci
def test_evaluations_gather_in_a_folder_of_their_own(tmp_path: Path) -> None:
    run, looked = tmp_path / "run", tmp_path / "looked"
    assert alone(*saving(run)).rc == 0
    for step in ("4", "2"):
        words = ["--load", str(run), "--ckpt-step", step, "--skip-train", "--eval-iters", "1"]
        done = alone(*saving(looked, *words))
        assert done.rc == 0, done.err
    assert [(r.iteration, r.split) for r in evaluations(looked)] == [
        (4, "validation"), (4, "test"), (2, "validation"), (2, "test"),
    ]  # fmt: skip


@pytest.mark.ci
def test_marked_evaluations_are_no_points_of_the_curve(tmp_path: Path) -> None:
    """In a metrics.jsonl where they stand beside a training's, as an older version left them."""
    run, looked = tmp_path / "run", tmp_path / "looked"
    assert alone(*saving(run, "--eval-iters", "1")).rc == 0
    words = ["--load", str(run), "--skip-train", "--eval-iters", "2"]
    assert alone(*saving(looked, *words)).rc == 0
    own = describe_losses(records(run))
    both = describe_losses([*records(run), *records(looked)])
    assert both[: len(own)] == own
    assert [line.split(":")[0] for line in both[len(own) :]] == [
        "evaluated alone at iteration 4"
    ] * 2


def test_two_starts_in_one_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "2026-01-01_00-00-00")
    for _ in range(2):
        assert alone("--mock-data", "--train-iters", "2").rc == 0
    found = sorted((tmp_path / "runs").iterdir())
    assert [folder.name for folder in found] == ["2026-01-01_00-00-00", "2026-01-01_00-00-00_2"]
    assert all(len(steps(folder)) == 2 for folder in found)
    refused = alone("--mock-data", "--train-iters", "2", "--load", str(found[0] / "metrics.jsonl"))
    assert refused.rc == 4 and sorted((tmp_path / "runs").iterdir()) == found, refused.err


@pytest.mark.parametrize("flag", ["--save", "--tensorboard-dir", "--data-cache-path"])
def test_a_folder_that_cannot_be_is_told_before_any_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a corpus")
    for name, code, said in (
        ("file", 5, "file is a file - choose another folder"),
        ("file/below", 5, "file is a file - choose another folder"),
        ("n" * 300, 2, "is too long"),
    ):
        done = alone("--mock-data", flag, name)
        assert done.rc == code and f"{flag} {name[:20]}" in done.err and said in done.err, done.err
        assert "datasets" not in done.out and done.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
