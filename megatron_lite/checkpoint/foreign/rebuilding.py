"""The few functions of a pickle that are understood: what each call of them stands for, from its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_lite.checkpoint.foreign.records import (
    DTYPES_NAMED,
    STORAGES_NAMED,
    Named,
    Record,
    Storage,
    UnreadTensor,
)

_LARGEST = 1 << 50  # elements


def storage_of(persistent: Any) -> Storage:
    """The storage that torch names from outside of a pickle: (storage, class, key, device, numel)."""
    if not isinstance(persistent, tuple) or len(persistent) < 5 or persistent[0] != "storage":
        raise ValueError("something is named from outside that is no storage of a tensor")
    _, kind, key, _, numel = persistent[:5]
    if not isinstance(kind, Named) or kind.name not in STORAGES_NAMED:
        raise ValueError(f"a storage of the kind {getattr(kind, 'name', '?')[:60]} is not known")
    if len(persistent) > 5 and persistent[5] is not None:
        raise ValueError("a storage that is a view of another one")
    return Storage(_text(key), STORAGES_NAMED[kind.name], _whole(numel))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("the key of a storage is no text")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError(f"{str(value)[:20]} is no number of elements")
    return value


def _wholes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or len(values) > 32:
        raise ValueError("the sizes of a tensor are no short list")
    return tuple(map(_whole, values))


def _tensor(args: tuple[Any, ...], dtype: torch.dtype | None = None) -> UnreadTensor:
    storage, offset, shape, stride = args[:4]
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    return UnreadTensor(
        storage, dtype or storage.dtype, _whole(offset), _wholes(shape), _wholes(stride)
    )


def _tensor_of_bytes(args: tuple[Any, ...]) -> UnreadTensor:
    """The third form says its format itself."""
    dtype = args[6] if len(args) > 6 else None
    if not isinstance(dtype, Named) or dtype.name not in DTYPES_NAMED:
        raise ValueError("a tensor of a number format that is not known")
    return _tensor(args, DTYPES_NAMED[dtype.name])


def _first(args: tuple[Any, ...]) -> Any:
    """A parameter is the tensor that it holds."""
    return args[0]


def _of_type(args: tuple[Any, ...]) -> Any:
    """A tensor with attributes or of a subclass: (function, type, its arguments, attributes)."""
    function, _, inner, *_ = args
    known = REBUILT.get(function.name) if isinstance(function, Named) else None
    if known is None or known is _of_type or not isinstance(inner, tuple):
        return Record("torch._tensor._rebuild_from_type_v2", args)
    return known(inner)


def _size(args: tuple[Any, ...]) -> tuple[int, ...]:
    return _wholes(args[0]) if args else ()


def _dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    if args and not (isinstance(args[0], list) and not args[0]):
        raise ValueError("an OrderedDict that is made of its pairs at once")
    return {}


def _encoded(args: tuple[Any, ...]) -> bytes:
    """How protocol 2 writes bytes."""
    text, encoding = args
    if encoding != "latin1" or not isinstance(text, str):
        raise ValueError("bytes that are not written as latin1")
    return text.encode("latin-1")


def _no_bytes(args: tuple[Any, ...]) -> bytes:
    if args:
        raise ValueError("bytes that are made of something")
    return b""


REBUILT: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _dict,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_bytes,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "_codecs.encode": _encoded,
    "__builtin__.bytes": _no_bytes,
    "builtins.bytes": _no_bytes,
}
"""Name of a function or class -> what a call of it stands for; all others become a Record."""
