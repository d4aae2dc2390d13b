"""A checkpoint becomes one GGUF file for llama.cpp and its kind, one tensor at a time, by the library gguf.

    header, metadata, names and shapes of all tensors      the library writes these
    the tensors, each padded to 32 bytes                   ours, as they come

llama.cpp turns neighbouring channels of a Llama's q and k (0 1, 2 3, ...), we turn its halves (0 d/2,
1 d/2+1, ...): their rows change places.  Norms, biases and tables of positions stay fp32, as llama.cpp
wants them; a matrix whose rows are no multiple of 32 is not packed as Q8_0 but kept in fp16.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_lite.blueprint.figure.parts import Activation
from megatron_lite.blueprint.figure.transformer import figure_of
from megatron_lite.checkpoint.foreign.gguf_rotary import (
    ROPE_FREQS,
    check_rotary,
    describe_rotary,
    rope_freqs,
)
from megatron_lite.checkpoint.huggingface.conversion import Conversion
from megatron_lite.checkpoint.huggingface.exporting import Export, plan_export
from megatron_lite.checkpoint.huggingface.names import FusedPart, Names
from megatron_lite.config.errors import CheckpointError, ConfigError, NumericsError
from megatron_lite.config.extras import how_to_install
from megatron_lite.storage.disk import Disk, DiskFile

MODEL_GGUF = "model.gguf"
GGUF_DTYPES = ("f32", "f16", "bf16", "q8_0")
_LIBRARY = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_NORMS = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"}
_OUTSIDE = {
    "embedding.tokens": "token_embd", "embedding.positions": "position_embd",
    "final_norm": "output_norm", "head": "output",
}  # fmt: skip
_FUSED = {
    f"attention.{part}": FusedPart("attn_qkv", number)
    for number, part in enumerate(("q", "k", "v"))
}
_APART = {f"attention.{part}": f"attn_{part}" for part in ("q", "k", "v")}
_REST = {
    "attention.output": "attn_output", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up",
    "mlp.down": "ffn_down", "attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm",
}  # fmt: skip


class Vocabulary(Protocol):
    """The tokens of a tokenizer."""

    def describe(self, writer: Any, gguf: Any, *, rows: int) -> None:
        """Into a GGUFWriter; every row of the token table gets a name."""
        ...


class _Architecture(NamedTuple):
    """How llama.cpp calls a family, and where its q, k and v lie; turned: rows change places."""

    name: str
    fused: bool = False
    turned: bool = False


_ARCHITECTURES = {
    "gpt2": _Architecture("gpt2", fused=True),
    "llama": _Architecture("llama", turned=True),
    "mistral": _Architecture("llama", turned=True),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3"),
    "gpt_neox": _Architecture("gptneox", fused=True),
}
"""Key of FAMILIES -> llama.cpp's words for it."""


@dataclass(frozen=True, slots=True)
class GGUFExport:
    """A checkpoint that GGUF can express; dtype: one of GGUF_DTYPES; said: what to tell about it."""

    inner: Export
    architecture: _Architecture
    dtype: str
    said: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of all tensors, at most."""
        return sum(self.inner.form(conversion).bytes for conversion in self.inner.conversions)

    @property
    def positions(self) -> int:
        """The longest text: within a window, where there is one."""
        model = self.inner.model
        return min(model.num_positions, model.window or model.num_positions)


def library() -> Any:
    """The module gguf; ConfigError says how to get it."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise ConfigError(f"--to gguf needs the library gguf: {how_to_install('gguf')}") from None


def plan_gguf(plan: Export, kind: str, dtype: str | None) -> GGUFExport:
    """kind: the key of the family in FAMILIES; dtype: fp32 by default.

    Raises CheckpointError where llama.cpp has no words for the model.
    """
    if kind not in _ARCHITECTURES:
        raise CheckpointError(
            f"GGUF has no architecture for {plan.family.title} here: it has {', '.join(_ARCHITECTURES)}"
        )
    library()
    architecture = _ARCHITECTURES[kind]
    check_rotary(plan.model, architecture.name)
    names = Names(
        prefix="", outside=_OUTSIDE, layer="blk.{}.",
        block={**_NORMS, **(_FUSED if architecture.fused else _APART), **_REST},
    )  # fmt: skip
    inner = plan_export(
        plan.store, plan.manifest, plan.trained, torch.float32, family=kind, names=names,
        adapters=plan.adapters,
    )  # fmt: skip
    notices = []
    layer = figure_of(inner.model, inner.model.vocab_size or 1).layers[0]
    if any(activation.function == "gelu_erf" for activation in layer.of(Activation)):
        notices.append(
            "llama.cpp computes GELU by tanh, the model has the exact one: activations there differ by "
            "less than 0.001"
        )
    export = GGUFExport(inner, architecture, dtype or "f32", ())
    if export.positions < plan.model.num_positions:
        notices.append(
            f"context_length is {export.positions}, the window: llama.cpp's {architecture.name} sees all "
            f"tokens before, which is the same up to there (the model has {plan.model.num_positions})"
        )
    return GGUFExport(inner, architecture, export.dtype, tuple(notices))


def export_gguf(
    export: GGUFExport,
    folder: Path,
    *,
    vocabulary: Vocabulary | None,
    eod: int | None,
    disk: Disk,
) -> str:
    """Write model.gguf into an empty folder.  The peak is one tensor in fp32 and what is made of it."""
    gguf = library()
    writer = gguf.GGUFWriter(None, export.architecture.name)
    _describe(export, writer, gguf, vocabulary, eod)
    kinds = {c.theirs: _kind(export, c, gguf) for c in export.inner.conversions}
    for conversion in export.inner.conversions:
        kind = kinds[conversion.theirs]
        shape = gguf.quant_shape_to_byte_shape(conversion.shape, kind)
        bytes_of = (
            int(np.prod(shape)) if kind.name in ("BF16", "Q8_0") else _bytes(conversion, kind)
        )
        packed = kind.name in ("BF16", "Q8_0")
        writer.add_tensor_info(
            conversion.theirs, shape if packed else conversion.shape,
            np.dtype(np.uint8 if packed else kind.name.replace("F", "float")), bytes_of, raw_dtype=kind,
        )  # fmt: skip
    divisors = rope_freqs(export.inner.model)
    if divisors is not None:
        writer.add_tensor_info(ROPE_FREQS, divisors.shape, divisors.dtype, divisors.nbytes)
    with disk.create(folder / MODEL_GGUF) as file:
        sink = _Sink(file)
        writer.fout, writer.state = [sink], type(writer.state).EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        sink.pad(writer.data_alignment)
        for conversion in export.inner.conversions:
            values = _values(export, conversion)
            data = gguf.quants.quantize(values, kinds[conversion.theirs])
            sink.write(np.ascontiguousarray(data).data)
            sink.pad(writer.data_alignment)
        if divisors is not None:
            sink.write(divisors.data)
            sink.pad(writer.data_alignment)
        file.fsync()
    return MODEL_GGUF


class _Sink:
    """What the library writes goes through the disk, whole or not at all."""

    def __init__(self, file: DiskFile) -> None:
        self.file = file

    def write(self, data: Any) -> None:
        self.file.write(data)

    def flush(self) -> None:
        """The file is flushed when it is whole."""

    def tell(self) -> int:
        return self.file.size

    def pad(self, alignment: int) -> None:
        """Zeros up to the next multiple."""
        self.file.write(bytes(-self.file.size % alignment))


def _bytes(conversion: Conversion, kind: Any) -> int:
    return int(np.prod(conversion.shape)) * (4 if kind.name == "F32" else 2)


def _kind(export: GGUFExport, conversion: Conversion, gguf: Any) -> Any:
    """The number format of one tensor."""
    kinds = gguf.GGMLQuantizationType
    plain = len(conversion.shape) < 2 or conversion.theirs == "position_embd.weight"
    if plain or export.dtype == "f32":
        return kinds.F32
    if export.dtype == "q8_0" and conversion.shape[-1] % 32:
        return kinds.F16
    return kinds[export.dtype.upper()]


def _values(export: GGUFExport, conversion: Conversion) -> Any:
    """One tensor in fp32, [out, in]."""
    tensor = export.inner.tensor(conversion)
    if not bool(torch.isfinite(tensor).all()):
        raise NumericsError(
            f"{conversion.theirs} holds values that are not finite: nothing is made of it"
        )
    module = conversion.theirs.rsplit(".", 2)[-2]
    if export.architecture.turned and module in ("attn_q", "attn_k"):
        tensor = neighbours(tensor, export.inner.model.head_size)
    return tensor.numpy()


def neighbours(tensor: Tensor, head_size: int) -> Tensor:
    """Rows of heads whose halves turn together -> the same rows, each beside the one it turns with."""
    apart = tensor.view(-1, 2, head_size // 2, *tensor.shape[1:])
    return apart.transpose(1, 2).reshape(tensor.shape)


def _describe(
    export: GGUFExport, writer: Any, gguf: Any, vocabulary: Vocabulary | None, eod: int | None
) -> None:
    model = export.inner.model
    writer.add_name(f"{export.inner.family.title} of megatron_lite")
    writer.add_file_type(gguf.LlamaFileType[_LIBRARY[export.dtype]])
    if export.dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(model.num_layers)
    writer.add_context_length(export.positions)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.ffn_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_vocab_size(model.vocab_size)
    if figure_of(model, model.vocab_size or 1).final_norm.function == "RMSNorm":
        writer.add_layer_norm_rms_eps(model.norm_epsilon)
    else:
        writer.add_layer_norm_eps(model.norm_epsilon)
    if model.position_embedding_type == "rope":
        describe_rotary(model, writer, gguf)
        writer.add_key_length(model.head_size)
        writer.add_value_length(model.head_size)
    if export.architecture.name == "gptneox":
        said = export.inner.family.config_out(model, eod=None, dtype="float32")
        writer.add_parallel_residual(use=bool(said["use_parallel_residual"]))
    if vocabulary is not None:
        vocabulary.describe(writer, gguf, rows=model.vocab_size or 0)
    if eod is not None:
        writer.add_eos_token_id(eod)
