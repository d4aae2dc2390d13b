"""Texts that are easy to read, and texts that are hard to split."""

from __future__ import annotations

from megatron_lite.data.tokenizers import engines

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, doesn't it? I'll see.",
    "def f(x):\n\treturn x ** 2  # 3,14\r\n",
    "今天天气很好，我们去公园玩吧！（真的）",
    "naïve café, Straße, Ελλάδα, русский язык 123",
]


def hard_texts(step: int = 211) -> list[str]:
    """Every so manieth code point between letters, digits and spaces, and very long runs."""
    points = [c for c in range(0, 0x110000, step) if not 0xD800 <= c < 0xE000]
    return [
        *engines.HARD,
        *(f"a{chr(c)}b1{chr(c)}2 {chr(c)}, {chr(c)} " for c in points),
        "a" * 100_000,
        " " * 20_000 + "x",
        "字" * 34_000,
        "!" * 100_000,
        "".join(chr(c) for c in range(32)) * 50,
    ]
