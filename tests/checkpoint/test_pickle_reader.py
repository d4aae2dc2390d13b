"""Pickles read without being run: equal to Python's own where they are plain, inert or refused where not."""

from __future__ import annotations

import argparse
import enum
import os
import pickle
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.checkpoint.foreign.pickle_reader import Bounds, PickleError, read_pickle
from megatron_lite.checkpoint.foreign.records import Named, Record
from megatron_lite.checkpoint.foreign.torch_file import open_torch_file
from megatron_lite.config.errors import CheckpointError
from tests.support.mutations import mutations

_KEYS = st.none() | st.booleans() | st.integers(1 - 2**60, 2**60 - 1) | st.text() | st.binary()
_PLAIN = st.recursive(
    _KEYS | st.integers() | st.floats(allow_nan=False),
    lambda inside: st.lists(inside) | st.lists(inside).map(tuple) | st.dictionaries(_KEYS, inside),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(_PLAIN, st.integers(0, 5))
def test_what_is_plain_is_what_python_reads(value: Any, protocol: int) -> None:
    data = pickle.dumps([value, value], protocol)
    assert read_pickle(data).value == pickle.loads(data)
    assert read_pickle(b"ab" + data + b"cd", start=2).stop == len(data) + 2


class Kind(enum.Enum):
    """A class of somebody's."""

    ONE = 1


class Evil:
    """Runs a program when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("protocol", range(6))
def test_what_has_a_name_becomes_an_inert_record_of_it(tmp_path: Path, protocol: int) -> None:
    canary = tmp_path / "canary"
    data = pickle.dumps(
        {"bad": Evil(canary), "args": argparse.Namespace(layers=3), "kind": Kind.ONE,
         "dtype": torch.bfloat16, "size": torch.Size([2, 3]), "ordered": OrderedDict(a=1),
         "path": tmp_path, ("a", 1): {1, 2}},
        protocol,
    )  # fmt: skip
    found = read_pickle(data).value
    bad = found["bad"]
    assert isinstance(bad, Record) and bad.name in ("posix.system", "nt.system")
    assert bad.args == (f"touch {canary}",) and not canary.exists()
    args, kind = found["args"], found["kind"]
    assert args.values == {"layers": 3} and args.name in (
        "argparse.Namespace",
        "copy_reg._reconstructor",
    )
    assert kind.name.endswith("Kind") and kind.args == (1,)
    assert found["dtype"] == Named("torch.bfloat16") and found["size"] == (2, 3)
    assert found["ordered"] == {"a": 1}
    assert [key.args for key in found if isinstance(key, Record)] == [(("a", 1),)]
    pickle.loads(data)
    assert canary.exists()  # it does what it says where it is unpickled


# -- hostile ------------------------------------------------------------------------------------

HOSTILE = {
    "nested": b"(" * 3 + b"]" + b"\x85" * 500 + b".",
    "nested lists": b"]" * 500 + b"a" * 499 + b".",
    "a huge number": b"\x8b\xff\xff\xff\x7f" + b"1" * 5000 + b".",
    "long digits": b"L" + b"9" * 5000 + b"L\n.",
    "a length beyond the end": b"\x8e" + b"\xff" * 8 + b"abc.",
    "no mark": b"NNt.",
    "mark as value": b"(.",
    "empty": b"",
    "nothing on the stack": b".",
    "two values": b"NN.",
    "unknown opcode": b"\xff.",
    "unknown memory": b"h\x05.",
    "a number is called": b"K\x01)R.",
    "called with no tuple": b"cos\nsystem\nK\x01R.",
    "buffers outside": b"\x97.",
    "a storage that is none": b"K\x01Q.",
    "no dict": b"NK\x01K\x02s.",
    "a name that is no text": b"NN\x93.",
    "text that is no utf-8": b"X\x02\x00\x00\x00\xff\xfe.",
    "a line without end": b"I123",
    "a list as its own text": b"]h\x00.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_pickle_is_refused_and_nothing_else_happens(name: str) -> None:
    with pytest.raises(PickleError):
        read_pickle(HOSTILE[name])


def test_shared_values_are_not_copied_and_keys_that_hash_slowly_are_records() -> None:
    """Each of 80 tuples holds the one before twice: 2**80 values for who walks through all of them."""
    data = b"N" + b"2\x86" * 80
    start = time.monotonic()
    assert isinstance(read_pickle(data + b".").value, tuple)
    found = read_pickle(b"}" + data + b"Ns.").value
    assert isinstance(next(iter(found)), Record) and time.monotonic() - start < 5


def test_a_list_inside_itself_is_read() -> None:
    inside: list[Any] = []
    inside.append(inside)
    found = read_pickle(pickle.dumps(inside)).value
    assert found[0] is found


def test_more_opcodes_than_the_bound_are_refused() -> None:
    data = pickle.dumps(list(range(1000)))
    with pytest.raises(PickleError, match="more than 500 opcodes"):
        read_pickle(data, bounds=Bounds(steps=500))
    assert read_pickle(data).value == list(range(1000))


OBJECT = {
    "model": OrderedDict(
        a=torch.arange(12.0).view(3, 4).t(), b=torch.ones(3, dtype=torch.bfloat16)
    ),
    "args": argparse.Namespace(kind=Kind.ONE, sizes=[1, 2, (3, 4.5)], dtype=torch.float16),
    "odd": {1, 2, 3},
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_mutated_pickles_are_read_or_refused_and_never_hang(protocol: int) -> None:
    plain = pickle.dumps({**OBJECT, "model": [1.5, "x" * 20, b"y"]}, protocol)
    start, refused = time.monotonic(), 0
    for data in mutations(plain, 1500, protocol):
        try:
            read_pickle(data)
        except PickleError:
            refused += 1
    assert 300 < refused < 1500 and time.monotonic() - start < 60


# -- files of torch.save ------------------------------------------------------------------------


def tensors_of(value: Any) -> list[Any]:
    model = value.get("model") if isinstance(value, dict) else None
    return [*model.values()] if isinstance(model, dict) else []


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_a_file_are_those_that_were_saved(tmp_path: Path, zipped: bool) -> None:
    whole = torch.arange(24.0)
    saved = {
        "a": whole.view(4, 6).t(), "b": whole[5:9], "c": torch.tensor(3, dtype=torch.int64),
        "d": torch.ones(0), "e": torch.nn.Parameter(torch.randn(3, 2).bfloat16()),
        "f": torch.randn(7).half(), "g": torch.tensor([True, False]), "h": whole.double()[::3],
    }  # fmt: skip
    saved["e"].sequence_parallel = True  # attributes change how it is pickled
    torch.save({"model": saved}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    file = open_torch_file(tmp_path / "x.pt")
    found = {name: file.read(tensor) for name, tensor in file.value["model"].items()}
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert found[name].is_contiguous()
    assert file.value["model"]["a"].storage == file.value["model"]["b"].storage


def test_a_file_of_the_other_byte_order_is_turned(tmp_path: Path) -> None:
    import sys
    from unittest import mock

    values = torch.randn(5).bfloat16()
    turned = values.view(torch.int16).numpy().byteswap()
    with mock.patch.object(sys, "byteorder", "big"):
        torch.save(
            {"model": {"a": torch.from_numpy(turned).view(torch.bfloat16)}}, tmp_path / "x.pt"
        )
    file = open_torch_file(tmp_path / "x.pt")
    assert file.swapped and torch.equal(file.read(file.value["model"]["a"]), values)


@pytest.mark.parametrize("zipped", [True, False])
def test_mutated_files_are_read_or_refused(tmp_path: Path, zipped: bool) -> None:
    torch.save(OBJECT, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    data, path = (tmp_path / "x.pt").read_bytes(), tmp_path / "y.pt"
    start, refused = time.monotonic(), 0
    for changed in mutations(data, 400, int(zipped)):
        path.write_bytes(changed)
        try:
            file = open_torch_file(path)
            for tensor in tensors_of(file.value):
                if hasattr(tensor, "storage"):
                    file.read(tensor)
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100 and time.monotonic() - start < 60


def test_a_flipped_bit_of_the_numbers_is_found(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1000)}}, path := tmp_path / "x.pt")
    data = bytearray(path.read_bytes())
    data[data.index(bytes(2000)) + 1000] ^= 1
    path.write_bytes(data)
    file = open_torch_file(path)
    with pytest.raises(CheckpointError, match="CRC-32"):
        file.read(file.value["model"]["a"])


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    """Expanded views are a few bytes in a file and would fill the memory."""
    torch.save({"model": {"a": torch.zeros(1).expand(1 << 40)}}, path := tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not inside its storage"):
        open_torch_file(path)
