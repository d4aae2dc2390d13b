"""Convert a Hugging Face folder into a checkpoint to resume from, and a checkpoint into a Hugging Face folder.

python tools/convert.py FROM TO              which way follows from what FROM holds
python tools/convert.py FROM TO --dry-run    every tensor, its shapes and the bytes; writes nothing
python tools/convert.py RUN TO --to gguf     one file for llama.cpp, or --to llama2c
python tools/convert.py RUN TO --merge       a run of adapters as one model; without it a folder of PEFT's

FROM is a folder with config.json and *.safetensors, or another program's checkpoint (nanoGPT's
ckpt.pt, Megatron-LM's torch_dist, Megatron-DeepSpeed's global_stepN), or a run folder with iter_*
checkpoints, or one of them.  Which families of models are known:
FAMILIES in megatron_lite/checkpoint/huggingface/families.py; which programs: FORMATS in
megatron_lite/checkpoint/foreign/formats.py, whose pickles are read without being run.
TO must be absent or empty and appears when it is complete.  Tensors go through memory one at a time.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from megatron_lite.checkpoint.beginning import config_yaml
from megatron_lite.checkpoint.foreign.formats import ForeignFormat, format_of
from megatron_lite.checkpoint.foreign.gguf import GGUF_DTYPES, GGUFExport, export_gguf, plan_gguf
from megatron_lite.checkpoint.foreign.llama2c import (
    LLAMA2C_DTYPES,
    Llama2cExport,
    export_llama2c,
    plan_llama2c,
)
from megatron_lite.checkpoint.foreign.model import ForeignModel
from megatron_lite.checkpoint.huggingface.conversion import Conversion
from megatron_lite.checkpoint.huggingface.exporting import Export, export_folder, plan_export
from megatron_lite.checkpoint.huggingface.families import FAMILIES
from megatron_lite.checkpoint.huggingface.folder import HuggingFaceFolder, open_folder
from megatron_lite.checkpoint.huggingface.generation import (
    GENERATION,
    generation_config,
    several_ends,
)
from megatron_lite.checkpoint.huggingface.importing import import_folder
from megatron_lite.checkpoint.huggingface.peft import ADAPTER_CONFIG
from megatron_lite.checkpoint.huggingface.peft_writing import (
    peft_config,
    peft_tensors,
    write_peft,
)
from megatron_lite.checkpoint.tensor_file import SAFETENSORS_NAMES, TensorForm
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.config.extensions import add_extend_flag, extend
from megatron_lite.data.provenance import ALLOW_MISMATCH, end_of_document, made_with
from megatron_lite.data.taught import spoken_files
from megatron_lite.data.tokenizers.beginning import BEGINS, adding_nothing, put_before
from megatron_lite.data.tokenizers.build import build_tokenizer
from megatron_lite.data.tokenizers.exchange import files_beside_model, files_for_huggingface
from megatron_lite.data.tokenizers.sentencepiece_folder import unlike_transformers
from megatron_lite.data.tokenizers.statements import compare_statements, read_vocabulary
from megatron_lite.data.tokenizers.tokens import TOKENIZER_BIN, tokenizer_bin, vocabulary_of
from megatron_lite.data.vocabulary import folder_tokenizer, part_of_model
from megatron_lite.inference.model import (
    CheckpointSource,
    beside_checkpoint,
    find_checkpoint,
    is_huggingface,
)
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.storage.disk import Disk, folder_at_once, write_atomically
from megatron_lite.storage.outputs import check_folder, require_room

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_FORMATS = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip
_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_PACKED = "q8_0"
_ONE_FILE = {"gguf": GGUF_DTYPES, "llama2c": LLAMA2C_DTYPES}


def main() -> int:
    """Look at FROM, convert or list, and say what to do next."""
    asked = _parse(sys.argv[1:])
    source, target = Path(asked.source), Path(asked.target)
    if not asked.dry_run:
        check_folder("TO", target, Disk())
    _require_empty(target)
    foreign = format_of(source)
    if foreign is not None:
        _import_foreign(foreign, source, target, asked)
    else:
        (_import if is_huggingface(source) else _export)(source, target, asked)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="FROM",
        help="a folder of Hugging Face's, another program's checkpoint, or a run folder")  # fmt: skip
    add("target", metavar="TO", help="the new folder")
    add("--dry-run", action="store_true", help="list every tensor, write nothing")
    add("--ckpt-step", type=int, metavar="N", help="this iteration instead of the newest")
    add("--vocab-size", type=int, metavar="N",
        help="rows of another program's padded token table to keep; all")  # fmt: skip
    add_extend_flag(parser)
    add = parser.add_argument_group("exports").add_argument
    add("--to", choices=["huggingface", *_ONE_FILE], help="whose format (huggingface)")
    add("--dtype", choices=[*_FORMATS, _PACKED], help="as stored by default, of one file f32")
    add("--max-shard-size", default="5GB", help="most bytes of one file (%(default)s)")
    add("--family", help="model_type; the first that can say all")
    add("--merge", action="store_true", help="write adapters into the weights, not beside them")
    add("--adapter", help="adapters to merge: a folder of PEFT's, or a run's")
    add = parser.add_argument_group("tokenizer").add_argument
    add("--no-tokenizer", action="store_true", help="leave it out")
    add("--vocab-file", help="instead of the one the run was trained with")
    add("--merge-file", help="instead of the one the run was trained with")
    add(ALLOW_MISMATCH, action="store_true", help="export with another than its own")
    asked = parser.parse_args(argv)
    extend(asked.extend)
    if asked.family not in (None, *FAMILIES):
        raise ConfigError(
            f"--family {asked.family} is not known: choose from {', '.join(FAMILIES)}"
        )
    _check_dtype(asked)
    match = re.fullmatch(r"(\d{1,15})\s*([KMG]i?B)?", asked.max_shard_size, re.IGNORECASE)
    if match is None or not int(match[1]):
        raise ConfigError(
            f"--max-shard-size {asked.max_shard_size}: write it as 500MB, 5GB or 2GiB"
        )
    asked.shard_bytes = int(match[1]) * UNITS[(match[2] or "").upper()]
    return asked


def _check_dtype(asked: argparse.Namespace) -> None:
    """Which numbers a format can hold."""
    known = _ONE_FILE.get(asked.to or "", tuple(_FORMATS))
    if asked.dtype is not None and _SHORT.get(asked.dtype, asked.dtype) not in known:
        raise ConfigError(
            f"--dtype {asked.dtype} is no format of --to {asked.to or 'huggingface'}: choose from "
            f"{', '.join(known)}"
        )


def _require_empty(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there already: nothing is overwritten; name a new folder")


def _require_room(target: Path, tensors: int, files: dict[str, bytes], disk: Disk) -> None:
    """For so many bytes of tensors with their headers, and the files beside them."""
    beside = sum(map(len, files.values())) + (1 << 20)
    require_room("TO", target, int(tensors * 1.02) + beside, disk)


def _refuse_others(asked: argparse.Namespace, flags: Sequence[str], why: str) -> None:
    for flag in flags:
        if getattr(asked, flag) is not None:
            raise ConfigError(f"--{flag.replace('_', '-')} {why}")


_OF_EXPORTS = ("ckpt_step", "dtype", "to", "family", "vocab_file", "merge_file", "adapter")


def _import_foreign(
    row: ForeignFormat, source: Path, target: Path, asked: argparse.Namespace
) -> None:
    _refuse_others(asked, _OF_EXPORTS, f"is for exports: {source} is another program's checkpoint")
    found = row.open(source, vocab_size=asked.vocab_size)
    for line in (f"{source} is a checkpoint of {found.title}", *found.notices):
        print(f"NOTE: {line}")
    print("NOTE: no tokenizer comes with it: give its flags when training and generating")
    if asked.dry_run:
        _list(found.conversions, found.form, found.bytes, {}, target, export=False)
        return
    _write_import(found, target, asked, data={}, files={}, facts={})


def _import(source: Path, target: Path, asked: argparse.Namespace) -> None:
    _refuse_others(
        asked, _OF_EXPORTS, f"is for the other direction: {source} is a folder of Hugging Face's"
    )
    _refuse_others(
        asked, ("vocab_size",), "is for checkpoints of other programs, not Hugging Face's"
    )
    found = open_folder(source)
    rows = found.model.vocab_size
    assert rows is not None
    with part_of_model():
        files = {} if asked.no_tokenizer else files_beside_model(source)
        words = folder_tokenizer(
            source, files, found.config, rows=rows, positions=found.model.num_positions,
            default_ends=found.family.default_ends,
        )  # fmt: skip
    data = words.section(target.absolute() / "tokenizer")
    files = files | several_ends(files, found.config) if files else {}
    if words.tokenizer is not None:
        print(f"end of document: {end_of_document(words.tokenizer)}")
    if words.unseen is not None:
        print(f"NOTE: the tokenizer was not looked at: {words.unseen}")
    for line in (*found.notices, *words.notices):
        print(f"NOTE: {line}")
    if not data:
        print("NOTE: no tokenizer comes with it: give its flags when training and generating")
    if asked.dry_run:
        _list(found.conversions, found.form, found.bytes, files, target, export=False)
        return
    _write_import(found, target, asked, data=data, files=files, facts=words.facts)


def _write_import(
    found: HuggingFaceFolder | ForeignModel,
    target: Path,
    asked: argparse.Namespace,
    *,
    data: dict[str, Any],
    files: dict[str, bytes],
    facts: Mapping[str, Any],
) -> None:
    """data names the tokenizer, files are its own, facts what the manifest says of it."""
    disk = Disk()
    _require_room(target, found.bytes, files, disk)
    with folder_at_once(target, disk) as partial:
        if data:
            disk.make_folder(partial / "tokenizer")
            for name, content in files.items():
                write_atomically(partial / "tokenizer" / name, content, disk)
        write_atomically(partial / "config.yaml", config_yaml(found.model, data).encode(), disk)
        import_folder(
            found,
            partial,
            data=data,
            tokenizer=files if data else {},
            facts=facts,
            shard_bytes=asked.shard_bytes,
            disk=disk,
        )
    print(f"{target}: {len(found.conversions)} tensors, {found.bytes} bytes, as iteration 0\n"
          f"next: python tools/generate.py --load {target} --prompt ...\n"
          f"      python tools/pretrain_gpt.py --config {target / 'config.yaml'} --load {target} "
          "--finetune --save ...")  # fmt: skip


def _export(source: Path, target: Path, asked: argparse.Namespace) -> None:
    _refuse_others(asked, ("vocab_size",), f"is for imports: {source} is a run folder")
    found = _found_checkpoint(source, asked)
    model, iteration = found.config, found.manifest.iteration
    if found.adapters is not None and not asked.merge:
        _export_adapters(found, target, asked)
        return
    export = plan_export(
        *found.weights, model, _FORMATS.get(asked.dtype), family=asked.family,
        adapters=found.adapters,
    )  # fmt: skip
    if export.model.rotary_base != model.rotary_base:
        print(f"NOTE: --rope-scaling-type ntk goes out as its base, {export.model.rotary_base:.9g}")
    if asked.to in _ONE_FILE:
        _export_one_file(found, export, target, asked)
        return
    files: dict[str, bytes] = {}
    eod = found.manifest.tokenizer.get("eod")
    if not asked.no_tokenizer:
        files, eod = _tokenizer(asked, found)
        files |= spoken_files(Path(asked.adapter)) if asked.adapter else {}
    rows, kept = model.vocab_size, str(found.tokenizer_folder)
    assert rows is not None
    words = read_vocabulary(files, kept)
    said = compare_statements(
        words, {"eos_token_id": eod}, eod=None, rows=rows,
        positions=model.num_positions, where=kept, default_ends=export.family.default_ends,
    )  # fmt: skip
    for line in said:
        print(f"NOTE: {line}")
    print("end of document: " + ("not known" if eod is None else f"id {eod}"))
    bos = words.ids.get(words.special["bos"][0]) if "bos" in words.special else None
    files[GENERATION] = generation_config(files.get(GENERATION), eod=eod, bos=bos)
    if asked.dry_run:
        _list(export.conversions, export.form, export.bytes, files, target, export=True)
        return
    disk = Disk()
    _require_room(target, export.bytes, files, disk)
    with folder_at_once(target, disk) as partial:
        for name, content in files.items():
            write_atomically(partial / name, content, disk)
        written = export_folder(export, partial, eod=eod, bos=bos, shard_bytes=asked.shard_bytes,
                                disk=disk)  # fmt: skip
    print(f"{target}: iteration {iteration}, {len(export.conversions)} tensors, "
          f"{export.bytes} bytes in {', '.join(written[:3])}{' ...' if len(written) > 3 else ''}\n"
          f'next: transformers.{export.family.architecture}.from_pretrained("{target}")')  # fmt: skip


def _found_checkpoint(source: Path, asked: argparse.Namespace) -> CheckpointSource:
    """The checkpoint, and the adapters that it is or that are given for it."""
    ctx = ParallelContext.serial()
    found = find_checkpoint(source, ctx, step=asked.ckpt_step)
    if asked.adapter is not None:
        found = beside_checkpoint(found, Path(asked.adapter), ctx)
        if not asked.merge:
            raise ConfigError(f"--adapter {asked.adapter} is merged into {source}: add --merge")
    for line in found.notices:
        print(f"WARNING: {line}", file=sys.stderr)
    if asked.merge and found.adapters is None:
        raise ConfigError(
            f"--merge: {source} holds a whole model: give its adapters with --adapter"
        )
    return found


def _export_adapters(found: CheckpointSource, target: Path, asked: argparse.Namespace) -> None:
    """adapter_config.json and adapter_model.safetensors, as PEFT's library reads them, and how it speaks."""
    _refuse_others(asked, ("to", "dtype", "family"), "is for whole models: add --merge")
    assert found.adapters is not None
    tensors = peft_tensors(found.adapters, found.config)
    base = str(found.weights[0].root)
    files = {ADAPTER_CONFIG: peft_config(found.adapters, found.config, base, tensors)}
    files |= spoken_files(found.tokenizer_folder)
    size, disk = sum(tensor.nbytes for tensor in tensors.values()), Disk()
    if asked.dry_run:
        for name, tensor in tensors.items():
            print(f"{name} {list(tensor.shape)}  F32")
        print(f"dry run: {len(tensors)} tensors, {size} bytes for {target}; nothing was written")
        return
    _require_room(target, size, files, disk)
    with folder_at_once(target, disk) as partial:
        write_peft(partial, files, tensors, disk)
    print(f"{target}: iteration {found.manifest.iteration}, {len(tensors)} tensors, {size} bytes, beside "
          f'{base}\nnext: peft.PeftModel.from_pretrained(MODEL, "{target}"), MODEL is {base} after '
          "tools/convert.py")  # fmt: skip


def _export_one_file(
    found: CheckpointSource, plan: Export, target: Path, asked: argparse.Namespace
) -> None:
    """model.gguf, or llama2.c's model.bin and tokenizer.bin."""
    kind = next(name for name, family in FAMILIES.items() if family is plan.family)
    dtype = None if asked.dtype is None else _SHORT.get(asked.dtype, asked.dtype)
    vocabulary, rows = None, found.config.vocab_size or 0
    if not asked.no_tokenizer:
        data = found.data(asked.vocab_file, asked.merge_file)
        begins = found.manifest.tokenizer.get(BEGINS, ())
        vocabulary = vocabulary_of(data, positions=found.config.num_positions, begins=begins)
        if vocabulary is None or (asked.to == "llama2c" and not vocabulary.scores):
            named = data.vocab_file or data.tokenizer_model
            why = (f"{data.tokenizer_type} of {named} has no form in {asked.to}" if named
                   else "the checkpoint names no tokenizer")  # fmt: skip
            print(f"NOTE: {why}: only the model is written")
            vocabulary = None
    disk, files = Disk(), {}
    export: GGUFExport | Llama2cExport
    if asked.to == "gguf":
        export = plan_gguf(plan, kind, dtype)
        for line in export.said:
            print(f"NOTE: {line}")
    else:
        export = plan_llama2c(plan, kind, dtype)
        files = {} if vocabulary is None else {TOKENIZER_BIN: tokenizer_bin(vocabulary, rows=rows)}
    conversions = export.inner.conversions
    if asked.dry_run:
        _list(conversions, export.inner.form, export.bytes, files, target, export=True)
        return
    _require_room(target, export.bytes, files, disk)
    with folder_at_once(target, disk) as partial:
        for name, content in files.items():
            write_atomically(partial / name, content, disk)
        if isinstance(export, GGUFExport):
            eod = found.manifest.tokenizer.get("eod")
            written = export_gguf(export, partial, vocabulary=vocabulary, eod=eod, disk=disk)
        else:
            written = export_llama2c(export, partial, disk=disk)
    size = (target / written).stat().st_size
    print(f"{target / written}: iteration {found.manifest.iteration}, {len(conversions)} tensors, "
          f"{size} bytes as {dtype or 'f32'}")  # fmt: skip


def _tokenizer(
    asked: argparse.Namespace, found: CheckpointSource
) -> tuple[dict[str, bytes], int | None]:
    """The tokenizer's files by name, and the id that ends a document."""
    eod = found.manifest.tokenizer.get("eod")
    data = found.data(asked.vocab_file, asked.merge_file)
    if data.tokenizer_type == "GPT2BPETokenizer" and not (data.vocab_file or data.merge_file):
        print("NOTE: the checkpoint names no tokenizer: only the model is written")
        return {}, eod
    files = files_for_huggingface(data, positions=found.config.num_positions)
    begins = tuple(found.manifest.tokenizer.get(BEGINS, ()))
    if not begins and put_before(files.get("tokenizer.json", b"{}")):
        print(
            "NOTE: the model's texts begin with nothing: what its tokenizer puts around a text is left out"
        )
        files = adding_nothing(files)
    for line in unlike_transformers(files):
        print(f"NOTE: {line}")
    try:
        maker = made_with(build_tokenizer(data), data)
    except ConfigError as error:  # a library that only using it needs
        print(f"NOTE: the tokenizer was not looked at: {error}")
        return files, eod
    said = found.check_tokenizer(
        maker,
        foreign=asked.vocab_file is not None or asked.merge_file is not None,
        allowed=asked.allow_tokenizer_mismatch,
    )
    for line in said:
        print(f"WARNING: {line}", file=sys.stderr)
    return files, maker.eod if said else found.manifest.tokenizer.get("eod", maker.eod)


def _list(
    conversions: Sequence[Conversion],
    form: Callable[[Conversion], TensorForm],
    total: int,
    files: dict[str, bytes],
    target: Path,
    *,
    export: bool,
) -> None:
    for conversion in conversions:
        theirs = f"{conversion.theirs} {list(conversion.shape)}"
        ours = ", ".join(f"{name} {list(shape)}" for name, shape in conversion.ours.items())
        pair = (ours, theirs) if export else (theirs, ours)
        dtype = SAFETENSORS_NAMES[form(conversion).dtype]
        print(f"{pair[0]} -> {pair[1]}  {dtype}{', transposed' if conversion.transposed else ''}")
    for name, content in files.items():
        print(f"{name}: {len(content)} bytes")
    print(f"dry run: {len(conversions)} tensors, {total} bytes for {target}; nothing was written")


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, go_on="nothing was finished: start it again"))


if __name__ == "__main__":
    start()
