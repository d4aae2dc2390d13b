"""Whether a resumed run reads the same data and the same code as the checkpoint was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.description import saved_objective
from megatron_lite.checkpoint.manifest import Manifest
from megatron_lite.config.errors import CheckpointError, DataError
from megatron_lite.config.objectives import OBJECTIVES
from megatron_lite.config.rules.model_identity import model_differences
from megatron_lite.config.sections.lora import LoraConfig
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.data.identity import Identity, changes
from megatron_lite.data.tokenizers.beginning import BEGINS

_SHOWN = 20
ALLOW_DIFFERENCES = "--allow-data-change"


def check_model(
    before: ModelConfig, now: ModelConfig, folder: Path, *, allowed: Sequence[str]
) -> list[str]:
    """Notices; raises CheckpointError where a weight would mean something else than it was trained for.

    before: the checkpoint's model, of this folder.  allowed: fields of the model that may differ.
    Tensors are compared elsewhere, by shape.
    """
    differ = model_differences(before, now)
    refused = [found for found in differ if found.trait.name not in allowed]
    if refused:
        names = ",".join(found.trait.name for found in refused if found.trait.then)
        firm = ", ".join(found.trait.name for found in refused if not found.trait.then)
        ways = "give the checkpoint's values"
        if firm:
            ways += f" ({firm} can never be changed over trained weights)"
        if names:
            ways += f"; a change that is wanted is named: --allow-model-change {names}"
        lines = "".join(f"\n  {found}" for found in refused)
        raise CheckpointError(
            f"{folder} holds another model's weights (checkpoint -> this command line):{lines}\n{ways}"
        )
    return [f"--allow-model-change: {found}: {found.trait.then}" for found in differ]


def check_adapters(before: LoraConfig, now: LoraConfig, folder: Path, *, resumes: bool) -> None:
    """Raises CheckpointError where a run cannot begin from, or resume, what a checkpoint holds.

    before: what of --lora-* the weights in folder are; resumes: whether the optimizer's state continues, too.
    """
    if not before.on:
        if now.on and resumes:
            raise CheckpointError(
                f"{folder} holds a whole model, and --lora-rank trains adapters beside it: add "
                "--finetune, without --keep-optim, to begin with them"
            )
        return
    if not now.on:
        raise CheckpointError(
            f"{folder} holds adapters alone (--lora-rank {before.lora_rank}): give --lora-rank and what "
            "else they were trained with to resume, or merge them with tools/convert.py --merge"
        )
    differ = [
        f"--{name.replace('_', '-')}: {_words(getattr(before, name))} -> {_words(getattr(now, name))}"
        for name in ("lora_rank", "lora_alpha", "lora_targets", "lora_variant")
        if getattr(before, name) != getattr(now, name)
    ]
    if differ:
        lines = "".join(f"\n  {line}" for line in differ)
        raise CheckpointError(
            f"{folder} holds other adapters (checkpoint -> this command line):{lines}\ngive the "
            "checkpoint's values"
        )


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def check_objective(
    manifest: Manifest, now: str, folder: Path, *, goes_on: bool
) -> tuple[list[str], bool]:
    """(notices, whether the head starts anew); now: this run's row of OBJECTIVES.

    Raises CheckpointError where a run would go on (goes_on) with another objective: its optimizer
    state and its curve are those of the old one.
    """
    before = saved_objective(manifest, folder)
    if before == now:
        return [], False
    change = f"--objective: {before} -> {now}"
    if goes_on:
        raise CheckpointError(
            f"{folder} was trained on another objective (checkpoint -> this command line): {change}; "
            f"give --objective {before} to go on, or --finetune to start a run from its weights"
        )
    had, has = OBJECTIVES[before].head, OBJECTIVES[now].head
    if had == has:
        return [change], False
    return [f"{change}: the {had} head is left out, the {has} head starts from --seed"], True


def check_tokenizer(manifest: Manifest, now: dict[str, Any], *, allowed: bool) -> list[str]:
    """Notices; raises CheckpointError where the vocabularies differ, or other ids were trained.

    now: type, fingerprint, vocab_size, padded_vocab_size and eod of this run's tokenizer.
    """
    before = manifest.tokenizer or _of_version_1(manifest)
    where = f"checkpoint {manifest.iteration}"
    if before.get("vocab_size") not in (None, now["vocab_size"]):
        raise CheckpointError(
            f"{where} was trained with a vocabulary of {before['vocab_size']} ids "
            f"({_padded(before)}), this run's tokenizer has {now['vocab_size']} ({_padded(now)}): "
            "give the tokenizer it was trained with; its files lie in the checkpoint's folder "
            f"tokenizer/{_more_rows(before['vocab_size'], now)}"
        )
    differ = [
        f"tokenizer {name}: {before[name]} -> {now[name]}"
        for name in ("type", "fingerprint", "eod")
        if name in before and before[name] != now[name]
    ]
    if differ and not allowed:
        raise CheckpointError(
            f"{where} was trained with another tokenizer of as many ids: {'; '.join(differ)}: give "
            "the one it was trained with (its files lie in the checkpoint's folder tokenizer/), or "
            f"{ALLOW_DIFFERENCES}"
        )
    return [f"{ALLOW_DIFFERENCES}: {line}" for line in differ]


def handed_on(manifest: Manifest, now: dict[str, Any]) -> dict[str, Any]:
    """How texts begin for the model whose weights a run begins with, if the tokenizer is the same."""
    before = manifest.tokenizer
    same = before.get("fingerprint") == now["fingerprint"]
    return {BEGINS: before[BEGINS]} if same and BEGINS in before else {}


def _more_rows(before: int, now: dict[str, Any]) -> str:
    if before <= now["vocab_size"] or now["type"] == "NullTokenizer":
        return ""
    return f"; if its model had more rows than ids, give --vocab-size {before}"


def _padded(tokenizer: dict[str, Any]) -> str:
    padded = tokenizer.get("padded_vocab_size")
    return f"padded to {padded}" if padded is not None else "padded as its layout wanted"


def _of_version_1(manifest: Manifest) -> dict[str, Any]:
    return {"vocab_size": manifest.config.get("model", {}).get("vocab_size")}


def check_data(
    manifest: Manifest | None, now: Identity, *, allowed: bool
) -> tuple[list[str], list[str]]:
    """(notices, warnings); raises DataError naming what changed in the data that is trained on."""
    if manifest is None or not manifest.data:
        return [], []
    differ = changes(manifest.data, now, ("train",))
    others = changes(manifest.data, now, ("valid", "test"))
    warnings = [f"evaluation reads other data: {line}" for line in others if line not in differ]
    if differ and not allowed:
        lines = "".join(f"\n  {line}" for line in differ[:_SHOWN])
        more = f"\n  and {len(differ) - _SHOWN} more" if differ[_SHOWN:] else ""
        raise DataError(
            f"the samples would not continue where checkpoint {manifest.iteration} stopped, because "
            f"the data are others (checkpoint -> this command line):{lines}{more}\nadd {ALLOW_DIFFERENCES} to "
            f"resume at sample {manifest.progress.samples} of the new order, which repeats and "
            "leaves out samples, or give the old data"
        )
    return [f"{ALLOW_DIFFERENCES}: {line}" for line in differ], warnings
