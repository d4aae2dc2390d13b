"""optimizer.type of a ds.json: which of its optimizers is here, under which name, with which parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_lite.config.deepspeed.key import real, shown
from megatron_lite.config.deepspeed.laying import Laying, SaidKey

_PREFIX = "optimizer.params."
_OF_ALL = ("lr", "weight_decay", "fused", "foreach", "capturable", "differentiable", "maximize",
           "max_grad_norm", "set_grad_none", "fp32_optimizer_states")  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Here:
    """An optimizer of DeepSpeed's or torch's that this project has."""

    ours: str
    takes: tuple[str, ...]
    betas: tuple[str, str] | None = None
    """The fields of its betas."""
    defaults: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    """Parameter -> its field and what it is where the file does not say it."""


_ADAM = _Here(
    "adam",
    ("betas", "eps", "amsgrad", "bias_correction", "adam_w_mode", "torch_adam"),
    ("optim.adam_beta1", "optim.adam_beta2"),
)
_TYPES: Mapping[str, _Here] = {
    "adam": _ADAM,
    "adamw": _ADAM,
    "fusedadam": _ADAM,
    "deepspeedcpuadam": _ADAM,
    "sgd": _Here(
        "sgd",
        ("momentum", "dampening", "nesterov"),
        defaults={"momentum": ("optim.sgd_momentum", 0.0)},
    ),
    "lion": _Here("lion", ("betas",), ("optim.lion_beta1", "optim.lion_beta2")),
}
_LION_BETAS = (0.9, 0.99)

NOT_HERE = {
    "onebitadam", "zerooneadam", "onebitlamb", "lamb", "fusedlamb", "adagrad", "muon", "muadam",
    "muadamw", "musgd", "adadelta", "adafactor", "adamax", "asgd", "lbfgs", "nadam", "radam",
    "rmsprop", "rprop", "sparseadam",
}  # fmt: skip
"""Known by name."""
_WITHOUT_BETAS = ("adadelta", "adagrad", "rmsprop", "rprop", "asgd", "lbfgs")


def lay_optimizer(laying: Laying) -> None:
    """The optimizer, its betas, and DeepSpeed's defaults of what its params leave out."""
    kind = laying.said.get("optimizer.type")
    params = {
        n.removeprefix(_PREFIX): key for n, key in laying.said.items() if n.startswith(_PREFIX)
    }
    if kind is None:
        laying.problems += [f"{key} needs optimizer.type" for key in [*params.values()][:1]]
        return
    here = _TYPES.get(kind.value.lower()) if isinstance(kind.value, str) else None
    if here is None:
        laying.problems.append(_no_such(laying, kind, params))
        return
    laying.problems += [
        f"{key}: {kind.value} has no such parameter; drop it"
        for name, key in params.items()
        if name not in (*here.takes, *_OF_ALL)
    ]
    laying.give("optim.optimizer", here.ours, kind)
    if here.betas is not None:
        _lay_betas(laying, here, here.betas, params.get("betas"))
    defaults = {"weight_decay": ("optim.weight_decay", 0.0), **here.defaults}
    for name, (of_field, value) in defaults.items():
        if name not in params:
            laying.default(of_field, value, f"{kind.value} without {name}: {value:g}, its default")


def _lay_betas(laying: Laying, here: _Here, fields: tuple[str, str], key: SaidKey | None) -> None:
    if key is None:
        if here.ours == "lion":
            for of_field, beta in zip(fields, _LION_BETAS, strict=True):
                laying.default(of_field, beta, f"Lion without betas: {beta:g}, its default")
    elif key.is_auto:
        laying.from_flags(key, fields)
    elif not isinstance(key.value, list) or len(key.value) != 2:
        laying.problems.append(f"{key.place}: {key.name} takes two numbers, got {shown(key.value)}")
    else:
        for of_field, beta in zip(fields, key.value, strict=True):
            try:
                laying.give(of_field, real(beta), key)
            except ValueError as error:
                laying.problems.append(f"{key.place}: {key.name} {error}")


def _no_such(laying: Laying, kind: SaidKey, params: Mapping[str, SaidKey]) -> str:
    """A refusal of the optimizer with the way out that keeps as much as can be kept."""
    name = kind.value.lower() if isinstance(kind.value, str) else ""
    if name not in NOT_HERE:
        return f"{kind}: no such optimizer; there are AdamW, Adam, SGD and Lion"
    if name in laying.flags["optim.optimizer"].allowed:
        return (
            f"{kind}: its parameters have flags of their own here: drop the section optimizer, and use "
            f"--optimizer {name}"
        )
    kept = [name for name in ("lr", "betas", "eps", "weight_decay") if name in params]
    stays = f", with {', '.join(kept)} as written" if kept else ""
    wrong = ""
    if "betas" in params and name in _WITHOUT_BETAS:
        wrong = f"; {kind.value} has no betas ({params['betas'].place}), so DeepSpeed cannot build it either"
    return (
        f'{kind}: not built{wrong}; write "type": "AdamW"{stays}, or drop the section optimizer and '
        "use --optimizer"
    )
