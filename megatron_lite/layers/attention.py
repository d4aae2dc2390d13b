"""Multi-head and grouped-query self-attention with the heads split over tp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from megatron_lite.blueprint.figure.parts import Core, Matrix, Norm
from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.random import feature_bits, keep_mask, key, token_numbers
from megatron_lite.kernels.reference import rotate, split_rotate
from megatron_lite.kernels.segments import Segments
from megatron_lite.kernels.shifted import ShiftedGroups, shifted_sparse
from megatron_lite.kernels.table import PREFERENCES, Choice, Need, choose
from megatron_lite.kernels.vendor import sdpa_kernel
from megatron_lite.layers.contexts import ForwardContext, LayerCache, StageContext, StepDropout
from megatron_lite.layers.dropout import key_index
from megatron_lite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_lite.layers.norm import NormLayer
from megatron_lite.layers.recompute import recomputed_part


def attention_need(
    context: StageContext, *, training: bool, segments: bool = False, seen: bool = False
) -> Need:
    """What an attention kernel must cope with here; with dropout only while training."""
    model, precision = context.model, context.precision
    backend = "unfused" if not precision.masked_softmax_fusion else precision.attention_backend
    return replace(
        context.need(),
        dropout=model.attention_dropout if training else 0.0,
        layer_scaling=model.apply_query_key_layer_scaling,
        window=any(core.window for core in context.figure.layers[0].of(Core)),
        segments=segments, seen=seen, length=model.seq_length, head_size=model.head_size, backend=backend,
    )  # fmt: skip


def choose_attention(
    context: StageContext, *, training: bool, segments: bool = False, seen: bool = False
) -> Choice:
    """The attention kernel for this context."""
    model = context.model
    need = attention_need(context, training=training, segments=segments, seen=seen)
    choice = choose("attention", need, PREFERENCES[need.backend])
    if model.attention_softmax_in_fp32 or choice.implementation.name == "reference":
        return choice
    ignored = "--no-attention-softmax-in-fp32: its softmax is in fp32 in any case"
    return replace(choice, why=f"{choice.why} ({ignored})")


def attention_line(context: StageContext, micro_batch_size: int, *, segments: bool) -> str:
    """Which attention kernel training runs, and why: where torch chooses among its own, which of them."""
    choice = choose_attention(context, training=True, segments=segments)
    core = context.figure.layers[0].named("attention.core", Core)
    if core.group is not None:
        moved = f"in {core.heads - core.still} of {core.heads} heads moved by {core.group // 2}"
        told = f"training in groups of {core.group} tokens, {moved} (--s2-attention)"
        choice = replace(choice, why=f"{choice.why}; {told}")
    if choice.implementation.name != "torch-sdpa":
        return choice.why
    model, device, tp = context.model, context.ctx.device, context.tp.size
    features = (core.queries + 2 * core.keys) // tp
    fused = torch.empty(
        model.seq_length, micro_batch_size, features,
        dtype=context.dtype, device=device, requires_grad=True,
    )  # fmt: skip
    whole = torch.tensor([0, model.seq_length], dtype=torch.int32, device=device)
    call = AttentionCall(
        dropout=model.attention_dropout,
        segments=Segments(whole, model.seq_length, 1, model.seq_length) if segments else None,
        window=core.window,
    )
    q, k, v = split_rotate(fused, core.heads // tp, core.kv_heads // tp, None)
    return f"{choice.why} ({sdpa_kernel(q, k, v, call)})"


class SelfAttention(nn.Module):
    """Causal self-attention of block `layer`; n/tp query heads, m/tp key and value heads here.

    Heads are split over tp (arXiv:1909.08053 § 3); m < n is grouped-query attention
    (arXiv:2305.13245).  tp must divide n and m: config/ has checked that.
    """

    def __init__(self, context: StageContext, layer: int) -> None:
        super().__init__()
        parts = context.figure.layers[layer]
        self.context, self.layer = context, layer
        self.core = parts.named("attention.core", Core)
        self.heads = self.core.heads // context.tp.size
        self.kv_heads = self.core.kv_heads // context.tp.size
        self.qkv = ColumnParallelLinear(context, parts.named("attention.qkv", Matrix), layer)
        self.output = RowParallelLinear(context, parts.named("attention.output", Matrix), layer)
        norms = [part for part in parts.of(Norm) if part.heads]
        self.normed, rotated = bool(norms), self.core.rotated > 0
        self.split_rotate = context.choose("split_rotate", computes=rotated and not norms)
        if norms:  # they stand between splitting and turning, which are two kernels then
            self.q_norm, self.k_norm = (NormLayer(context, part) for part in norms)
            self.rotate_heads = context.choose("rotate_heads", computes=rotated)
        self.kernels = {
            (training, apart): choose_attention(context, training=training, segments=apart).run
            for training in (False, True)
            for apart in (False, True)
        }
        still = min(max(self.core.still - context.tp.rank * self.heads, 0), self.heads)
        self.groups = None if self.core.group is None else ShiftedGroups(self.core.group, still)
        self.ragged = choose_attention(context, training=False, seen=True).run

    def forward(self, x: Tensor, at: ForwardContext) -> Tensor:
        """x: [s/tp, b, h] with sequence parallelism, else [s, b, h] -> the same, without output.late_bias."""
        fused = self.qkv(x, at)  # [s, b, (n + 2m)d/tp]
        q, k, v = self._split(fused, at)  # [b, n/tp, s, d]
        run = self.kernels[at.dropout is not None, at.segments is not None]
        if self.groups is not None and at.training:
            run = partial(shifted_sparse, run, self.groups)
        seen = None
        if at.cache is not None:
            k, v, seen = self._remembered(at, at.cache, k, v)
            run = run if seen is None else self.ragged
        call = self._call(at, q.shape[2], k.shape[2], seen)
        y = recomputed_part(self.context.recompute, "core_attn", run, q, k, v, call)
        return self.output(y.permute(2, 0, 1, 3).flatten(2), at)

    def _split(self, fused: Tensor, at: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        """fused: [s, b, (n + 2m)d/tp] -> q [b, n/tp, s, d] and k, v [b, m/tp, s, d], normed and turned."""
        angles = self._angles(at, "angles", lambda: at.encoded)
        later = angles is not None and at.cache is not None and at.cache.unturned
        if not self.normed and not later:
            found: tuple[Tensor, Tensor, Tensor] = self.split_rotate(
                fused, self.heads, self.kv_heads, angles, self.core.interleaved
            )
            return found
        q, k, v = self.split_rotate(fused, self.heads, self.kv_heads, None)
        if self.normed:
            # in the order of memory, in which attention then leaves its output for the next product
            q, k = (
                norm(x.permute(2, 0, 1, 3)).permute(1, 2, 0, 3)
                for norm, x in ((self.q_norm, q), (self.k_norm, k))
            )
        if angles is None:
            return q, k, v
        if later:
            return self._turned(q, *angles), k, v
        return (*self.rotate_heads(q, k, *angles, self.core.interleaved), v)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [b, n, s, d] -> the same, turned as rotate does."""
        turned = rotate(x.permute(2, 0, 1, 3), cos, sin, self.core.interleaved)
        return turned.permute(1, 2, 0, 3)

    def _angles(
        self, at: ForwardContext, name: str, positions: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """cos and sin of positions, made once for all layers; None where positions are not rotary."""
        rotated, model = self.core.rotated, self.context.model
        if not rotated:
            return None
        of = (name, rotated, model)
        return at.once(of, lambda: at.turning(rotated, model, positions(), at.whole, at.slowed))

    def _remembered(
        self, at: ForwardContext, cache: LayerCache, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """k and v of all that the cache holds, [b, m/tp, t, d], and what is seen of it: see AttentionCall."""
        k, v = cache.extend(self.layer, k, v)
        angles = self._angles(at, "key angles", cache.key_positions) if cache.unturned else None
        if angles is not None:
            k = self._turned(k, *angles)
        window = self.core.window
        return k, v, at.once(("seen", window), lambda: cache.seen(window))

    def _call(
        self, at: ForwardContext, queries: int, keys: int, seen: Tensor | None = None
    ) -> AttentionCall:
        model, context = self.context.model, self.context
        dropout = at.dropout if model.attention_dropout > 0.0 else None
        rate = 0.0 if dropout is None else model.attention_dropout
        first_head = context.tp.rank * self.heads

        def keep() -> Tensor:
            """bool [b, n/tp, s, t] from sample, global head, query and key."""
            assert dropout is not None, "nothing is dropped"
            device = at.samples.device
            index = at.index if at.index.dim() == 1 else torch.arange(queries, device=device)
            heads = torch.arange(first_head, first_head + self.heads, device=device)
            # one number per (sample, head): the head takes the place of more samples
            rows = (at.samples[:, None] * 4096 + heads[None, :]).reshape(-1)
            tokens = token_numbers(rows, index)  # [s, b * n/tp]
            drawn = dropout.keys[key_index(self.layer, "attention")]
            mask = keep_mask(drawn, tokens, feature_bits(torch.arange(keys, device=device)), rate)
            return mask.permute(1, 0, 2).reshape(len(at.samples), self.heads, queries, keys)

        return AttentionCall(
            dropout=rate,
            keep=keep,
            seed=0 if dropout is None else self._seed(dropout, at.first_sample, first_head),
            layer_scale=float(self.layer + 1) if model.apply_query_key_layer_scaling else 1.0,
            softmax_in_fp32=model.attention_softmax_in_fp32,
            segments=at.segments,
            window=self.core.window,
            seen=seen,
        )

    def _seed(self, dropout: StepDropout, first_sample: int, first_head: int) -> int:
        """For kernels that draw their own mask; of numbers that the host knows, so that nothing waits."""
        where = (self.context.seed, dropout.step, self.layer, "attention")
        return key(*where, first_sample, first_head) & 0x7FFFFFFFFFFF
