"""Headers of flat token files, and the signs that a file is not one.

Most flat files have no header; llm.c's (and whoever took its format over) have 256 int32, numpy's
have a few words.  Taken for tokens a header is a short document of noise in front of the first.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_lite.config.errors import DataError
from megatron_lite.data.preparing.streams import FOREIGN, PACKINGS

LLM_C_BYTES = 1024
LLM_C = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
"""First number of llm.c's token files -> version and dtype (GPT-2's ids, Llama 3's)."""
LLM_C_OTHERS = {
    20240522: "an evaluation",
    20240326: "a model",
    20240803: "a model",
    20240527: "a state",
}
PICKLES = (b"\x80\x04\x95", b"\x80\x05\x95", b"\x80\x02\x8a\x0a", b"\x80\x02}q", b"\x80\x02]q")
LONGEST_HEADER = 1 << 14  # bytes looked at
SHORTEST_TEXT = 64


class Header(NamedTuple):
    """Bytes before the tokens, and the tokens' own format."""

    name: str
    bytes: int
    dtype: np.dtype[Any]


def header_of(path: str | os.PathLike[str]) -> Header | None:
    """None where the file begins with its tokens; DataError for a file of another kind."""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        begin = file.read(LONGEST_HEADER)
    found = _llm_c(path, begin, size) or _numpy(path, begin, size)
    if found is None:
        _refuse_foreign(path, begin, size)
    return found


def _llm_c(path: str | os.PathLike[str], begin: bytes, size: int) -> Header | None:
    if len(begin) < 12:
        return None
    magic, version, count = struct.unpack_from("<iii", begin)
    if magic in LLM_C_OTHERS and version < 1000:
        raise DataError(
            f"{path} is {LLM_C_OTHERS[magic]} file of llm.c, no tokens - give its tokens"
        )
    # what follows the three numbers are zeros, which no tokens are
    if magic not in LLM_C or any(begin[12:LLM_C_BYTES]):
        return None
    wanted, name = LLM_C[magic]
    dtype = np.dtype(name).newbyteorder("<")
    if version != wanted:
        raise DataError(
            f"{path} has llm.c's header of version {version}, read is version {wanted} - write it anew"
        )
    if size != LLM_C_BYTES + count * dtype.itemsize:
        raise DataError(
            f"{path}: llm.c's header says {count} tokens of {name}, which with it are "
            f"{LLM_C_BYTES + count * dtype.itemsize} bytes, but the file has {size} - it is cut off"
        )
    return Header("llm.c's header", LLM_C_BYTES, dtype)


def _numpy(path: str | os.PathLike[str], begin: bytes, size: int) -> Header | None:
    if not begin.startswith(b"\x93NUMPY"):
        return None
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is a damaged .npy file: {error} - copy it again") from error
    if array.ndim != 1 or array.dtype.str not in ("<u2", "<u4", "<i4"):
        raise DataError(
            f"{path} is a numpy array of {array.dtype} with the shape {list(array.shape)}, tokens are one "
            "row of uint16, uint32 or int32 - write it as such"
        )
    return Header("numpy's header", size - array.nbytes, array.dtype)


def _refuse_foreign(path: str | os.PathLike[str], begin: bytes, size: int) -> None:
    """Two bytes are one token that may well be there: what is told has at least three."""
    names = [
        *((offset, magic, what) for offset, magic, what, _ in FOREIGN),
        *((0, magic, f"a {packing.name} file") for packing in PACKINGS for magic in packing.magic),
        (0, b"\x1f\x8b\x08", "a gzip file"),
        (0, b"PAR1", "a Parquet file"),
        (0, b"GGUF", "a GGUF model"),
        *((0, magic, "a pickle, which is never opened") for magic in PICKLES),
    ]
    for offset, magic, what in names:
        if len(magic) > 2 and begin[offset:].startswith(magic):
            raise DataError(
                f"{path} is {what}, no flat row of tokens - give the file of tokens itself"
            )
    if begin[8:10] == b'{"' and struct.unpack_from("<q", begin)[0] < size:
        raise DataError(f"{path} is a safetensors file, no flat row of tokens")
    if len(begin) >= SHORTEST_TEXT and _is_text(begin):
        raise DataError(
            f"{path} is text, no flat row of tokens - tools/preprocess_data.py makes tokens of text"
        )


def _is_text(begin: bytes) -> bool:
    try:  # a character may be cut at the end
        text = begin[:-3].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\n\r\t" for character in text)
