"""What is kept beside samples of conversations: how they were written, which must not change on resuming."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

from megatron_lite.data.chat.conversation import Renderer
from megatron_lite.data.preparing.chat_encode import ChatJob


def chat_settings(job: ChatJob, renderer: Renderer) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    template = (renderer.template or renderer.name).encode()
    recipe = job.recipe
    return {
        "--chat": True,
        "--chat-template": hashlib.sha256(template).hexdigest()[:16],
        "--chat-shape": job.shape,
        "--chat-user and others": None if recipe is None else [recipe.user, recipe.assistant,
                                                               recipe.system],
        "--seq-length": job.seq_length,
    }  # fmt: skip


def chat_facts(
    renderer: Renderer, ends: Collection[int], counts: Mapping[str, int]
) -> dict[str, Any]:
    """For `.meta.json`: name and text of the template, the ids that end an answer, what was counted."""
    return {
        "template": renderer.name if renderer.template is None else "",
        "text": renderer.as_jinja(),
        "ends": sorted(ends),
        "counts": dict(counts),
    }
