"""Random numbers as a function of global coordinates: no state, the same in every layout.

A weight's element (i, j) depends on (seed, canonical name, i, j); a dropout mask on (seed, step,
layer, site, sample, token, feature).  A rank computes just its slice, a recomputed layer the same
mask again, and a checkpoint has nothing to remember.  The mixers are SplitMix64 (Steele et al.
2014) for keys and weights, and MurmurHash3's 32-bit finaliser for masks.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_CHUNK = 1 << 22  # elements made at a time: bounds the int64 scratch of large tables


def _signed(value: int, bits: int = 64) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
_MURMUR_1 = _signed(0x85EBCA6B, 32)
_MURMUR_2 = _signed(0xC2B2AE35, 32)


def key(*parts: int | str) -> int:
    """A signed 64-bit key of any coordinates."""
    text = "\x1f".join(str(part) for part in parts).encode()
    return _signed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))


def uniform(*parts: int | str) -> float:
    """A number in [0, 1) of any coordinates, on the host."""
    return ((key(*parts) & _MASK64) >> 11) * 2.0**-53


def _mix64(z: Tensor) -> Tensor:
    """SplitMix64's output function, in place on int64 (wrapping)."""
    z ^= (z >> 30) & ((1 << 34) - 1)
    z *= _MIX_1
    z ^= (z >> 27) & ((1 << 37) - 1)
    z *= _MIX_2
    z ^= (z >> 31) & ((1 << 33) - 1)
    return z


def normal(
    out: Tensor, seed_key: int, *, std: float, offset: tuple[int, ...], columns: int
) -> Tensor:
    """Fill out (1-D or 2-D) with N(0, std) drawn at its global coordinates; returns out.

    offset: global index of out's first element in each dim; columns: the global width, so that a
    row or column slice gets exactly the numbers the whole tensor would.
    Box-Muller in float64: a last-bit difference between vector and scalar code is rounded away.
    """
    if not out.numel():  # a rank whose rows of the vocabulary are all padding
        return out
    flat = out.view(out.shape[0], -1) if out.dim() > 1 else out.view(1, -1)
    top, left = offset if out.dim() > 1 else (0, offset[0])
    column = torch.arange(left, left + flat.shape[1], device=out.device, dtype=torch.int64)
    step = max(1, _CHUNK // max(flat.shape[1], 1))
    for start in range(0, flat.shape[0], step):
        stop = min(start + step, flat.shape[0])
        row = torch.arange(top + start, top + stop, device=out.device, dtype=torch.int64)
        bits = _mix64((row[:, None] * columns + column + 1) * _GOLDEN + seed_key)
        # 31 and 32 bits of one word: u in (0, 1), v in [0, 1)
        u = (((bits >> 33) & 0x7FFFFFFF).double() + 0.5) * 2.0**-31
        v = (bits & 0xFFFFFFFF).double() * 2.0**-32
        flat[start:stop] = u.log_().mul_(-2.0).sqrt_().mul_(v.mul_(2.0 * math.pi).cos_()).mul_(std)
    return out


def some_of(size: int, count: int, seed_key: int) -> Tensor:
    """int64 [count]: so many different numbers below size, ascending; on the host."""
    bits = _mix64((torch.arange(size, dtype=torch.int64) + 1) * _GOLDEN + seed_key)
    found: Tensor = bits.argsort(stable=True)[:count].sort().values
    return found


def _murmur32(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser, in place on int32, but for its last shift (masks read the high bits)."""
    x ^= (x >> 16) & 0xFFFF
    x *= _MURMUR_1
    x ^= (x >> 13) & 0x7FFFF
    x *= _MURMUR_2
    return x


def _threshold(rate: float) -> int:
    return min(max(int(rate * 2**32), 0), 2**32 - 1) - 2**31


def feature_bits(features: Tensor) -> Tensor:
    """int32 [h]: the bits that features, int64 [h] by their global number, bring to a mask."""
    # the odd constant is 2**32 / golden ratio: neighbouring features land far apart
    return _murmur32((features * 0x9E3779B1 & 0x7FFFFFFF).to(torch.int32))


def keep_mask(seed_key: Tensor, tokens: Tensor, features: Tensor, rate: float) -> Tensor:
    """bool [*tokens, h]: True with probability 1 - rate.

    seed_key: int64 scalar, a key() on the tokens' device: as a number of Python's it would be a
    constant of a compiled graph, and every step another.
    tokens: int64 of any shape, one number per token (see token_numbers); features: int32 [h] of
    feature_bits.
    """
    token_bits = (_mix64(tokens * _GOLDEN + seed_key) >> 32).to(torch.int32)
    return _murmur32(token_bits[..., None] ^ features) >= _threshold(rate)


def signed_uniform(seed_key: Tensor, tokens: Tensor, features: Tensor) -> Tensor:
    """fp32 [*tokens, h], uniform in [-1, 1]; the arguments are those of keep_mask."""
    token_bits = (_mix64(tokens * _GOLDEN + seed_key) >> 32).to(torch.int32)
    return _murmur32(token_bits[..., None] ^ features).float() * 2.0**-31


def exponential(seed_key: Tensor, tokens: Tensor, features: Tensor) -> Tensor:
    """fp32 [*tokens, h], exponentially distributed with mean 1; the arguments are those of keep_mask.

    The small ones, which win a race, are told apart down to 2^-31.
    """
    token_bits = (_mix64(tokens * _GOLDEN + seed_key) >> 32).to(torch.int32)
    bits = _murmur32(token_bits[..., None] ^ features)
    bits ^= (bits >> 16) & 0xFFFF  # its last shift: here the low bits count, too
    bits &= 0x7FFFFFFF
    return bits.float().add_(0.5).mul_(-(2.0**-31)).log1p_().neg_()


def token_numbers(samples: Tensor, positions: Tensor) -> Tensor:
    """int64 [s, b]: one number per token from samples [b] and positions [s] (or [s, b]).

    2**24 positions per sample: longer sequences would share masks between samples.
    """
    if positions.dim() == 1:
        positions = positions[:, None]
    return samples[None, :] * (1 << 24) + positions
