"""SentencePiece models (Kudo and Richardson, arXiv:1808.06226) from a local .model file.

GPTSentencePieceTokenizer has the model's own ids; SentencePieceTokenizer appends <CLS>, <SEP>,
<EOD>, <MASK> and whatever the model lacks of padding, begin and end, as Megatron does;
Llama2Tokenizer begins every text with the model's begin.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.extras import how_to_install
from megatron_lite.data.tokenizers.base import read_bytes, short_hash
from megatron_lite.data.tokenizers.engines import (
    AUTO,
    Candidate,
    Encoded,
    EngineChoice,
    EngineTokenizer,
    FunctionEngine,
    GigatokenEngine,
    Unavailable,
    version_of,
)
from megatron_lite.data.tokenizers.fit import check_whole_model

_FLAG = "--tokenizer-model"
CHATGLM_SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
MEGATRON_SPECIALS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>")
EOD = "<EOD>"


def gigatoken_json(content: bytes) -> str:
    """The model as a tokenizer.json for gigatoken, in which no text spells a control piece."""
    try:
        from gigatoken._load.sentencepiece import (  # noqa: PLC0415  an optional extra
            sentencepiece_to_tokenizer_json,
        )
    except ImportError as error:
        raise Unavailable(f"this gigatoken reads no SentencePiece models: {error}") from error
    found = json.loads(sentencepiece_to_tokenizer_json(content))
    found["added_tokens"] = [token for token in found["added_tokens"] if not token["special"]]
    return json.dumps(found, ensure_ascii=False)


class GPTSentencePieceTokenizer(EngineTokenizer):
    """The pieces of the model, optionally with ChatGLM2's five behind them; EOD is its `</s>`."""

    def __init__(
        self, path: str | None, *, chatglm_specials: bool = False, engine: str = AUTO
    ) -> None:
        self._path = path
        self._content = read_bytes(path, _FLAG)
        try:
            import sentencepiece  # noqa: PLC0415  an optional extra
        except ImportError as error:
            raise ConfigError(
                "SentencePiece tokenizers need the package `sentencepiece`: "
                f"{how_to_install('sentencepiece')}"
            ) from error
        check_whole_model(self._content, f"{_FLAG} {path}")
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=self._content)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{_FLAG} {path} is no SentencePiece model: {error}") from error
        self._specials = self._appended(CHATGLM_SPECIALS if chatglm_specials else ())
        self.choice = EngineChoice(
            [
                Candidate(
                    "gigatoken",
                    lambda: GigatokenEngine(lambda t: t.from_json(gigatoken_json(self._content))),
                ),
                Candidate(
                    "sentencepiece",
                    lambda: FunctionEngine(version_of("sentencepiece"), self._model.encode_as_ids),
                ),
            ],
            reference=("sentencepiece",),
            asked=engine,
        )

    def _appended(self, names: Sequence[str]) -> dict[str, int]:
        """Ids behind the pieces, for names that are no pieces."""
        size = self._model.get_piece_size()
        pieces = {self._model.id_to_piece(number) for number in range(size)} if names else set()
        new = [name for name in dict.fromkeys(names) if name not in pieces]
        return {name: size + n for n, name in enumerate(new)}

    @property
    def vocab_size(self) -> int:
        """Pieces and what is appended."""
        return int(self._model.get_piece_size()) + len(self._specials)

    @property
    def specials(self) -> dict[str, int]:
        """The appended tokens."""
        return dict(self._specials)

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Control pieces, and what is appended."""
        model = self._model
        control = (n for n in range(model.get_piece_size()) if model.is_control(n))
        return {str(model.id_to_piece(n)): n for n in control} | self._specials

    @property
    def eod(self) -> int:
        """The end-of-sentence piece."""
        number = int(self._model.eos_id())
        if number < 0:
            raise DataError(
                f"{_FLAG} {self._path} has no end-of-sentence piece, which would end documents - "
                "train it with eos_id, or use SentencePieceTokenizer, which appends <EOD>"
            )
        return number

    @property
    def named_pieces(self) -> dict[str, str]:
        """bos, eos, unk, pad -> its piece, of those that the model has."""
        ids = {kind: getattr(self._model, f"{kind}_id")() for kind in ("bos", "eos", "unk", "pad")}
        return {kind: self._model.id_to_piece(n) for kind, n in ids.items() if n >= 0}

    @property
    def unknown(self) -> int | None:
        """The piece for what the model does not know."""
        return int(self._model.unk_id())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; appended tokens are written out."""
        names = {number: name for name, number in self._specials.items()}
        parts: list[str] = []
        run: list[int] = []
        for number in [*ids, -1]:
            if number >= 0 and number not in names:
                run.append(int(number))
                continue
            if run:
                parts.append(self._model.decode_ids(run))
                run = []
            parts.append(names.get(number, ""))
        return "".join(parts)

    def fingerprint(self) -> str:
        """A hash of the model and the appended tokens."""
        return short_hash(self._content, json.dumps(self._specials).encode())


class SentencePieceTokenizer(GPTSentencePieceTokenizer):
    """The same with Megatron's tokens behind the pieces; EOD is `<EOD>`."""

    def __init__(self, path: str | None, *, engine: str = AUTO) -> None:
        super().__init__(path, engine=engine)
        model = self._model
        ends = ((model.pad_id(), "<PAD>"), (model.bos_id(), "<BOS>"), (model.eos_id(), "<EOS>"))
        missing = [name for number, name in ends if number < 0]
        self._specials = self._appended([*MEGATRON_SPECIALS, *missing])

    @property
    def eod(self) -> int:
        """The id of <EOD>, appended or a piece of the model."""
        return self._specials.get(EOD, int(self._model.piece_to_id(EOD)))


class Llama2Tokenizer(GPTSentencePieceTokenizer):
    """The model's own ids with its begin of sentence before every text, an empty one too."""

    def __init__(self, path: str | None, *, engine: str = AUTO) -> None:
        super().__init__(path, engine=engine)
        self._begin = int(self._model.bos_id())
        if self._begin < 0:
            raise DataError(
                f"{_FLAG} {path} has no begin-of-sentence piece, which Llama2Tokenizer puts before "
                "every text - use GPTSentencePieceTokenizer"
            )

    def encode(self, text: str) -> list[int]:
        """Begin, then the ids of the text."""
        return [self._begin, *super().encode(text)]

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """The same of many texts."""
        ids, lengths = super().encode_batch(texts)
        starts = np.cumsum(lengths) - lengths
        return Encoded(np.insert(ids, starts, np.int32(self._begin)), lengths + 1)

    def fingerprint(self) -> str:
        """A hash of the model, and that texts have a begin."""
        return short_hash(self._content, b"begin before every text")
