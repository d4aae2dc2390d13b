"""What of a conversation is learned: every token of the answers and of their ends, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.config.errors import DataError
from megatron_lite.data.chat.conversation import Renderer, renderer_of
from megatron_lite.data.chat.formats import CHAT_FORMATS, Message
from megatron_lite.data.chat.lessons import Dialogue, Lesson, lessons_of
from megatron_lite.data.taught import files_with, taught_of
from megatron_lite.data.tokenizers.build import build_tokenizer
from megatron_lite.data.tokenizers.huggingface import HuggingFaceTokenizer
from tests.support.extras import needs
from tests.support.talks import chat_tokenizer, talk, tuned
from tests.support.tokenizers import gpt2, sentencepiece

ONE = [Message("user", "the one"), Message("assistant", " Yes \n")]
THREE = [
    Message("system", "Be  brief."), Message("user", " Hi\nthere "), Message("assistant", "Yes? "),
    Message("user", "你好 <|im_end|>"), Message("assistant", "</s>好"),
    Message("user", "the end"), Message("assistant", "\nthe last"),
]  # fmt: skip
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ONLY_THE_LAST_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' }}"
    "{% if loop.last or loop.index == messages | length - 1 %}{{ 'Short. ' }}{% endif %}"
    "{{ m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
"""As Mistral's: what stands before the last question stands nowhere else."""


@pytest.fixture
def rendered(tmp_path: Path) -> Callable[[str], Renderer]:
    """A renderer of a name, or of a template's text."""
    chat_tokenizer(tmp_path)
    tokenizer = HuggingFaceTokenizer(str(tmp_path))

    def make(template: str) -> Renderer:
        if template in CHAT_FORMATS:
            return renderer_of(tokenizer, tmp_path, template)
        needs("jinja2")
        (tmp_path / "mine.jinja").write_text(template)
        return renderer_of(tokenizer, tmp_path, str(tmp_path / "mine.jinja"))

    return make


def spelled(renderer: Renderer, lesson: Lesson) -> list[tuple[int, str]]:
    """Stretches of one mask, special tokens in brackets."""
    names = {number: f"[{name}]" for name, number in renderer.vocabulary.special.items()}
    found: list[tuple[int, list[int]]] = []
    for token, learned in zip(lesson.ids, lesson.mask, strict=True):
        if not found or found[-1][0] != learned:
            found.append((learned, []))
        found[-1][1].append(token)
    said = []
    for learned, ids in found:
        text, run = "", []
        for token in [*ids, None]:
            if token is None or token in names:
                text += renderer.vocabulary.tokenizer.decode(run)
                text += "" if token is None else names[token]
                run = []
            else:
                run.append(token)
        said.append((learned, text))
    return said


EXPECTED = {
    "chatml": [
        (0, "[<|im_start|>]system\nBe  brief.[<|im_end|>]\n[<|im_start|>]user\n Hi\nthere [<|im_end|>]\n"
            "[<|im_start|>]assistant\n"), (1, "Yes? [<|im_end|>]"),
        (0, "\n[<|im_start|>]user\n你好 <|im_end|>[<|im_end|>]\n[<|im_start|>]assistant\n"),
        (1, "</s>好[<|im_end|>]"),
        (0, "\n[<|im_start|>]user\nthe end[<|im_end|>]\n[<|im_start|>]assistant\n"),
        (1, "\nthe last[<|im_end|>]"), (0, "\n"),
    ],
    "llama-3": [
        (0, "[<s>][<|start_header_id|>]system[<|end_header_id|>]\n\nBe  brief.[<|eot_id|>]"
            "[<|start_header_id|>]user[<|end_header_id|>]\n\nHi\nthere[<|eot_id|>]"
            "[<|start_header_id|>]assistant[<|end_header_id|>]\n\n"), (1, "Yes?[<|eot_id|>]"),
        (0, "[<|start_header_id|>]user[<|end_header_id|>]\n\n你好 <|im_end|>[<|eot_id|>]"
            "[<|start_header_id|>]assistant[<|end_header_id|>]\n\n"), (1, "</s>好[<|eot_id|>]"),
        (0, "[<|start_header_id|>]user[<|end_header_id|>]\n\nthe end[<|eot_id|>]"
            "[<|start_header_id|>]assistant[<|end_header_id|>]\n\n"), (1, "the last[<|eot_id|>]"),
    ],
    "llama-2": [
        (0, "[<s>][INST] <<SYS>>\nBe  brief.\n<</SYS>>\n\nHi\nthere [/INST]"), (1, " Yes? [</s>]"),
        (0, "[<s>][INST] 你好 <|im_end|> [/INST]"), (1, " </s>好 [</s>]"),
        (0, "[<s>][INST] the end [/INST]"), (1, " the last [</s>]"),
    ],
    "plain": [
        (0, "Be  brief.\n Hi\nthere [<s>]"), (1, "Yes? [</s>]"), (0, "你好 <|im_end|>[<s>]"),
        (1, "</s>好[</s>]"), (0, "the end[<s>]"), (1, "\nthe last[</s>]"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_each_answer_and_its_end_are_learned_and_nothing_else(
    rendered: Callable[[str], Renderer], name: str
) -> None:
    renderer = rendered(name)
    (lesson,) = lessons_of(renderer, Dialogue.of(THREE))
    assert spelled(renderer, lesson) == EXPECTED[name]
    assert lesson.ends <= renderer.ends
    # the answers' bytes, the spaces that a template puts around one, and three ends
    around = {"llama-2": 4, "llama-3": -2}.get(name, 0)
    assert (
        sum(lesson.mask) == len("Yes? </s>") + len("好".encode()) + len("\n last") + 1 + 3 + around
    )
    # what the model is asked at the end is what the lesson has before the last answer
    asked = renderer.ids(THREE[:-1])
    assert lesson.ids[: len(asked)] == asked and not any(lesson.mask[len(asked) - 1 : len(asked)])


def test_a_template_gives_what_the_built_in_format_gives(
    rendered: Callable[[str], Renderer],
) -> None:
    own, ours = rendered(CHATML), rendered("chatml")
    for messages in (ONE, THREE):
        assert lessons_of(own, Dialogue.of(messages)) == lessons_of(ours, Dialogue.of(messages))
    own.sandbox.close()


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_the_kept_template_of_a_built_in_format_writes_the_same(
    rendered: Callable[[str], Renderer], name: str
) -> None:
    ours = rendered(name)
    theirs = rendered("{# a comment #}" + ours.as_jinja())  # so that it is not known as ours
    assert theirs.template is not None
    for messages in (ONE, THREE, [Message("system", ""), *ONE]):
        assert lessons_of(theirs, Dialogue.of(messages)) == lessons_of(ours, Dialogue.of(messages))
        assert theirs.ids(messages[:-1]) == ours.ids(messages[:-1])
    theirs.sandbox.close()
    assert rendered(ours.as_jinja()).name == name  # and is rendered without jinja2


def test_an_answer_that_shares_a_token_with_the_prompt_begins_behind_it(
    rendered: Callable[[str], Renderer],
) -> None:
    """ "t" of the template and "he" of the answer are one token "the": no prompt ends inside of it."""
    template = "{% for m in messages %}{{ '<s>t' if m.role == 'user' else m.content + '</s>' }}{% endfor %}"
    renderer = rendered(template)
    (lesson,) = lessons_of(
        renderer, Dialogue.of([Message("user", "x"), Message("assistant", "he end")])
    )
    assert spelled(renderer, lesson) == [(0, "[<s>]the"), (1, " end[</s>]")]
    renderer.sandbox.close()


def test_where_a_beginning_is_none_of_the_whole_each_answer_is_a_sample(
    rendered: Callable[[str], Renderer],
) -> None:
    renderer = rendered(ONLY_THE_LAST_SYSTEM)
    found = lessons_of(renderer, Dialogue.of(THREE[1:5]))
    assert [spelled(renderer, lesson) for lesson in found] == [
        [(0, "[<s>][INST] Short.  Hi\nthere  [/INST]"), (1, " Yes? [</s>]")],
        [(0, "[<s>][INST]  Hi\nthere  [/INST] Yes? [</s>][<s>][INST] Short. 你好 <|im_end|> [/INST]"),
         (1, " </s>好[</s>]")],
    ]  # fmt: skip
    renderer.sandbox.close()


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ '<s>' + m.content }}{% endfor %}", "puts no special token behind"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}</s>{% endfor %}",
         "is no beginning of what it writes with it"),
        ("{{ raise_exception('no') }}", "cannot be rendered"),
    ],
    ids=["no end", "no beginning", "fails"],
)  # fmt: skip
def test_a_template_that_nothing_can_be_learned_from_is_refused_by_name(
    rendered: Callable[[str], Renderer], template: str, said: str
) -> None:
    renderer = rendered(template)
    with pytest.raises(DataError, match=rf"mine\.jinja: .*{said}"):
        lessons_of(renderer, Dialogue.of(ONE))
    renderer.sandbox.close()


@pytest.mark.parametrize("make", [gpt2, sentencepiece])
def test_other_tokenizers_learn_the_answer_and_its_end(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    """Llama-2's space before an answer belongs to its first piece; pad equal to eos changes nothing."""
    tokenizer = build_tokenizer(make(tmp_path))  # type: ignore[arg-type]
    renderer = renderer_of(tokenizer, tmp_path, "llama-2")
    messages = [Message("user", "the thing"), Message("assistant", "they think")]
    (lesson,) = lessons_of(renderer, Dialogue.of(messages))
    learned = [token for token, counts in zip(lesson.ids, lesson.mask, strict=True) if counts]
    assert learned[-1] == tokenizer.eod == lesson.ids[-1]
    assert tokenizer.decode(learned[:-1]).strip() == "they think"
    asked = renderer.ids(messages[:1])
    assert lesson.ids[: len(asked)] == asked and not any(lesson.mask[: len(asked)])


@pytest.mark.parametrize("make", [gpt2, sentencepiece])
def test_a_template_finds_the_ends_of_a_tokenizer_whose_files_name_none(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    needs("jinja2")
    tokenizer = build_tokenizer(make(tmp_path))  # type: ignore[arg-type]
    (tmp_path / "mine.jinja").write_text("{# mine #}" + CHAT_FORMATS["llama-2"].jinja)
    mine = renderer_of(tokenizer, tmp_path, str(tmp_path / "mine.jinja"))
    ours = renderer_of(tokenizer, tmp_path, "llama-2")
    assert mine.template is not None
    assert lessons_of(mine, Dialogue.of(THREE)) == lessons_of(ours, Dialogue.of(THREE))
    mine.sandbox.close()


def test_what_was_taught_is_kept_with_the_model(tmp_path: Path) -> None:
    _, prefix = tuned(tmp_path / "a", [talk("a", "b")], template="chatml")
    way = taught_of(prefix)
    assert way is not None and way.ends == (259,)
    kept = files_with({"generation_config.json": b'{"top_p": 0.5}'}, way, [261])
    assert kept["chat_template.jinja"].decode() == way.text
    assert b'"top_p": 0.5' in kept["generation_config.json"]
    again = files_with(kept, way, [261])
    assert again == kept  # what a later run finds is what it would write
