"""config.json, key by key: what is wrong with it is gathered and told at once, and no key is overlooked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_lite.config.errors import CheckpointError

Value = TypeVar("Value")

HARMLESS = frozenset((
    "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path",
    "name_or_path", "_commit_hash", "_attn_implementation", "attn_implementation", "use_cache",
    "tokenizer_class", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
    "begin_suppress_tokens", "bad_words_ids", "output_attentions", "output_hidden_states",
    "output_past", "output_scores", "return_dict", "return_dict_in_generate", "torchscript",
    "is_decoder", "is_encoder_decoder", "cross_attention_hidden_size", "chunk_size_feed_forward",
    "gradient_checkpointing", "finetuning_task", "task_specific_params", "problem_type", "id2label",
    "label2id", "num_labels", "_num_labels", "prefix", "predict_special_tokens", "max_length",
    "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "num_return_sequences", "exponential_decay_length_penalty", "remove_invalid_values",
    "use_bfloat16", "tf_legacy_loss",
))  # fmt: skip
"""Keys of any family that change no number of the model: where it comes from, how texts are drawn of it."""


@dataclass(slots=True)
class ConfigFile:
    """What a family asks for; a wrong value is put down, and something of its type comes back.

    title: of the family, for messages; inside: the key below which these values stand, with a dot.
    """

    values: Mapping[str, Any]
    path: Path
    title: str
    inside: str = ""
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)

    def get(self, key: str, default: Any = None) -> Any:
        """As it is."""
        self.asked.add(key)
        return self.values.get(key, default)

    def refuse(self, problem: str) -> None:
        """Put down why this cannot be converted."""
        self.problems.append(problem)

    def must_be(self, needed: Mapping[str, Any], *, otherwise: str) -> None:
        """Settings that have one value with us; so they are where they are not said."""
        for key, value in needed.items():
            if self.get(key, value) != value:
                self.refuse(f"{self.inside}{key} {self.get(key)!r}: only {value!r} {otherwise}")

    def choice(self, key: str, choices: Mapping[str, Value], default: str) -> Value:
        """What one of our words for it means."""
        found = self.get(key, default)
        if not isinstance(found, str) or found not in choices:
            self.refuse(f"{self.inside}{key} {found!r}: ours are {', '.join(choices)}")
            found = default
        return choices[found]

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number that a tensor can have; it must be there where there is no default."""
        found = self.get(key, default)
        if type(found) is not int or not 0 < found < 1 << 31:
            self.refuse(
                f"{self.inside}{key} {found!r}: not a whole number above 0 that a tensor can have"
            )
            return 1
        return found

    def share(self, key: str, default: float, *, above_zero: bool = False) -> float:
        """A number from 0 up to 1, which it is not."""
        found = self.get(key, default)
        if type(found) not in (int, float) or not 0 <= found < 1:
            self.refuse(f"{self.inside}{key} {found!r}: not a number from 0 to 1")
            return default
        if above_zero and found == 0:
            self.refuse(f"{self.inside}{key} {found!r}: must be above 0")
        return float(found)

    def number(self, key: str, default: float) -> float:
        """A finite number above 0."""
        found = self.get(key, default)
        if type(found) not in (int, float) or not 0 < found < float("inf"):
            self.refuse(f"{self.inside}{key} {found!r}: not a number above 0")
            return default
        return float(found)

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        found = self.get(key, default)
        if type(found) is not bool:
            self.refuse(f"{self.inside}{key} {found!r}: neither true nor false")
            return default
        return found

    def below(self, key: str) -> ConfigFile:
        """The values that stand below a key, none where it is absent; problems come together here."""
        found = self.get(key)
        if found is not None and not isinstance(found, dict):
            self.refuse(f"{self.inside}{key} {found!r}: no JSON object")
        values = found if isinstance(found, dict) else {}
        inside = f"{self.inside}{key}."
        return ConfigFile(values, self.path, self.title, inside, self.problems, self.notices)

    def unknown(self, harmless: Iterable[str] = ()) -> Iterator[str]:
        """Keys that were not asked for and that mean something; harmless: further ones that do not."""
        known = self.asked | HARMLESS | set(harmless)
        for key, value in self.values.items():
            nothing = (
                value is None or value is False or value in ("", [], {})
            )  # 0 may mean something
            if key not in known and not nothing:
                yield f"{self.inside}{key}"

    def refuse_unknown(self, harmless: Iterable[str] = ()) -> None:
        """The same as problems: what they make of the numbers is not known here."""
        for name in self.unknown(harmless):
            value = self.values[name.removeprefix(self.inside)]
            self.refuse(
                f"{name} {str(value)[:40]!r}: not known here; remove it where it changes no number "
                f"of a {self.title}"
            )

    def require_sound(self) -> None:
        """Raise CheckpointError with all that is wrong so far."""
        if self.problems:
            raise CheckpointError(
                f"{self.path} is not a {self.title} that can be converted: {'; '.join(self.problems)}"
            )
