"""The `.meta.json` beside a token pair: what is known of it, written by every tool that makes pairs."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_lite.data.indexed import bin_path, idx_path
from megatron_lite.data.masks import MASK_SUFFIX, mask_prefix
from megatron_lite.data.preparing.pair_writer import file_hash
from megatron_lite.data.provenance import SUMS, facts_path
from megatron_lite.storage.disk import Disk, write_atomically


def joined(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of pairs that became one; all were made with one tokenizer."""
    whole = dict(facts[0])
    for name in SUMS:
        if all(name in one for one in facts):
            whole[name] = sum(one[name] for one in facts)
        else:
            whole.pop(name, None)
    chats = [one["chat"] for one in facts if "chat" in one]
    if chats:
        counts = sum((Counter(chat.get("counts", {})) for chat in chats), Counter[str]())
        ends = sorted({end for chat in chats for end in chat["ends"]})
        whole["chat"] = {**chats[0], "ends": ends, "counts": counts}
    whole["append_eod"] = any(one.get("append_eod") for one in facts)
    whole["skipped"] = sum((Counter(one.get("skipped", {})) for one in facts), Counter[str]())
    whole["settings"] = dict(whole.get("settings", {})) | {"--shard": None}
    return whole


def write_facts(prefix: str | os.PathLike[str], facts: Mapping[str, Any], disk: Disk) -> None:
    """The `.meta.json` of a pair that lies there, with the hashes of its files."""
    facts = {**facts, "sha256": _hashes(prefix)}
    if "loss_mask" in facts:
        facts["loss_mask"] = {"suffix": MASK_SUFFIX, "sha256": _hashes(mask_prefix(prefix))}
    text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    write_atomically(facts_path(prefix), text.encode("utf-8"), disk)


def _hashes(prefix: str | os.PathLike[str]) -> dict[str, str]:
    return {"bin": file_hash(bin_path(prefix)), "idx": file_hash(idx_path(prefix))}
