"""--param-groups: own learning rates, decays and rules, by name or kind."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.blueprint.optimizers import FROZEN, treatment
from megatron_lite.blueprint.param_groups import group_lines
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.rules.table import problems
from megatron_lite.config.sections.optim import LearningRateConfig
from megatron_lite.parallel.shard import MASTER
from megatron_lite.rehearsal.rehearse import stand_in
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.axes import BF16, PP, TP, ZERO
from tests.support.checkpoints import same_in_every_way
from tests.support.tiny import context, draw, make_batches, tiny_config

GROUPS = "optim__param_groups"
MIXED = [
    "embedding.*:lr=0.1",
    "kind=norm:weight_decay=0.5",
    "blocks.0.*:lr=3,weight_decay=2",
    "*.attention.k.*:lr=0",
    "blocks.*.mlp.up.weight:rule=sgd,lr=20",
]
"""A piece of a fused matrix is frozen, another one's neighbour has a learning rate of its own."""


def assembled(**changes):
    config = tiny_config(**changes)
    blueprint = draw(config, 1)
    return config, blueprint, assemble(config, blueprint, context(blueprint, 0))


def weights(run):
    return {s.name: s.data.clone() for s in run.engine.weights(owned=True)}


def of_torch(name, values):
    """What MIXED says, in torch's words: (optimizer, its factor on lr, on weight decay)."""
    lr, matrix = 1.0, values.ndim == 2
    decay = 1.0 if matrix else 0.0
    if name.startswith("embedding."):
        lr = 0.1
    if "norm" in name:
        decay = 0.5
    if name.startswith("blocks.0."):
        lr, decay = 3.0, 2.0
    if ".attention.k." in name:
        lr = 0.0
    sgd = name.endswith("mlp.up.weight")
    return sgd, 20.0 if sgd else lr, decay


def test_groups_are_those_of_torch() -> None:
    """AdamW and SGD of torch with a parameter group for each tensor, from the same gradients."""
    config, blueprint, run = assembled(
        **{GROUPS: MIXED, "optim__clip_grad": 0.0, "model__num_layers": 2}
    )
    theirs = {name: value.requires_grad_() for name, value in weights(run).items()}
    adam, sgd = [], []
    for name, value in theirs.items():
        by_sgd, lr, decay = of_torch(name, value)
        group = {"params": [value], "lr": 1e-2 * lr, "weight_decay": 0.1 * decay}
        (sgd if by_sgd else adam).append(group)
    optim = config.optim
    others = (
        torch.optim.AdamW(adam, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_eps),
        torch.optim.SGD(sgd, momentum=optim.sgd_momentum),
    )
    apply = run.engine.apply

    def both(norm, **rates):
        for piece in run.engine.gradients(owned=True):
            theirs[piece.name].grad = piece.data.clone()
        for other in others:
            other.step()
        return apply(norm, **rates)

    run.engine.apply = both
    for step in range(3):
        train_step(run, make_batches(config, blueprint, 0, step), lr=1e-2, weight_decay=0.1)
    ours = weights(run)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.detach(), rtol=1e-6, atol=1e-7, msg=name)
    frozen = [name for name in ours if ".attention.k." in name]
    first = weights(assembled(**{GROUPS: MIXED, "model__num_layers": 2})[2])
    assert frozen and all(torch.equal(ours[name], first[name]) for name in frozen)


def test_of_two_groups_the_later_one_counts_key_by_key() -> None:
    optim = tiny_config(**{GROUPS: ["*:lr=2,weight_decay=0", "blocks.1.*:lr=3"]}).optim
    tensors = {s.name: s.tensor for s in draw(tiny_config(), 1).parameters}
    how = treatment(optim, tensors["blocks.1.mlp.up.weight"])
    assert (how.lr, how.weight_decay) == (3.0, 0.0)
    assert treatment(optim, tensors["blocks.2.mlp.up.weight"]).lr == 2.0
    optim = tiny_config(**{GROUPS: ["*:lr=2", "kind=embedding:lr=0"]}).optim
    assert treatment(optim, tensors["embedding.tokens.weight"]) is FROZEN


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("embedding", "is no PATTERN:key=value"),
        (":lr=1", "is no PATTERN:key=value"),
        ("kind=weights:lr=1", "kind is one of matrix, embedding, norm, bias"),
        ("*:rate=1", "'rate' is none of lr, weight_decay, rule"),
        ("*:lr=1,lr=2", "lr is said twice"),
        ("*:lr=-1", "lr=-1 must be a factor on --lr from 0"),
        ("*:weight_decay=nan", "weight_decay=nan must be a factor on --weight-decay from 0"),
    ],
)
def test_what_cannot_be_read_is_refused_with_all_else(text, said) -> None:
    (found,) = problems(tiny_config(**{GROUPS: ["*:lr=1", text], "train__train_iters": 1}), 1)
    assert found.startswith(f"--param-groups '{text}'") and said in found


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (
            ["embeding.tokens.*:lr=1"],
            "no tensor of this model has such a name; names are like embedd",
        ),
        (["blocks.9.*:lr=1"], "no tensor of this model has such a name"),
        (["*:rule=adamw"], "rule is one of adam, sgd"),
        (["kind=norm:lr=0", "*:lr=0"], "freezes every tensor"),
    ],
)
def test_what_fits_no_tensor_or_rule_is_refused_when_the_model_is_known(groups, said) -> None:
    with pytest.raises(ConfigError, match="param-groups") as error:
        draw(tiny_config(**{GROUPS: groups}), 1)
    assert said in str(error.value)


def test_every_group_is_told_with_its_numbers() -> None:
    config = tiny_config(**{GROUPS: MIXED, "learning_rate__decoupled_lr": 0.5})
    rates = LearningRateConfig(lr=0.2, decoupled_lr=0.5)
    parameters = draw(config, 1).parameters
    lines = group_lines(config.optim, rates, parameters)
    said = "\n".join(lines)
    assert (
        "adam, lr 0.1 x --decoupled-lr = 0.05, weight decay 1 x --weight-decay = 0.01: 1 tensors"
        in said
    )
    assert "sgd, lr 20 x --lr = 4" in said and "frozen: 8 tensors" in said
    counts = [int(line.split(": ")[1].split()[0]) for line in lines]
    assert sum(counts) == len(parameters)
    assert group_lines(tiny_config().optim, rates, parameters) == []


@pytest.mark.parametrize("changes", [{}, {BF16: True, ZERO: 1}])
def test_the_plan_counts_by_group_what_the_engine_keeps(changes) -> None:
    ranks = 2 if changes else 1
    config = tiny_config(**changes | {GROUPS: MIXED, "model__vocab_size": 64})
    blueprint = draw(config, ranks)
    states = masters = 0
    for dp in range(ranks):
        with stand_in(config, blueprint, dp) as actor:
            for piece in actor.run.engine.state(owned=False):
                if piece.name.startswith(MASTER):
                    masters += piece.data.numel()
                else:
                    states += piece.data.nbytes
    held = blueprint.held(0)
    assert states == held.state_bytes < draw(tiny_config(), 1).held(0).state_bytes
    assert masters == (held.num_trained if changes else 0)


@pytest.mark.ci
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({ZERO: 1}, id="dp2 shared"),
        pytest.param({TP: 2}, id="tp2", marks=pytest.mark.slow),
        pytest.param({PP: 2}, id="pp2", marks=pytest.mark.slow),
    ],
)
def test_groups_are_the_same_in_every_layout_and_after_a_resume(tmp_path, changes) -> None:
    hashes = same_in_every_way(tmp_path, {GROUPS: MIXED}, changes)
    assert not any(name.startswith("exp_avg.blocks.0.attention.k") for name in hashes)
    assert "momentum.blocks.1.mlp.up.weight" in hashes
