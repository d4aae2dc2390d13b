"""Who owns the learning rate: the file's scheduler and optimizer.params.lr, or the flags; never both.

A curve is read as in this project, at the steps before: DeepSpeed's schedulers are one step later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megatron_lite.config.deepspeed.key import positive, real
from megatron_lite.config.deepspeed.laying import Laying, SaidKey
from megatron_lite.config.deepspeed.training_keys import SCHEDULERS

_RATE = "learning_rate."
_LR, _MIN, _STYLE = f"{_RATE}lr", f"{_RATE}min_lr", f"{_RATE}lr_decay_style"
_INIT, _WARM, _DECAY = f"{_RATE}lr_warmup_init", f"{_RATE}lr_warmup_iters", f"{_RATE}lr_decay_iters"
_WARM_WAYS = (_WARM, f"{_RATE}lr_warmup_samples", f"{_RATE}lr_warmup_fraction")
_DECAY_WAYS = (_DECAY, f"{_RATE}lr_decay_samples")
_OTHERS = tuple(
    f"{_RATE}lr_{name}"
    for name in ("restarts", "wsd_decay_style", "wsd_decay_iters", "wsd_decay_samples")
)
_CURVE = (_MIN, _STYLE, _INIT, *_WARM_WAYS, *_DECAY_WAYS, *_OTHERS)
_STYLES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_PEAK_OF_ADAM = 0.1
_Number = TypeVar("_Number", int, float)
_OPTIMIZER_LR, _TYPE = "optimizer.params.lr", "scheduler.type"
_PARAMS = {
    "WarmupLR": "warmup_min_lr warmup_max_lr warmup_num_steps warmup_type",
    "WarmupDecayLR": "warmup_min_lr warmup_max_lr warmup_num_steps warmup_type total_num_steps",
    "WarmupCosineLR": "warmup_min_ratio warmup_num_steps warmup_type total_num_steps cos_min_ratio",
}


def lay_learning_rate(laying: Laying) -> dict[str, int]:
    """Lay scheduler and lr of the file; returns the fields of samples that are to hold so many steps of it."""
    kind = laying.said.get(_TYPE)
    params = [key for name, key in laying.said.items() if name.startswith("scheduler.params.")]
    if kind is None:
        laying.problems += [f"{key} needs scheduler.type" for key in params[:1]]
        _alone(laying)
        return {}
    if kind.value not in SCHEDULERS:
        laying.problems.append(
            f"{kind} is not built; there are {', '.join(SCHEDULERS)}, and --lr-decay-style has more"
        )
        return {}
    return _Scheduler(laying, kind, params).lay()


def _alone(laying: Laying) -> None:
    """optimizer.params.lr without a scheduler: constant, or a curve of flags that name the same peak."""
    key = laying.said.get(_OPTIMIZER_LR)
    if key is None:
        return
    if key.is_auto:
        laying.from_flags(key, [_LR])
        return
    lr = _read(laying, key, real)
    if lr is None:
        return
    curve = [
        laying.flag(field)
        for field in _CURVE
        if laying.given(field) and not (field == _STYLE and laying.values[field] == "constant")
    ]
    if curve and not laying.given(_LR):
        laying.problems.append(
            f"{key} owns the learning rate, which stays there without a scheduler; {curve[0]} is "
            f"a curve of the "
            'flags: write "lr": "auto" and give --lr, or drop the flag'
        )
        return
    laying.give(_LR, lr, key)
    if not laying.given(_LR):
        laying.default(_STYLE, "constant", f"no scheduler: the learning rate stays at {lr:g}")
    _check_peak(laying, key, lr)


class _Scheduler:
    """One scheduler of the file, laid field by field."""

    def __init__(self, laying: Laying, kind: SaidKey, params: list[SaidKey]) -> None:
        self.laying = laying
        self.kind = kind
        self.params = {key.name.rpartition(".")[2]: key for key in params}
        self.type = str(kind.value)

    def lay(self) -> dict[str, int]:
        laying = self.laying
        takes = _PARAMS[self.type].split()
        laying.problems += [
            f"{key}: {self.type} has no such parameter; it takes {', '.join(takes)}"
            for name, key in self.params.items()
            if name not in takes
        ]
        laying.problems += [
            f"{self.kind} owns the curve, which {laying.flag(other)} would change; keep one"
            for other in _OTHERS
            if laying.given(other)
        ]
        laying.give(_STYLE, _STYLES[self.type], self.kind)
        lr = self._ratios() if self.type == "WarmupCosineLR" else self._peaks()
        if self.type == "WarmupDecayLR" and lr is not None:
            laying.give(_MIN, 0.0, self.kind)
        self._warmup_type()
        in_samples = self._steps("warmup_num_steps", _WARM_WAYS, 1000)
        if self.type != "WarmupLR":
            in_samples |= self._steps("total_num_steps", _DECAY_WAYS, None)
        elif laying.given(_MIN) and laying.values[_MIN] != lr:
            laying.problems.append(
                f"{self.kind} stays at its peak: {laying.flag(_MIN)} is never reached; keep one"
            )
        return in_samples

    def _peaks(self) -> float | None:
        """warmup_min_lr to warmup_max_lr; the peak of the optimizer is the same, or two own the rate."""
        laying = self.laying
        optimizer = laying.said.get(_OPTIMIZER_LR)
        peak = self.params.get("warmup_max_lr")
        low = self.params.get("warmup_min_lr")
        if low is not None and not low.is_auto:
            start = _read(laying, low, real)
            if start is not None:
                laying.give(_INIT, start, low)
        key = peak if peak is not None else optimizer
        if key is None:
            return self._default_peak()
        if key.is_auto:
            laying.from_flags(key, [_LR])
            return None
        lr = _read(laying, key, real)
        if lr is None:
            return None
        for other, words in self._other_rates(key, optimizer):
            if other != lr:
                times = f"{lr / other:.4g} x " if other else ""
                laying.problems.append(
                    f"{key} is the learning rate itself from the end of the warm-up on, "
                    f"{times}{words}: two "
                    'values for one peak; write "warmup_max_lr": "auto" to take --lr'
                )
                return None
        laying.give(_LR, lr, key)
        _check_peak(laying, key, lr)
        return lr

    def _other_rates(self, key: SaidKey, optimizer: SaidKey | None) -> list[tuple[float, str]]:
        """What else names a peak: the optimizer's lr and --lr."""
        found = []
        if optimizer is not None and optimizer is not key and not optimizer.is_auto:
            rate = _read(self.laying, optimizer, real)
            found += (
                [(rate, f"{optimizer.name} {rate:g} ({optimizer.place})")]
                if rate is not None
                else []
            )
        flag = self.laying.values[_LR]
        if self.laying.given(_LR) and isinstance(flag, float):
            found.append((flag, self.laying.flag(_LR)))
        return found

    def _default_peak(self) -> float | None:
        if not self.laying.given(_LR):
            self.laying.problems.append(
                f"{self.kind} has no warmup_max_lr, and there is no optimizer.params.lr and no "
                f"--lr; give one"
            )
        return None

    def _ratios(self) -> float | None:
        """Shares of the optimizer's lr, or of --lr."""
        laying = self.laying
        key = laying.said.get(_OPTIMIZER_LR)
        if key is not None and not key.is_auto:
            lr = _read(laying, key, real)
            if lr is not None:
                laying.give(_LR, lr, key)
                _check_peak(laying, key, lr)
        elif not laying.given(_LR):
            laying.problems.append(
                f"{self.kind} is a curve of shares, and there is no optimizer.params.lr and no "
                f"--lr; give one"
            )
        peak = laying.values[_LR]
        if not isinstance(peak, float):
            return None
        for name, field, default in (
            ("warmup_min_ratio", _INIT, 0.0),
            ("cos_min_ratio", _MIN, 1e-4),
        ):
            share = self.params.get(name)
            if share is not None and share.is_auto:
                laying.from_flags(share, [field])
                continue
            number = default if share is None else _read(laying, share, real)
            if number is not None:
                laying.give(field, number * peak, share or self.kind)
        return peak

    def _warmup_type(self) -> None:
        """Linear is what there is; DeepSpeed's own default is a logarithm's."""
        key = self.params.get("warmup_type")
        if key is None:
            self.laying.notices.append(
                f"{self.kind} without warmup_type: the warm-up is linear; DeepSpeed's default, "
                f"log, is steeper "
                'at first, from the same start to the same peak; write "warmup_type": "linear"'
            )
        elif key.value != "linear":
            self.laying.problems.append(f'{key}: only "linear" is built; write it')

    def _steps(self, name: str, ways: tuple[str, ...], default: int | None) -> dict[str, int]:
        """A number of steps, in the unit of the run's length."""
        laying = self.laying
        key = self.params.get(name)
        flags = [way for way in ways if laying.given(way)]
        if key is None and default is None or key is not None and key.is_auto:
            length = ways is _DECAY_WAYS and any(
                laying.given(f"train.train_{unit}") for unit in ("iters", "samples")
            )
            if not flags and not length:
                laying.problems.append(
                    f"{key or self.kind} takes {name} from the flags, and there is no "
                    f"--{ways[0].removeprefix(_RATE).replace('_', '-')}; give it, or the number "
                    f"in the file"
                )
            return {}
        steps = default if key is None else _read(laying, key, positive)
        if steps is None:
            return {}
        said = key or SaidKey(f"scheduler.params.{name}", steps, self.kind.place)
        in_samples = laying.given("train.train_samples")
        allowed = ways[1] if in_samples else ways[0]
        for way in flags:
            if way != allowed or in_samples:
                laying.problems.append(f"{said} contradicts {laying.flag(way)}; keep one")
                return {}
        if in_samples:
            return {ways[1]: steps}
        laying.give(ways[0], steps, said)
        return {}


def _read(laying: Laying, key: SaidKey, read: Callable[[object], _Number]) -> _Number | None:
    """The value; None, and a problem, where it is none."""
    try:
        return read(key.value)
    except ValueError as error:
        laying.problems.append(f"{key.place}: {key.name} {error}")
        return None


def _check_peak(laying: Laying, key: SaidKey, lr: float) -> None:
    """A peak that no Adam survives was meant as something else."""
    if lr >= _PEAK_OF_ADAM and str(laying.values["optim.optimizer"]) != "sgd":
        std = laying.values["model.init_method_std"]
        laying.problems.append(
            f"{key} would be the learning rate itself: Adam moves each weight by about so much in "
            f"a step, and "
            f"weights begin with a standard deviation of {std:g}; it is no factor of another "
            f"rate: write the rate"
        )
