"""TINY, the model that most tests train: what it is, as sections of a config and as flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SEQ, VOCAB = 16, 61

TINY: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": SEQ,
        "vocab_size": VOCAB, "make_vocab_size_divisible_by": 8,
        "hidden_dropout": 0.0, "attention_dropout": 0.0,
    },
    "train": {"micro_batch_size": 2, "global_batch_size": 8, "train_iters": 5},
    "learning_rate": {"lr": 1e-2, "lr_decay_style": "constant"},
    "data": {"mock_data": True},
}  # fmt: skip


def changed(**changes: Any) -> dict[str, dict[str, Any]]:
    """TINY with changes as section__field=value."""
    wanted = {section: dict(fields) for section, fields in TINY.items()}
    for name, value in changes.items():
        section, _, field = name.partition("__")
        wanted.setdefault(section, {})[field] = value
    return wanted


def tiny_flags(**changes: Any) -> list[str]:
    """The same as a command line; None leaves a flag away."""
    words = []
    for name, value in (item for fields in changed(**changes).values() for item in fields.items()):
        if value is not None:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return words


def with_flags(argv: Sequence[str], *words: str, without: Sequence[str] = ()) -> list[str]:
    """The command line with the words' flags instead of its own of the same name, `without` some."""
    flags: dict[str, list[str]] = {}
    values: list[str] = []
    for word in (*argv, *words):
        if word.startswith("--"):
            values = flags[word] = []
        else:
            values.append(word)
    return [w for flag, given in flags.items() if flag not in without for w in (flag, *given)]
