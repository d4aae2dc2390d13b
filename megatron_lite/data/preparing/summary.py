"""Results of a preprocessing run, for the progress bar, the last lines and the facts file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from megatron_lite.data.preparing.chat_encode import CUT, KEPT, LEARNED, PARTED, WEIGHTLESS
from megatron_lite.data.provenance import KeyCounts


@dataclass(slots=True)
class Summary:
    """What a whole run gave so far."""

    prefixes: list[str]
    dtype: str
    tokenizer: str
    fingerprint: str
    keys: list[KeyCounts]
    end_of_document: str = ""
    unknown: str = ""  # the token for what the vocabulary lacks; empty where there is none
    skipped: Counter[str] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)  # of conversations
    input_bytes: int = 0  # of texts and keys, decompressed
    read_bytes: int = 0  # of files on disk
    read_before: int = 0  # of these by the run that --resume continues
    total_bytes: int = 0  # of files on disk there are to read
    seconds: float = 0.0
    resumed: bool = False
    hashes: list[dict[str, str]] = field(default_factory=list)

    @property
    def documents(self) -> int:
        """Documents so far."""
        return self.keys[0].documents

    @property
    def tokens(self) -> int:
        """Tokens of all keys so far."""
        return sum(key.tokens for key in self.keys)


def chat_line(summary: Summary) -> str:
    """What was made of conversations, in a line."""
    told, tokens = summary.told, summary.keys[0].tokens
    share = told[LEARNED] / max(tokens, 1)
    return (
        f"conversations: {told[KEPT]} samples, {told[LEARNED]} of {tokens} tokens are learned "
        f"({share:.1%}); {told[CUT]} truncated to --seq-length, {told[PARTED]} parted into a sample for "
        f"each answer; {told[WEIGHTLESS]} dropped without a token to learn"
    )
