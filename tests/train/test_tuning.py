"""Training on answers: only they count, packed or not, in every layout, resumed or not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_lite.config.errors import CheckpointError, ConfigError, DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.batch import Batch, collate
from megatron_lite.data.samples import Sample
from megatron_lite.data.sources import kind_for
from megatron_lite.data.tuning import TuningDataset
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import evaluation_step, train_step
from tests.support.spawn import spawn
from tests.support.talks import numbers, talk, tuned
from tests.support.tiny import context, draw, tiny_config
from tests.train.runs import alone, curve, evaluations, on_ranks, steps

SEQ, IDS = 96, 265
MODEL: dict[str, Any] = {
    "model__seq_length": SEQ, "model__vocab_size": IDS, "model__num_layers": 2,
    "train__objective": "sft", "data__mock_data": False, "optim__optimizer": "sgd",
}  # fmt: skip
ROPE = {"model__position_embedding_type": "rope"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, str]:
    return tuned(tmp_path_factory.mktemp("talks"), numbers(30), template="plain")


def words(made: tuple[DataConfig, str], *more: str) -> list[str]:
    """Flags of a run over them."""
    data, prefix = made
    assert data.tokenizer_model is not None
    return ["--objective", "sft", "--data-path", prefix, "--split", "8,2,0",
            "--tokenizer-type", data.tokenizer_type, "--tokenizer-model", data.tokenizer_model,
            "--seq-length", str(SEQ), "--max-position-embeddings", str(SEQ), *more]  # fmt: skip


def dataset(made: tuple[DataConfig, str], *, packing: bool) -> TuningDataset:
    data, prefix = made
    named = dataclasses.replace(data, data_path=[prefix], split="1,0,0", sft_packing=packing)
    found = kind_for("sft").build(
        named, seq_length=SEQ, seed=1, train_samples=None, valid_samples=0, test_samples=0,
        vocab_size=IDS, eod=261, cache_folder=None, tokenizer=None,
    ).train  # fmt: skip
    assert isinstance(found, TuningDataset)
    return found


def rows(found: TuningDataset, micro: int) -> list[Batch]:
    """All of an epoch, in micro batches of so many; the last ones may be fewer."""
    samples = [found[n] for n in range(len(found))]
    return [
        collate(samples[n : n + micro], np.arange(n, min(n + micro, len(samples))))
        for n in range(0, len(samples), micro)
    ]


def one_step(rank: int, ranks: int, changes: dict[str, Any], batches: Sequence[Batch]
             ) -> tuple[float, float]:  # fmt: skip
    """Loss and gradient norm of a step of these micro batches, dealt to the dp ranks in turn."""
    torch.set_num_threads(1)
    config = tiny_config(**MODEL | {"train__micro_batch_size": len(batches[0].tokens)} | changes,
                         train__global_batch_size=sum(len(b.tokens) for b in batches))  # fmt: skip
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))
    mine = [b for n, b in enumerate(batches) if n % run.ctx.dp.size == run.ctx.dp.rank]
    result = train_step(run, mine, lr=0.0, weight_decay=0.0)
    return result.loss.item(), result.update.grad_norm.item()


@pytest.mark.parametrize("positions", [{}, ROPE], ids=["learned", "rope"])
def test_packed_is_unpacked(made: tuple[DataConfig, str], positions: dict[str, Any]) -> None:
    """No attention across, positions that restart: the same loss, whatever shares a row."""
    whole, single = dataset(made, packing=True), dataset(made, packing=False)
    assert len(whole) * 2 < len(single) == 30
    loss, norm = one_step(0, 1, positions, rows(whole, 1))
    one_by_one = one_step(0, 1, positions, rows(single, 1))
    assert loss == pytest.approx(one_by_one[0], rel=1e-6)
    assert norm == pytest.approx(one_by_one[1], rel=1e-5)


@pytest.mark.parametrize("micro", [2, 5, 15])
def test_every_token_weighs_alike_whatever_the_micro_batches(
    made: tuple[DataConfig, str], micro: int
) -> None:
    """Micro batches of very different weights: the mean is over all tokens that count."""
    single = dataset(made, packing=False)
    weights = [float(b.loss_mask.sum()) for b in rows(single, 1)]
    assert max(weights) > 1.3 * min(weights)
    expected = one_step(0, 1, {}, rows(single, 1))
    assert one_step(0, 1, {}, rows(single, micro)) == pytest.approx(expected, rel=2e-6)


def test_prompts_get_no_gradient(made: tuple[DataConfig, str]) -> None:
    """Probed where it begins: what a position predicts has a gradient where its label is learned."""
    config = tiny_config(**MODEL, train__micro_batch_size=2, train__global_batch_size=2)
    run = assemble(config, draw(config, 1), ParallelContext.serial("cpu"))
    probed: list[Tensor] = []
    (stage,) = run.pipeline.stages.values()
    norm = stage.module.final_norm
    norm.register_forward_hook(
        lambda module, inputs, out: out.register_hook(probed.append) and None
    )
    batch = rows(dataset(made, packing=True), 2)[0]
    train_step(run, [batch], lr=0.0, weight_decay=0.0)
    (gradient,) = probed  # [s, b, h]
    touched = gradient.abs().sum(dim=-1).t().numpy() > 0
    assert touched.tolist() == (batch.loss_mask > 0).tolist()
    assert 0 < touched.mean() < 0.5


def nothing() -> Batch:
    """A row in which nothing counts."""
    tokens = np.arange(SEQ + 1, dtype=np.int64) % IDS
    return collate([Sample(tokens, np.zeros(SEQ, np.float32), np.array([0, SEQ], np.int32))],
                   np.array([0]))  # fmt: skip


@pytest.mark.ci
def test_a_mask_that_is_empty_on_one_rank_hangs_nothing(made: tuple[DataConfig, str]) -> None:
    full = rows(dataset(made, packing=True), 1)[:2]
    loss, norm = one_step(0, 1, {}, full)
    mixed = [full[0], nothing(), full[1], nothing()]  # of two ranks the second has nothing
    for found in spawn(one_step, 2, {}, mixed):
        assert found == pytest.approx((loss, norm), rel=1e-5)


def test_a_batch_of_weight_0_changes_nothing_and_is_told(made: tuple[DataConfig, str]) -> None:
    config = tiny_config(**MODEL, train__micro_batch_size=1, train__global_batch_size=2)
    run = assemble(config, draw(config, 1), ParallelContext.serial("cpu"))
    before = [w.data.clone() for w in run.engine.weights(owned=True)]
    result = train_step(run, [nothing(), nothing()], lr=0.1, weight_decay=0.1)
    assert result.update.skipped and "counts in the loss" in result.warnings[0]
    assert all(map(torch.equal, before, [w.data for w in run.engine.weights(owned=True)]))
    assert evaluation_step(run, [nothing()]).tolist() == [0.0, 0.0]
    after = train_step(run, rows(dataset(made, packing=True), 1)[:2], lr=0.1, weight_decay=0.1)
    assert not after.update.skipped and after.loss.isfinite()


def test_pad_equal_to_the_end_still_learns_the_end(tmp_path: Path) -> None:
    """The template "plain" ends an answer with the id that fills a row up."""
    found = dataset(tuned(tmp_path, [talk("a", "b")], template="plain"), packing=True)
    sample = found[0]
    assert sample.loss_mask is not None
    assert sample.tokens[:6].tolist() == [64, 260, 65, 261, 261, 261]
    assert sample.loss_mask[:6].tolist() == [0, 1, 1, 0, 0, 0]


def test_a_run_is_taken_up_exactly_and_may_be_longer(
    made: tuple[DataConfig, str], tmp_path: Path
) -> None:
    given = words(made, "--train-iters", "6", "--save-interval", "3", "--eval-interval", "3",
                  "--eval-iters", "1")  # fmt: skip
    once, again = tmp_path / "once", tmp_path / "again"
    whole = alone(*given, "--save", str(once))
    assert whole.rc == 0, whole.err
    assert "30" in whole.out and "samples of" in whole.out and "count (" in whole.out
    resumed = alone(*given, "--save", str(again), "--load", str(once), "--ckpt-step", "3")
    assert resumed.state_hash == whole.state_hash
    assert curve(steps(again)) == curve(steps(once))[3:]
    assert [e.loss for e in evaluations(again)] == [e.loss for e in evaluations(once)][1:]
    kept = once / "iter_0000006" / "tokenizer"
    assert "{{ '</s>' }}" in (kept / "chat_template.jinja").read_text()
    assert json.loads((kept / "generation_config.json").read_text()) == {"eos_token_id": 261}
    more = alone(
        *given,
        "--save",
        str(again),
        "--load",
        str(again),
        "--train-iters",
        "8",
        "--override-opt-param-scheduler",
    )
    assert more.rc == 0, more.err  # a longer run reads what follows
    other = alone(*given, "--save", str(tmp_path / "o"), "--load", str(once), "--no-sft-packing")
    assert other.rc == DataError.exit_code and "single -> single, a sample a row" in other.err


def test_epochs_are_the_steps_that_read_all_so_often(
    made: tuple[DataConfig, str], tmp_path: Path
) -> None:
    """The same run as with that number of samples, resumed in the middle of an epoch with another batch."""
    given = words(made, "--split", "1,0,0", "--eval-iters", "0", "--save-interval", "3",
                  "--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.2")  # fmt: skip
    rows = len(dataset(made, packing=True))
    epochs = [*given, "--train-epochs", "3"]
    without = ("--train-iters", "--lr-warmup-iters")
    once = alone(*epochs, "--save", str(tmp_path / "e"), without=without)
    assert once.rc == 0, once.err
    steps_asked = -(-3 * rows // 4)
    assert 3 * rows % 4 and len(steps(tmp_path / "e")) == steps_asked
    assert f"an epoch is {rows} samples of --seq-length, so {3 * rows} in {steps_asked}" in once.out
    samples = alone(
        *given, "--train-samples", str(3 * rows), "--save", str(tmp_path / "s"), without=without
    )
    assert curve(steps(tmp_path / "s")) == curve(steps(tmp_path / "e"))[: 3 * rows // 4]
    assert samples.rc == 0, samples.err
    again = alone(*epochs, "--save", str(tmp_path / "r"), "--load", str(tmp_path / "e"),
                  "--ckpt-step", "3", without=without)  # fmt: skip
    assert again.state_hash == once.state_hash
    other = alone(*epochs, "--save", str(tmp_path / "o"), "--load", str(tmp_path / "e"),
                  "--ckpt-step", "3", "--global-batch-size", "2", without=without)  # fmt: skip
    assert other.rc == 0, other.err
    assert steps(tmp_path / "o")[-1].samples == 3 * rows
    kept = (tmp_path / "e" / "config.yaml").read_text()
    assert "train_epochs: 3" in kept and f"epoch_samples: {rows}" not in kept
    more = alone(*given, "--train-epochs", "4", "--load", str(tmp_path / "e"), without=without)
    assert more.rc == CheckpointError.exit_code and "--train-epochs" in more.err


def test_what_is_not_known_or_not_read_of_conversations_is_told(
    made: tuple[DataConfig, str], tmp_path: Path
) -> None:
    for name in ("talks.bin", "talks.idx", "talks_loss_mask.bin", "talks_loss_mask.idx"):
        shutil.copy(Path(made[1]).parent / name, tmp_path)
    moved = words(
        (made[0], str(tmp_path / "talks")), "--train-iters", "1", "--lr-warmup-iters", "0"
    )
    assert "none is kept with the model" in alone(*moved).out
    ended = alone(*moved, "--objective", "language-model")
    assert ended.rc == 0 and "is not read: every token counts" in ended.out


@pytest.mark.ci
def test_another_number_of_ranks_takes_it_up(made: tuple[DataConfig, str], tmp_path: Path) -> None:
    given = words(made, "--train-iters", "6", "--save-interval", "3", "--micro-batch-size", "1")
    once, again = tmp_path / "once", tmp_path / "again"
    assert alone(*given, "--save", str(once)).rc == 0
    resumed = on_ranks(2, *given, "--save", str(again), "--load", str(once), "--ckpt-step", "3")
    assert resumed.rc == 0, resumed.err
    for found, expected in zip(steps(again), steps(once)[3:], strict=True):
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--mock-data"], "--objective sft learns answers, and --mock-data has none"),
        (["--reset-position-ids"], "--reset-position-ids goes by end-of-document"),
        (["--reset-attention-mask"], "have borders and masks of their own"),
        (["--eod-mask-loss"], "--eod-mask-loss goes by"),
        (["--objective", "language-model", "--no-sft-packing"], "leave it out"),
    ],
    ids=["mock", "positions", "attention", "eod", "packing"],
)
def test_what_does_not_go_together_is_refused(
    made: tuple[DataConfig, str], more: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        alone(*words(made), *more, "--dry-run")


def test_a_dry_run_says_how_many_tokens_count(
    made: tuple[DataConfig, str], capsys: pytest.CaptureFixture[str]
) -> None:
    ended = alone(*words(made), "--dry-run")
    assert ended.rc == 0, ended.err
    found = dataset(made, packing=True)
    assert (
        "of which" in ended.out and f"in {len(found)} rows" not in ended.out
    )  # of its split alone
    ended = alone(*words(made, "--split", "1,0,0"), "--dry-run")
    learned = int(found.plan.kept.learned.sum())
    assert f"of which {learned} count" in ended.out and f"in {len(found)} rows" in ended.out
    ended = alone(*words((made[0], "/nowhere/x")), "--dry-run")
    assert ended.rc == 0 and "/nowhere/x is not on this machine" in ended.out
