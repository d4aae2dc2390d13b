"""Adafactor in every layout: its states are named, planned, resumed; both steps reach a run."""

from __future__ import annotations

import pytest

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.rules.table import check_config
from megatron_lite.rehearsal.rehearse import stand_in
from tests.support.axes import BF16, PP, SP, TP, ZERO
from tests.support.checkpoints import load_and_save_again, train_and_save, whole
from tests.support.spawn import spawn
from tests.support.tiny import draw, tiny_config

ADAFACTOR = {"optim__optimizer": "adafactor"}
RELATIVE = ADAFACTOR | {
    "optim__adafactor_relative_step": True,
    "optim__adafactor_scale_parameter": True,
    "optim__adafactor_warmup_init": True,
}
NO_RATE = {"learning_rate__lr": None, "learning_rate__lr_decay_style": "linear"}
SAVED, LOADED = [
    (2, {TP: 2, SP: True}), (2, {PP: 2}), (2, {ZERO: 1, BF16: True}),
    (4, {TP: 2, ZERO: 1, "model__vocab_size": 8}),
], [(1, {}), (2, {TP: 2}), (4, {TP: 2, ZERO: 1}), (2, {PP: 2, "model__vocab_size": 8})]  # fmt: skip


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        pytest.param(*pair, id=name, marks=getattr(pytest.mark, when))
        for name, when, *pair in zip(
            ("tp to one", "pp to tp", "bf16 shared to tp shared", "a rank of padding to pp"),
            ("ci", "slow", "slow", "slow"), SAVED, LOADED, strict=True,
        )
    ],
)  # fmt: skip
def test_it_resumes_in_any_layout_and_bit_for_bit_in_its_own(tmp_path, saved, loaded) -> None:
    folder, other, same = (str(tmp_path / name) for name in ("saved", "other", "same"))
    (ranks, changes), (others, elsewhere) = saved, loaded
    low = {name: value for name, value in changes.items() if name == BF16}
    changes = ADAFACTOR | changes
    went_on = spawn(train_and_save, ranks, changes, folder, 2, 2)
    resumed = spawn(load_and_save_again, ranks, changes, folder, same, 2)
    assert resumed == went_on
    moved = spawn(load_and_save_again, others, ADAFACTOR | elsewhere | low, folder, other, 2)
    assert moved[0] == pytest.approx(went_on[0], rel=1e-3 if low else 1e-6)
    stored = whole(tmp_path / "saved")
    assert stored == whole(tmp_path / "other") == whole(tmp_path / "same")
    assert {"exp_avg_sq_row.embedding.tokens.weight", "exp_avg_sq.final_norm.weight"} <= set(stored)


@pytest.mark.parametrize(
    ("ranks", "changes"), [(2, {TP: 2}), (4, {TP: 2, ZERO: 1, BF16: True}), (2, {PP: 2})]
)
def test_states_of_all_ranks_are_each_tensors_once(ranks, changes) -> None:
    """Also where each tp rank has the whole of one, and where one has no row of the vocabulary."""
    config = tiny_config(**ADAFACTOR | changes | {"model__vocab_size": 8})
    blueprint = draw(config, ranks)
    elements: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rank in range(ranks):
        with stand_in(config, blueprint, rank) as actor:
            for piece in actor.run.engine.state(owned=True):
                if piece.replicated and actor.run.ctx.replicas.rank:
                    continue
                elements[piece.name] = elements.get(piece.name, 0) + piece.data.numel()
                shapes[piece.name] = piece.shape
    for name, shape in shapes.items():
        size = 1
        for n in shape:
            size *= n
        assert elements[name] == size, name
    assert shapes["exp_avg_sq_row.embedding.tokens.weight"] == (8,)
    assert shapes["exp_avg_sq_col.embedding.tokens.weight"] == (32,)
    assert shapes["exp_avg_sq_row.blocks.0.mlp.down.weight"] == (32,)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            RELATIVE,
            "--adafactor-relative-step makes its own steps.*--lr, --lr-decay-style would have",
        ),
        (ADAFACTOR | {"optim__adafactor_warmup_init": True}, "add --adafactor-relative-step"),
        (
            RELATIVE | NO_RATE | {"optim__param_groups": ["kind=norm:rule=adam"]},
            "no learning rate for others, and adam updates some",
        ),
        ({"optim__adafactor_beta1": 0.9}, "--adafactor-beta1 is about --optimizer adafactor.*adam"),
    ],
)
def test_one_step_is_not_taken_for_the_other(changes, said) -> None:
    with pytest.raises(ConfigError, match=said):
        check_config(tiny_config(**changes), 1)
    check_config(tiny_config(**RELATIVE | NO_RATE), 1)
    check_config(tiny_config(**ADAFACTOR), 1)
