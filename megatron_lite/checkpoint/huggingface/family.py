"""What a family of Hugging Face's says of itself; all else about folders is the same for every family.

    names        our canonical tensors in Hugging Face's     names.py
    config_in    config.json ─▶ ModelConfig, and refusals    config_file.py
    config_out   ModelConfig ─▶ config.json

What its config.json cannot say is not listed anywhere: an export reads back what it would write, and
refuses a model of which something else comes back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_lite.checkpoint.huggingface.config_file import ConfigFile
from megatron_lite.checkpoint.huggingface.names import Names
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.flags.settings import settings
from megatron_lite.config.rules.model_identity import model_differences
from megatron_lite.config.sections.model import ModelConfig

_OF_A_RUN = ("seq_length",)  # read back as all positions; a run may take shorter samples


class ConfigIn(Protocol):
    """The model of a config.json, vocab_size included; seq_length is the longest text.

    Asks for every key that matters and puts down what we do not have; ends in require_sound() and
    in refuse_unknown(), or knows why a key that it does not know changes nothing.
    """

    def __call__(self, config: ConfigFile) -> ModelConfig:
        """Raises CheckpointError."""
        ...


class ConfigOut(Protocol):
    """The config.json of a model; eod: the id that ends a document; dtype: as torch names it."""

    def __call__(self, model: ModelConfig, *, eod: int | None, dtype: str) -> dict[str, Any]:
        """Whatever the family has a key for; what it has none for need not be looked at."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A row of FAMILIES, whose key is the model_type of config.json.

    title: in messages; architecture: transformers' class for the whole model.
    default_ends: eos_token_id that is a library's default -> whose default it is.
    """

    title: str
    architecture: str
    names: Names
    config_in: ConfigIn
    config_out: ConfigOut
    default_ends: Mapping[int, str] = field(default_factory=dict)

    def read(self, values: Mapping[str, Any], path: Path) -> tuple[ModelConfig, list[str]]:
        """The model of a config.json, and what to say about it; CheckpointError where we lack some of it."""
        config = ConfigFile(values, path, self.title)
        if config.get("quantization_config") is not None:
            config.refuse("quantization_config: its weights are packed in a way that is not read")
        # transformers lets the tokens of any family see what follows them where this is said
        config.must_be({"is_causal": True}, otherwise=f"is a {self.title} here")
        model = self.config_in(config)
        config.require_sound()
        return model, config.notices

    def lacks(self, model: ModelConfig) -> list[str]:
        """The flags of what this family's config.json cannot say of a model."""
        said = json.loads(json.dumps(self.config_out(model, eod=None, dtype="float32")))
        config = ConfigFile(said, Path("config.json"), self.title)
        try:
            back = self.config_in(config)
            config.require_sound()
        except CheckpointError:
            return [f"such sizes ({'; '.join(config.problems)})"]
        return list(_flags(back, model))


def _flags(back: ModelConfig, model: ModelConfig) -> Iterator[str]:
    """How the command line asks for what came back as something else."""
    for difference in model_differences(back, model):
        name = difference.trait.name
        setting = settings()[f"model.{name}"]
        if name in _OF_A_RUN:
            continue
        if setting.kind is bool:
            yield setting.on[0] if difference.now else setting.off[0]
        else:
            yield f"{setting.flag} {difference.now}"
