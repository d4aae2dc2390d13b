"""A folder of Hugging Face's whose vocabulary is one SentencePiece file: Llama 1 and 2, what ChatGLM2's cut.

tokenizer.model         pieces, their scores, and which begin and end a text
tokenizer_config.json   class, what is put before a text, tokens behind the pieces: read, or written
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lite.config.errors import DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.tokenizers.base import read_bytes
from megatron_lite.data.tokenizers.build import build_tokenizer
from megatron_lite.data.tokenizers.huggingface import ALONG, BESIDE
from megatron_lite.data.tokenizers.sentencepiece import (
    CHATGLM_SPECIALS,
    EOD,
    GPTSentencePieceTokenizer,
)
from megatron_lite.data.tokenizers.sentencepiece_file import ModelFile
from megatron_lite.data.tokenizers.statements import json_object

MODEL, ADDED = "tokenizer.model", "added_tokens.json"
TYPES = ("GPTSentencePieceTokenizer", "SentencePieceTokenizer", "Llama2Tokenizer")
_CONFIG = "tokenizer_config.json"


def model_section(
    files: Mapping[str, bytes], folder: Path, *, eos: str | None, rows: int | None
) -> dict[str, Any]:
    """Fields of the data section; eos: the token that files say ends a document, rows: of the model.

    ChatGLM2's five ids behind the pieces are known by its class, or by their names; a model that has
    no rows for them was trained without.
    """
    path = str(folder / MODEL)
    config = json_object(files.get(_CONFIG, b"{}"), str(folder / _CONFIG))
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if eos == EOD:
        return {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": path}
    added = config.get("added_tokens_decoder")
    names = {str(t.get("content")) for t in added.values()} if isinstance(added, dict) else set()
    five = kind == "ChatGLMTokenizer" or set(CHATGLM_SPECIALS) <= names
    if five and rows is not None:
        pieces = len(ModelFile.read(files[MODEL], path).pieces)
        five = pieces + len(CHATGLM_SPECIALS) <= rows
    if five:
        return {"tokenizer_type": "GPTSentencePieceTokenizer", "tokenizer_model": path,
                "chatglm_special_tokens": True}  # fmt: skip
    begins = kind == "LlamaTokenizer" and config.get("add_bos_token", True)
    chosen = "Llama2Tokenizer" if begins else "GPTSentencePieceTokenizer"
    return {"tokenizer_type": chosen, "tokenizer_model": path}


def model_files(
    data: DataConfig, beside: Mapping[str, bytes], *, positions: int
) -> dict[str, bytes]:
    """tokenizer.model and its tokenizer_config.json: the one beside it where it says the same.

    beside: the other files of its folder; positions: the longest text, in tokens.
    """
    content = read_bytes(data.tokenizer_model, "--tokenizer-model")
    path = Path(data.tokenizer_model or "")
    known = (*BESIDE, *ALONG, ADDED) if path.name == MODEL else ()
    files = {MODEL: content, **{name: beside[name] for name in known if name in beside}}
    said = json_object(files.get(_CONFIG, b"{}"), str(path.parent / _CONFIG))
    eos = said.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    own = model_section(files, path.parent, eos=eos, rows=None) if _CONFIG in files else {}
    same = own.get("tokenizer_type") == data.tokenizer_type
    if same and own.get("chatglm_special_tokens", False) == data.chatglm_special_tokens:
        return files
    model = ModelFile.read(content, str(path))
    if not model.is_bpe:
        raise DataError(
            f"{path} is a Unigram model, which transformers' class for such files reads as BPE: add "
            "--no-tokenizer to write the model alone"
        )
    kept = {name: files[name] for name in ALONG if name in files}
    return {MODEL: content, _CONFIG: _config(data, positions, model), **kept}


def unlike_transformers(files: Mapping[str, bytes]) -> list[str]:
    """What to say where transformers gives some texts other ids than the SentencePiece file does."""
    if MODEL not in files or "tokenizer.json" in files:
        return []
    model = ModelFile.read(files[MODEL], MODEL)
    habits = {"replaces characters": model.replaces, "makes several spaces one": model.joins_spaces}
    found = [words for words, has in habits.items() if has]
    if not found:
        return []
    return [
        f"{MODEL} {' and '.join(found)} before it cuts a text, which transformers' class for such files "
        "does not: it gives such texts other ids; this project reads the file itself"
    ]


def _config(data: DataConfig, positions: int, model: ModelFile) -> bytes:
    """A tokenizer_config.json by which transformers gives the same ids."""
    tokenizer = build_tokenizer(data)
    assert isinstance(tokenizer, GPTSentencePieceTokenizer)
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    names = tokenizer.named_pieces
    if data.tokenizer_type == "SentencePieceTokenizer":
        names = {**names, "eos": EOD}
    found = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": data.tokenizer_type == "Llama2Tokenizer",
        "add_eos_token": False,
        "add_prefix_space": model.space_in_front,
        "legacy": model.space_in_front,  # a text behind a special token begins as every text does
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
        **{f"{kind}_token": piece for kind, piece in names.items()},
        "added_tokens_decoder": {
            str(number): {"content": name, **token, "special": True}
            for name, number in tokenizer.specials.items()
        },
    }
    return json.dumps(found, indent=2, ensure_ascii=False).encode()
