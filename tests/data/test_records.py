"""Records become the right texts; what is no record has a reason and a place."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.data.preparing.parts import InputPlace, RecordBatch
from megatron_lite.data.preparing.records import Reader
from tests.support.extras import needs

TEMPLATES: list[tuple[str, dict[str, Any], str]] = [
    ("{text}", {"text": "a"}, "a"),
    ("{title}\\n\\n{content}", {"title": "题", "content": "文"}, "题\n\n文"),
    ("问：{问}\n答：{答}", {"问": "1+1？", "答": 2}, "问：1+1？\n答：2"),
    (
        "{instruction}\n{input?}\n{output}",
        {"instruction": "i", "input": "", "output": "o"},
        "i\no",
    ),
    ("{instruction}\n{input?}\n{output}", {"instruction": "i", "output": "o"}, "i\no"),
    ("{instruction}\n{input?}", {"instruction": "i", "input": "x"}, "i\nx"),
    ("{a?}{b?}\n\n{c}", {"c": "x"}, "\nx"),
    ("输入：{input?}\n{c}", {"input": None, "c": "x"}, "输入：\nx"),
    ("{段落[].内容}", {"段落": [{"内容": "一"}, {"内容": "二"}]}, "一\n二"),
    ("{a.b.c}", {"a": {"b": {"c": "deep"}}}, "deep"),
    ("{{literal}} {x}\\t!", {"x": "{y}"}, "{literal} {y}\t!"),
    ("{paragraphs[]}", {"paragraphs": []}, ""),
]


def parse(reader: Reader, data: bytes) -> Any:
    return reader.parse(RecordBatch("a.json", 1, InputPlace(), len(data), data))


@pytest.mark.parametrize("template, record, text", TEMPLATES)
def test_a_template_gives_the_text(template: str, record: dict[str, Any], text: str) -> None:
    parsed = parse(Reader(template=template), json.dumps(record).encode())
    assert parsed.keys[0].texts == [text] and parsed.keys[0].counts == [1]


@pytest.mark.parametrize(
    "template, record, message",
    [
        ("{title}{text}", {"text": "x"}, r"no key 'title' for the template, it has \['text'\]"),
        ("{a.b}", {"a": "x"}, "no key 'b' for the template, it is no object"),
        ("{a[]}", {"a": "x"}, "key 'a' is str, not a list"),
        ("{a}", {"a": {"b": 1}}, "key 'a' is dict, not text"),
        ("{a}", {"a": True}, "key 'a' is bool, not text"),
        ("{a}", {"a": "\ud800"}, "the template's text holds a lone surrogate"),
    ],
)
def test_a_record_without_the_fields_is_bad(
    template: str, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=rf"a\.json:1: {message}"):
        parse(Reader(template=template), json.dumps(record).encode())


@pytest.mark.parametrize("template", ["", "no field", "{}", "{a.}", "{a", "a}", "{a..b}", "{[]}"])
def test_a_template_that_is_none_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="--template"):
        Reader(template=template)


def test_columns_are_the_top_level_keys() -> None:
    assert Reader(template="{a.b} {c[].d?} {a.e}").columns == ["a", "c"]
    assert Reader(("x", "y")).columns == ["x", "y"]


LINES = {
    "no JSON": b'{"text": ',
    "no object": b'["a"]',
    "key missing": b'{"txt": 1}',
    "no text": b'{"text": null}',
    "no UTF-8": b'{"text": "\xff"}',
    "lone surrogate": b'{"text": "\\ud800"}',
}


@pytest.mark.parametrize("fast", [True, False])
def test_skipped_lines_are_counted_by_reason_with_and_without_orjson(
    monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    if fast:
        needs("orjson")
    else:
        monkeypatch.setitem(sys.modules, "orjson", None)
    good = [
        b'{"text": "a"}',
        b"",
        b'\r{"text": "\\u4f60", "x": NaN}\r',
        b'{"text": "b", "other": "\\ud800"}',
        b'{"text": ["c", "d"], "n": 123456789012345678901234567890}',
        b'{"text": "first", "text": "last"}',
    ]
    parsed = parse(Reader(on_bad_line="skip"), b"\n".join([*LINES.values(), *good]))
    assert parsed.skipped == {reason: 1 for reason in LINES}
    assert parsed.keys[0].texts == ["a", "你", "b", "c", "d", "last"]
    assert parsed.keys[0].counts == [1, 1, 1, 2, 1]
    assert parsed.lines == [6, 8, 9, 10, 11]


def test_the_message_shows_eighty_characters_of_the_line() -> None:
    line = ('{"text": 1, "x": "' + "字" * 200 + '"}').encode()
    with pytest.raises(DataError) as caught:
        parse(Reader(), b'{"text": "a"}\n' + line)
    text = str(caught.value)
    assert text.startswith("a.json:2: key 'text' is int") and "--on-bad-line skip" in text
    assert text.endswith(line.decode()[:80])


@pytest.mark.parametrize("line", [
    b'{"text": "\\ud800"}',
    b'{"text": ["fine", "\\udfff"]}',
    b'{"text": "\\ud800", "score": NaN}',
])  # fmt: skip
@pytest.mark.parametrize("orjson", [True, False])
def test_half_a_pair_is_found_whoever_reads_the_line(
    line: bytes, orjson: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message shows the line itself, without the newline that ended it."""
    if not orjson:
        monkeypatch.setitem(sys.modules, "orjson", None)
    good = b'{"text": "na\xc3\xafve", "score": NaN}'
    with pytest.raises(DataError) as caught:
        parse(Reader(), good + b"\n" + line + b"\n" + good)
    assert ":2: " in str(caught.value) and "lone surrogate" in str(caught.value)
    assert str(caught.value).endswith(line.decode())
    assert parse(Reader(longest=len(good)), good + b"\n" + good).lines == [0, 1]
