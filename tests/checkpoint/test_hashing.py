"""Content hashes: the kinds are what they say, however the stream is cut."""

import hashlib

import pytest

from megatron_lite.checkpoint.hashing import BLOCKS, HASH_KINDS, Hasher

BLOCK = HASH_KINDS[BLOCKS]
assert BLOCK is not None


def of(data: bytes, cut: int, kind: str) -> str:
    with Hasher(kind) as hashed:
        for start in range(0, len(data), cut):
            hashed.update(memoryview(data)[start : start + cut])
        return hashed.hexdigest()


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 7 * BLOCK + 5])
def test_the_hash_of_blocks_does_not_depend_on_how_the_stream_is_cut(size: int) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    data = data[:size]
    digests = [
        hashlib.sha256(data[start : start + BLOCK]).digest() for start in range(0, size, BLOCK)
    ]
    expected = hashlib.sha256(b"".join(digests)).hexdigest()
    for cut in (3 << 20, BLOCK, 40 << 20):
        assert of(data, cut, BLOCKS) == expected


def test_the_hash_of_old_manifests_is_sha256_itself() -> None:
    data = b"weights" * 1000
    assert of(data, 999, "sha256") == hashlib.sha256(data).hexdigest()
