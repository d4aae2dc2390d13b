"""The text of a ds.json: JSON with what Hjson adds, or refused with its line."""

from __future__ import annotations

import base64

import pytest

from megatron_lite.config.flags.parser import parse


def test_the_text_may_have_comments_and_come_as_base64(ds) -> None:
    text = '{ # a comment\n  gradient_clipping: 0.5, // one more\n  "fp16": {"enabled": true,},\n}'
    for config in (ds.parse(text).config, parse(
        ["--deepspeed", f"--deepspeed_config={base64.urlsafe_b64encode(text.encode()).decode()}"]
    ).config):  # fmt: skip
        assert config.optim.clip_grad == 0.5 and config.precision.fp16


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "ds.json:1: not valid JSON: a DeepSpeed configuration is one object"),
        ('{"a": 1, "a": 2}', "the key a stands at line 1 already"),
        ('{\n "fp16": {"enabled": True}\n}', "ds.json:2: not valid JSON: write true"),
        ('{"optimizer": {"type": Adam}}', "a value belongs here, text in quotes; found 'Adam}}'"),
        ('{"gradient_clipping": 1e999}', "a number must be finite"),
        ('{"a": ' + "[" * 100, "more than 40 levels"),
        ('{"a": 1 "b": 2}', "a comma or } belongs here"),
        ("{ /* ", "a comment /* has no end"),
    ],
)
def test_what_is_no_json_is_refused_with_its_line(ds, text, words) -> None:
    assert words in ds.refusal(text)
