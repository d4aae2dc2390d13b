"""HEADS: a scalar head is in the table, the FLOPs and the plan as it is in the modules."""

from __future__ import annotations

import pytest

from megatron_lite.blueprint.draw_up import Blueprint, draw_up
from megatron_lite.blueprint.figure.heads import HEADS, projection
from megatron_lite.blueprint.figure.transformer import figure_of
from megatron_lite.blueprint.flops import head_forward
from megatron_lite.config.objectives import OBJECTIVES, ObjectiveNeeds
from tests.support.axes import PP, TP, UNTIED
from tests.support.tiny import tiny_config


@pytest.fixture(autouse=True)
def value(monkeypatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "value", ObjectiveNeeds(dataset="pretrain", head="scalar"))


def drawn(objective: str, **changes: object) -> Blueprint:
    return draw_up(tiny_config(train__objective=objective, **changes), 4)


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_a_scalar_head_is_one_row_on_every_tp_rank_and_nothing_else(untied: bool) -> None:
    sizes = {TP: 2, PP: 2, UNTIED: untied}
    scalar, words = drawn("value", **sizes), drawn("language-model", **sizes)
    (head,) = [spec for spec in scalar.parameters if spec.name == "head.weight"]
    assert (head.shape, head.tp_dim, head.stage) == ((1, 32), None, 1)
    assert head.tensor.decays and not head.tensor.vocabulary
    rest = {spec.name for spec in scalar.parameters} - {"head.weight"}
    assert rest == {spec.name for spec in words.parameters} - {"head.weight"}
    # no copy of the token table on the last stage
    assert not any(spec.replica for spec in scalar.parameters)
    table = 32 * words.padded_vocab_size
    assert words.num_parameters - scalar.num_parameters == (table if untied else 0) - 32
    assert words.held(1).parameters - scalar.held(1).parameters == table // 2 - 32


def test_its_flops_are_two_per_weight_and_threefold_in_training() -> None:
    scalar, words = drawn("value"), drawn("language-model")
    assert head_forward(scalar.figure) == 2 * 32
    less = 3 * 2 * 32 * (words.padded_vocab_size - 1)
    assert words.flops_per_token_full - scalar.flops_per_token_full == less
    assert words.flops_per_token_causal - scalar.flops_per_token_causal == less


def test_a_head_of_a_users_own_needs_a_row_and_nothing_else(monkeypatch) -> None:
    monkeypatch.setitem(HEADS, "five classes", projection(5))
    figure = figure_of(tiny_config().model, 64, "five classes")
    assert figure.output.rows == 5 and not figure.tied
    assert [t.shape for t in figure.head.tensors()][-1] == (5, 32)


def test_every_objective_names_a_head_that_there_is() -> None:
    assert {needs.head for needs in OBJECTIVES.values()} <= set(HEADS)
