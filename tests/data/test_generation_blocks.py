"""Templates that say by {% generation %} what the assistant's is: learned is that, as transformers have it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_lite.config.errors import DataError
from megatron_lite.data.chat.conversation import Renderer, renderer_of
from megatron_lite.data.chat.formats import Message
from megatron_lite.data.chat.lessons import Dialogue, lessons_of
from megatron_lite.data.chat.templates import Sandbox
from megatron_lite.data.tokenizers.huggingface import HuggingFaceTokenizer
from tests.support.extras import needs
from tests.support.talks import chat_tokenizer

ASKED = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
ENDS = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    "the answer": """
        {%- for m in messages %}
            {%- if m.role == 'assistant' %}
                {{- '<|im_start|>assistant\n' }}
                {%- generation %}
                    {%- set said = m.content | trim %}
                    {{- said + '<|im_end|>' }}
                {%- endgeneration %}
                {{- '\n' }}
            {%- else %}""" + ASKED + """{%- endif %}
        {%- endfor %}
        {%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
        """,
    "with what is around": "{% for m in messages %}{% if m.role != 'assistant' %}" + ASKED
        + "{% else %}{% generation %}" + ASKED + "{% endgeneration %}{% endif %}" + ENDS,
    "in two": "{% for m in messages %}{% if m.role != 'assistant' %}" + ASKED + "{% else %}<|im_start|>"
        "{% generation %}thinks<s>{% endgeneration %}reads {% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% endif %}" + ENDS,
    "the last": "{% macro say(m) %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{% if loop.last and m.role == 'assistant' %}{{ say(m) }}{% else %}"
        "{{ m.content }}</s>{% endif %}{% endfor %}",
    "none of it": "{% for m in messages %}{{ m.content }}</s>{% if m.role == 'tool' %}{% generation %}"
        "{% endgeneration %}{% endif %}{% endfor %}",
}  # fmt: skip
TALK = [
    Message("system", "Be  brief."), Message("user", " Hi\nthere "), Message("assistant", " Yes? "),
    Message("user", "the end"), Message("assistant", "你好\n the last"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    chat_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def rendered(folder: Path) -> Iterator[Callable[[str], Renderer]]:
    needs("jinja2")
    sandbox = Sandbox()

    def make(template: str) -> Renderer:
        file = folder / "mine.jinja"
        file.write_text(template)
        renderer = renderer_of(HuggingFaceTokenizer(str(folder)), folder, str(file))
        return dataclasses.replace(renderer, sandbox=sandbox)

    yield make
    sandbox.close()


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_mask_are_those_of_transformers(
    folder: Path, rendered: Callable[[str], Renderer], name: str
) -> None:
    theirs = needs("transformers").AutoTokenizer.from_pretrained(folder)
    renderer = rendered(TEMPLATES[name])
    (lesson,) = lessons_of(renderer, Dialogue.of(TALK))
    said = [message._asdict() for message in TALK]
    found = theirs.apply_chat_template(
        said, chat_template=TEMPLATES[name], return_assistant_tokens_mask=True, return_dict=True
    )
    assert lesson.ids == found["input_ids"]
    assert lesson.mask == found["assistant_masks"]
    assert any(lesson.mask) == (name != "none of it")
    assert renderer.ids(TALK[:-1]) == theirs.apply_chat_template(
        said[:-1], chat_template=TEMPLATES[name], add_generation_prompt=True, return_dict=False
    )


def test_a_message_that_spells_a_token_within_a_block_stays_text(
    rendered: Callable[[str], Renderer],
) -> None:
    renderer = rendered(TEMPLATES["the answer"])
    hostile = [Message("user", "<|im_end|>"), Message("assistant", "a<|im_end|>b\ufdd0\ufdd1")]
    (lesson,) = lessons_of(renderer, Dialogue.of(hostile))
    learned = [token for token, counts in zip(lesson.ids, lesson.mask, strict=True) if counts]
    end = renderer.vocabulary.special["<|im_end|>"]
    assert learned == [*renderer.vocabulary.text("a<|im_end|>b\ufdd0\ufdd1"), end]
    assert lesson.ids.count(end) == 2 and lesson.ends == {end}


def test_an_answer_that_is_only_read_has_a_block_that_is_not_learned(
    rendered: Callable[[str], Renderer],
) -> None:
    renderer = rendered(TEMPLATES["the answer"])
    (both,) = lessons_of(renderer, Dialogue.of(TALK))
    alone = [lessons_of(renderer, Dialogue(tuple(TALK), frozenset({n})))[0].mask for n in (2, 4)]
    assert [sum(mask) for mask in alone] == [len("Yes?") + 1, len("你好\n X last".encode()) + 1]
    assert [a + b for a, b in zip(*alone, strict=True)] == both.mask
    with pytest.raises(DataError, match=r"writes 4 \{% generation %\} blocks for 2 answers"):
        lessons_of(rendered(TEMPLATES["in two"]), Dialogue(tuple(TALK), frozenset({4})))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("{% generation %}{{ m.content }}{% endgeneration %}</s>", "behind the token that ends"),
        ("{% generation %}<s>{{ m.content }}{% endgeneration %}</s>", "behind the token that ends"),
        ("{% set all %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endset %}{{ all[:-1] }}",
         "writes a part of what stands in {% generation %}"),
        ("{% generation %}{{ m.content }}</s>", "TemplateSyntaxError: .*'?endgeneration"),
    ],
    ids=["the end outside", "only the front inside", "cut through", "never ends"],
)  # fmt: skip
def test_a_block_that_cannot_be_learned_from_is_refused_by_name(
    rendered: Callable[[str], Renderer], answer: str, said: str
) -> None:
    renderer = rendered("{% for m in messages %}" + answer + "{% endfor %}")
    with pytest.raises(DataError, match=rf"mine\.jinja: .*{said}"):
        lessons_of(renderer, Dialogue.of(TALK[1:3]))
