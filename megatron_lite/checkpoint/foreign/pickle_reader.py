"""Reads a pickle without running it: opcodes become plain values, and what has a name a record of it.

    numbers, texts, bytes, lists, tuples, dicts    themselves
    torch.Size, OrderedDict                        tuple, dict
    tensors                                        UnreadTensor: where its numbers lie
    any other class or function                    Record: its name, what it would be called with

Nothing is imported, nothing is called, no attribute is set.  Opcodes: PEP 307, PEP 3154 and the
comments of CPython's pickletools; protocols 0 to 5.  Work is linear in the bytes of the file: a value
holds no copies of others, keys of dicts hash in constant time, and Bounds say how much there may be.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_lite.checkpoint.foreign.rebuilding import REBUILT, storage_of
from megatron_lite.checkpoint.foreign.records import Named, Record

_STOP = ord(".")
_CONTAINERS = (list, dict, tuple, Record)
_PLAIN_KEYS = (str, bytes, int, bool, type(None), Record)


class PickleError(ValueError):
    """These bytes are no pickle that can be read here; says where and why."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much a pickle may ask for: opcodes, values inside one another, bytes of a number."""

    steps: int = 1 << 24
    depth: int = 100
    number: int = 1 << 10


class Pickled(NamedTuple):
    """The value of a pickle, and where the bytes after it begin."""

    value: Any
    stop: int


class _Mark:
    """Where a group of values begins on the stack."""


_MARK = _Mark()


def read_pickle(data: bytes, *, start: int = 0, bounds: Bounds = Bounds()) -> Pickled:
    """The value of one pickle from a byte on.

    Raises PickleError, and no other, for bytes that are none, or that ask for more than the bounds.
    """
    reader = _Reader(data, start, bounds)
    try:
        value = reader.run()
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        said = str(error)[:120] or type(error).__name__
        raise PickleError(f"byte {reader.at}: no pickle that can be read ({said})") from None
    return Pickled(value, reader.at)


class _Reader:
    """One pickle on its way through its opcodes."""

    def __init__(self, data: bytes, start: int, bounds: Bounds) -> None:
        self.data, self.at, self.bounds = data, start, bounds
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.depths: dict[int, int] = {}  # by id: of the containers that were made

    def run(self) -> Any:
        """Up to the opcode that ends it."""
        for _ in range(self.bounds.steps):
            code = self.take(1)[0]
            if code == _STOP:
                value = self.pop()
                if self.stack:
                    raise PickleError(f"byte {self.at}: {len(self.stack)} values are left over")
                return value
            step = OPCODES.get(code)
            if step is None:
                raise PickleError(f"byte {self.at - 1}: no opcode {code:#04x}")
            step(self)
        raise PickleError(f"more than {self.bounds.steps} opcodes: too large to be read")

    # -- bytes ----------------------------------------------------------------------------------

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count < 0 or self.at + count > len(self.data):
            raise PickleError(f"byte {self.at}: the file ends where {count} more bytes should be")
        found = self.data[self.at : self.at + count]
        self.at += count
        return found

    def line(self, encoding: str = "utf-8") -> str:
        """Up to the end of the line."""
        stop = self.data.find(b"\n", self.at)
        if stop < 0:
            raise PickleError(f"byte {self.at}: a line without an end")
        found = self.data[self.at : stop]
        self.at = stop + 1
        return found.decode(encoding)

    def unsigned(self, width: int) -> int:
        """A little-endian number of so many bytes."""
        return int.from_bytes(self.take(width), "little")

    # -- the stack ------------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        """Put a value on top."""
        self.stack.append(value)

    def pop(self) -> Any:
        """The value on top, which no mark may be."""
        value = self.stack.pop()
        if value is _MARK:
            raise PickleError(f"byte {self.at}: a mark where a value should be")
        return value

    def group(self) -> list[Any]:
        """The values above the last mark, which goes with them."""
        stack = self.stack
        for place in range(len(stack) - 1, -1, -1):
            if stack[place] is _MARK:
                found = stack[place + 1 :]
                del stack[place:]
                return found
        raise PickleError(f"byte {self.at}: no mark below these values")

    def top(self, kind: type) -> Any:
        """The value on top, left there, of a type."""
        if not isinstance(self.stack[-1], kind):
            raise PickleError(f"byte {self.at}: no {kind.__name__} to be filled")
        return self.stack[-1]

    # -- containers -----------------------------------------------------------------------------

    def hold(self, container: Any, inside: list[Any] | tuple[Any, ...]) -> Any:
        """Note what a container came to hold; returns it."""
        depths = [self.depths.get(id(one), 0) for one in inside if isinstance(one, _CONTAINERS)]
        deepest = max(depths, default=0) + 1
        if deepest > self.bounds.depth:
            raise PickleError(f"byte {self.at}: values lie {deepest} deep inside one another")
        self.depths[id(container)] = max(deepest, self.depths.get(id(container), 0))
        return container

    def made(self, container: Any, inside: list[Any] | tuple[Any, ...] = ()) -> None:
        """Push a new container."""
        self.depths.pop(id(container), None)  # of one that is gone
        self.push(self.hold(container, inside))

    def fill_list(self, values: list[Any]) -> None:
        """Append to the list on top."""
        found = self.top(object)
        if isinstance(found, Record):
            found.state.append(values)
        else:
            self.top(list).extend(values)
        self.hold(found, values)

    def fill_dict(self, pairs: list[Any]) -> None:
        """Set keys and values, in turn, in the dict on top."""
        found = self.top(object)
        if len(pairs) % 2:
            raise PickleError(f"byte {self.at}: a key without its value")
        new = {self.key(key): value for key, value in zip(pairs[::2], pairs[1::2], strict=True)}
        if isinstance(found, Record):
            found.state.append(new)
        else:
            self.top(dict).update(new)
        self.hold(found, pairs)

    def key(self, key: Any) -> Any:
        """A key whose hash takes no time; of any other a record, which is equal to itself alone."""
        if isinstance(key, _PLAIN_KEYS) and not (type(key) is int and key.bit_length() > 60):
            return key
        return self.hold(Record("key", (key,)), (key,))

    def recall(self, number: int) -> None:
        """Push what was remembered under a number."""
        if number not in self.memo:
            raise PickleError(f"byte {self.at}: nothing was remembered as {number}")
        self.push(self.memo[number])

    # -- names ----------------------------------------------------------------------------------

    def call(self, function: Any, args: Any) -> None:
        """What would be called becomes what it stands for, or a record."""
        if not isinstance(args, tuple):
            raise PickleError(f"byte {self.at}: something is called with no tuple")
        if isinstance(function, Named):
            known = REBUILT.get(function.name)
            value = known(args) if known else Record(function.name, args)
        elif isinstance(function, Record):
            value = Record(f"{function.name}()", args)
        else:
            raise PickleError(f"byte {self.at}: a {type(function).__name__} is called")
        if isinstance(value, _CONTAINERS):
            self.made(value, args)
        else:
            self.push(value)

    def build(self) -> None:
        """What would be an object's state is put down; that of a plain value is left out."""
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state.append(state)
            self.hold(target, (state,))


# -- opcodes ------------------------------------------------------------------------------------

_Step = Callable[[_Reader], None]


def _number(text: str) -> int | bool:
    if text in ("00", "01"):  # protocol 0 writes truth so
        return text == "01"
    if len(text) > 1000:
        raise ValueError("a number of more than 1000 digits")
    return int(text.rstrip("L"), 10)


def _signed(reader: _Reader, width: int) -> int:
    if width > reader.bounds.number:
        raise PickleError(f"byte {reader.at}: a number of {width} bytes")
    return int.from_bytes(reader.take(width), "little", signed=True)


def _quoted(reader: _Reader) -> str:
    """The text of protocol 0 between its quotes; what is escaped in it is left as it is."""
    text = reader.line().strip()
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        raise PickleError(f"byte {reader.at}: a text without its quotes")
    return text[1:-1]


def _text(width: int) -> _Step:
    return lambda r: r.push(r.take(r.unsigned(width)).decode("utf-8", "surrogatepass"))


def _bytes(width: int) -> _Step:
    return lambda r: r.push(r.take(r.unsigned(width)))


def _old_text(width: int) -> _Step:
    return lambda r: r.push(r.take(r.unsigned(width)).decode("latin-1"))


def _value(value: Any) -> _Step:
    return lambda r: r.push(value)


def _get(width: int) -> _Step:
    return lambda r: r.recall(r.unsigned(width))


def _remember(reader: _Reader, number: int) -> None:
    value = reader.stack[-1]
    if value is _MARK:
        raise PickleError(f"byte {reader.at}: a mark is to be remembered")
    reader.memo[number] = value


def _put(width: int) -> _Step:
    return lambda r: _remember(r, r.unsigned(width))


def _tuple(count: int) -> _Step:
    def step(reader: _Reader) -> None:
        values = tuple(reader.pop() for _ in range(count))[::-1]
        reader.made(values, values)

    return step


def _group_tuple(reader: _Reader) -> None:
    values = tuple(reader.group())
    reader.made(values, values)


def _group_list(reader: _Reader) -> None:
    values = reader.group()
    reader.made(values, values)


def _group_dict(reader: _Reader) -> None:
    pairs = reader.group()
    reader.made({})
    reader.fill_dict(pairs)


def _append(reader: _Reader) -> None:
    value = reader.pop()
    reader.fill_list([value])


def _appends(reader: _Reader) -> None:
    values = reader.group()
    reader.fill_list(values)


def _set_item(reader: _Reader) -> None:
    value, key = reader.pop(), reader.pop()
    reader.fill_dict([key, value])


def _set_items(reader: _Reader) -> None:
    pairs = reader.group()
    reader.fill_dict(pairs)


def _pop(reader: _Reader) -> None:
    reader.stack.pop()


def _pop_group(reader: _Reader) -> None:
    reader.group()


def _skip(width: int) -> _Step:
    def step(reader: _Reader) -> None:
        reader.take(width)

    return step


def _duplicate(reader: _Reader) -> None:
    reader.push(reader.top(object))


def _set(reader: _Reader) -> None:
    reader.made(Record("builtins.set"))


def _frozen_set(reader: _Reader) -> None:
    values = tuple(reader.group())
    reader.made(Record("builtins.frozenset", values), values)


def _global(reader: _Reader) -> None:
    module = reader.line()
    reader.push(Named(f"{module}.{reader.line()}"))


def _stack_global(reader: _Reader) -> None:
    name, module = reader.pop(), reader.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise PickleError(f"byte {reader.at}: a name that is no text")
    reader.push(Named(f"{module}.{name}"))


def _instance(reader: _Reader) -> None:
    module = reader.line()
    name = Named(f"{module}.{reader.line()}")
    reader.call(name, tuple(reader.group()))


def _object(reader: _Reader) -> None:
    function, *args = reader.group()
    reader.call(function, tuple(args))


def _reduce(reader: _Reader) -> None:
    args, function = reader.pop(), reader.pop()
    reader.call(function, args)


def _new_object_with_names(reader: _Reader) -> None:
    named, args, function = reader.pop(), reader.pop(), reader.pop()
    if not isinstance(args, tuple):
        raise PickleError(f"byte {reader.at}: something is called with no tuple")
    reader.call(function, (*args, named) if named else args)


def _extension(width: int) -> _Step:
    return lambda r: r.push(Named(f"copyreg.extension_{r.unsigned(width)}"))


def _persistent(reader: _Reader) -> None:
    reader.push(storage_of(reader.pop()))


def _out_of_band(reader: _Reader) -> None:
    raise PickleError(f"byte {reader.at}: its buffers lie outside of it")


OPCODES: dict[int, _Step] = {
    ord(code): step
    for code, step in {
        "\x80": _skip(1), "\x95": _skip(8),  # protocol; length of a frame
        "(": _value(_MARK), "0": _pop, "1": _pop_group, "2": _duplicate,
        "N": _value(None), "\x88": _value(True), "\x89": _value(False),
        "I": lambda r: r.push(_number(r.line())), "L": lambda r: r.push(_number(r.line())),
        "J": lambda r: r.push(_signed(r, 4)), "K": lambda r: r.push(r.unsigned(1)),
        "M": lambda r: r.push(r.unsigned(2)),
        "\x8a": lambda r: r.push(_signed(r, r.unsigned(1))),
        "\x8b": lambda r: r.push(_signed(r, r.unsigned(4))),
        "F": lambda r: r.push(float(r.line()[:1000])),
        "G": lambda r: r.push(struct.unpack(">d", r.take(8))[0]),
        "S": lambda r: r.push(_quoted(r)), "V": lambda r: r.push(r.line("raw_unicode_escape")),
        "T": _old_text(4), "U": _old_text(1),
        "X": _text(4), "\x8c": _text(1), "\x8d": _text(8),
        "B": _bytes(4), "C": _bytes(1), "\x8e": _bytes(8), "\x96": _bytes(8),
        "\x97": _out_of_band, "\x98": _out_of_band,
        ")": lambda r: r.made(()), "t": _group_tuple, "\x85": _tuple(1), "\x86": _tuple(2),
        "\x87": _tuple(3),
        "]": lambda r: r.made([]), "l": _group_list, "a": _append, "e": _appends,
        "}": lambda r: r.made({}), "d": _group_dict, "s": _set_item, "u": _set_items,
        "\x8f": _set, "\x90": _appends, "\x91": _frozen_set,
        "g": lambda r: r.recall(_number(r.line())), "h": _get(1), "j": _get(4),
        "p": lambda r: _remember(r, _number(r.line())), "q": _put(1), "r": _put(4),
        "\x94": lambda r: _remember(r, len(r.memo)),
        "c": _global, "\x93": _stack_global, "i": _instance, "o": _object,
        "R": _reduce, "\x81": _reduce, "\x92": _new_object_with_names, "b": lambda r: r.build(),
        "\x82": _extension(1), "\x83": _extension(2), "\x84": _extension(4),
        "Q": _persistent, "P": lambda r: r.push(storage_of(r.line())),
    }.items()
}  # fmt: skip
"""What each opcode does."""
