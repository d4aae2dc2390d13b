"""What manual pages say a command is for, as questions with answers and as multiple choice."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from examples.chinese.prose import Section, is_chinese

LETTERS = "ABCD"
_NAMED = re.compile(r"^(?P<name>[\w.+-]+)(?:, ?[\w.+-]+)*\s+[—–-]+\s*(?P<what>.{6,40}?)[。.]?$")


def commands_of(pages: Sequence[tuple[str, Sequence[Section]]]) -> dict[str, str]:
    """Command -> what it is for, from the first lines of its page; each description once."""
    found: dict[str, str] = {}
    for _, sections in pages:
        named = _NAMED.match(sections[0].paragraphs[0]) if sections else None
        if named is None or not is_chinese(named["what"]) or named["what"] in found.values():
            continue
        found.setdefault(named["name"], named["what"])
    return found


def question_about(command: str) -> str:
    """As somebody would ask."""
    return f"命令 {command} 是做什么的？"


def exam_rows(commands: dict[str, str], asked: Sequence[str]) -> bytes:
    """A file of C-Eval's layout: for each of these commands its own description among three others."""
    others = sorted(commands.values())
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["id", "question", *LETTERS, "answer", "explanation"])
    for number, command in enumerate(asked):
        right = commands[command]
        start = others.index(right)
        # far apart in the alphabet: neighbours may say nearly the same
        wrong = [others[(start + step) % len(others)] for step in (41, 97, 163)]
        place = (7 * number + number // 4) % len(LETTERS)
        choices = [*wrong[:place], right, *wrong[place:]]
        writer.writerow([number, question_about(command), *choices, LETTERS[place], ""])
    return file.getvalue().encode()
