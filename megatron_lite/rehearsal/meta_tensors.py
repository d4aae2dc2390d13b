"""Runs ops on the meta device, counting bytes; inferred shapes are cached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lite.rehearsal.footprint import Footprint

_NUMBER = torch.ops.aten._local_scalar_dense.default
_COPY = torch.ops.aten._to_copy.default


_Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and number format of a tensor."""


@dataclass(frozen=True, slots=True)
class _Made:
    """What an operation makes of inputs of one form: shape, strides and type of each result.

    in_place: it gives its first input back.
    """

    results: tuple[_Form | None, ...] = ()
    several: bool = False
    in_place: bool = False

    def again(self, first: Any) -> Any:
        """The same results, new."""
        if self.in_place:
            return first
        tensors = tuple(
            None if form is None
            else torch.empty_strided(form[0], form[1], dtype=form[2], device="meta")
            for form in self.results
        )  # fmt: skip
        return tensors if self.several else tensors[0]


Forms = dict[tuple[Any, ...], _Made | None]
"""What is known of operations by the form of their inputs; None: carry it out."""


class MetaTensorMode(Footprint):
    """While active, counts tensors on the meta device, which have shapes and no memory.

    forms: what was learnt so far, to be shared by those that come one after the other.

    A number that is read from one is 1, as the optimizer's step is; what is copied to the host is 0:
    the measured loss is finite, nothing overflowed, nobody votes to stop.
    Deriving the shapes of an elementwise operation takes torch 0.3 ms; a step repeats the same few
    hundred forms a hundred thousand times, so each form is derived once.
    """

    def __init__(self, forms: Forms) -> None:
        super().__init__("meta")
        self.static = self.most_kept = 0
        self._known = forms

    def step_begins(self) -> None:
        """What is alive now is static; the peak starts again from it."""
        self.static = self.peak = self.now
        self.most_kept = self.allocations = 0

    def between_actions(self) -> None:
        """What is alive now and not static is kept for later actions."""
        self.most_kept = max(self.most_kept, self.now - self.static)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Carry the operation out, or recall what it makes of such inputs."""
        if func is _NUMBER and args[0].is_meta:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is _COPY and args[0].is_meta and kwargs and _is_cpu(kwargs.get("device")):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        key = _key(func, args, kwargs)
        if key is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if key in self._known:
            made = self._known[key]
            if made is not None:
                result = made.again(args[0])
                self.see_all(result)
                return result
            return super().__torch_dispatch__(func, types, args, kwargs)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._known[key] = _learn(func, args, result)
        return result


def _is_cpu(device: torch.device | None) -> bool:
    return device is not None and device.type == "cpu"


_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout,
          torch.memory_format)  # fmt: skip


def _key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """The form of a call: what its results depend on; None where that is not known."""
    if not args or not isinstance(args[0], Tensor):
        return None
    key: list[Any] = [func]
    for arg in args if not kwargs else (*args, *kwargs, *kwargs.values()):
        if isinstance(arg, Tensor):
            if not arg.is_meta:
                return None
            key += (arg.dtype, arg.shape, arg.stride())
        elif isinstance(arg, _PLAIN):
            key += (type(arg), arg)  # 1, 1.0 and True are equal but give other types
        elif isinstance(arg, list) and all(type(n) in (int, bool) for n in arg):
            key.append(tuple(arg))
        else:
            return None
    return tuple(key)


def _learn(func: Any, args: tuple[Any, ...], result: Any) -> _Made | None:
    """What may be recalled of a call: nothing of a view, whose result shares its input's memory."""
    schema = func._schema
    if result is args[0]:
        unchanged = torch.Tag.inplace_view not in func.tags
        return _Made(in_place=True) if unchanged else None
    several = isinstance(result, tuple)
    results = result if several else (result,)
    if schema.is_mutable or not all(r is None or isinstance(r, Tensor) for r in results):
        return None
    inputs = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
    forms: list[_Form | None] = []
    for tensor in results:
        if tensor is None:
            forms.append(None)
            continue
        form = tuple(tensor.shape), tensor.stride(), tensor.dtype
        storage = tensor.untyped_storage()
        like = torch.empty_strided(form[0], form[1], dtype=form[2], device="meta")
        same = like.untyped_storage().nbytes() == storage.nbytes()
        if not tensor.is_meta or storage._cdata in inputs or tensor.storage_offset() or not same:
            return None
        forms.append(form)
    return _Made(tuple(forms), several)
