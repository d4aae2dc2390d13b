"""optimizer.type of a ds.json: which of its optimizers is here, under which name."""

from __future__ import annotations

from megatron_lite.config.deepspeed.laying import Laying, SaidKey

_TYPES = {
    "adam": "adam",
    "adamw": "adam",
    "fusedadam": "adam",
    "cpuadam": "adam",
    "deepspeedcpuadam": "adam",
    "sgd": "sgd",
}
_NOT_HERE = [
    "onebitadam",
    "zerooneadam",
    "onebitlamb",
    "lamb",
    "fusedlamb",
    "adagrad",
    "deepspeedcpuadagrad",
    "lion",
    "fusedlion",
    "muon",
    "muadam",
    "muadamw",
    "musgd",
    "adadelta",
    "adafactor",
    "adamax",
    "asgd",
    "lbfgs",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "sparseadam",
]
_ADAM_PARAMS = ("betas", "eps", "amsgrad", "bias_correction", "adam_w_mode", "torch_adam")
_SGD_PARAMS = ("momentum", "dampening", "nesterov")
_PREFIX = "optimizer.params."


def lay_optimizer(laying: Laying) -> None:
    """The optimizer and DeepSpeed's defaults of what its params leave out."""
    kind = laying.said.get("optimizer.type")
    params = {
        n.removeprefix(_PREFIX): key for n, key in laying.said.items() if n.startswith(_PREFIX)
    }
    if kind is None:
        laying.problems += [f"{key} needs optimizer.type" for key in [*params.values()][:1]]
        return
    ours = _TYPES.get(str(kind.value).lower()) if isinstance(kind.value, str) else None
    if ours is None:
        laying.problems.append(_no_such(laying, kind, params))
        return
    foreign = _SGD_PARAMS if ours == "adam" else _ADAM_PARAMS
    laying.problems += [
        f"{params[name]}: {kind.value} has no such parameter; drop it"
        for name in foreign
        if name in params
    ]
    laying.give("optim.optimizer", ours, kind)
    if "weight_decay" not in params:
        laying.default(
            "optim.weight_decay", 0.0, f"{kind.value} without weight_decay: 0, DeepSpeed's default"
        )
    if ours == "sgd" and "momentum" not in params:
        laying.default("optim.sgd_momentum", 0.0, "SGD without momentum: 0, torch's default")


def _no_such(laying: Laying, kind: SaidKey, params: dict[str, SaidKey]) -> str:
    """A refusal of the optimizer with the way out that keeps as much as can be kept."""
    if not isinstance(kind.value, str) or kind.value.lower() not in _NOT_HERE:
        return f"{kind}: no such optimizer; there are AdamW, Adam and SGD"
    kept = [name for name in ("lr", "betas", "eps", "weight_decay") if name in params]
    stays = f", with {', '.join(kept)} as written" if kept else ""
    wrong = ""
    if "betas" in params and kind.value.lower() in (
        "adadelta",
        "adagrad",
        "rmsprop",
        "rprop",
        "asgd",
        "lbfgs",
    ):
        wrong = f"; {kind.value} has no betas ({params['betas'].place}), so DeepSpeed cannot build it either"
    return (
        f'{kind}: not built{wrong}; write "type": "AdamW"{stays}, or drop the section optimizer and '
        "use --optimizer"
    )
