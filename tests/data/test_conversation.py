"""A conversation's ids: tokens where the template has them, and text wherever somebody only says so."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.data.chat.conversation import renderer_of
from megatron_lite.data.chat.formats import CHAT_FORMATS, Message
from megatron_lite.data.chat.templates import Sandbox, TemplateLimits
from megatron_lite.data.tokenizers.build import build_tokenizer
from megatron_lite.data.tokenizers.huggingface import HuggingFaceTokenizer
from tests.support.extras import needs
from tests.support.talks import SPECIAL, chat_tokenizer
from tests.support.tokenizers import gpt2

TALK = [
    Message("system", "Be  brief."), Message("user", " Hi\nthere "), Message("assistant", "Yes? "),
    Message("user", "你好 <|im_end|>"),
]  # fmt: skip
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    chat_tokenizer(tmp_path)
    return tmp_path


def spelled(tokenizer: HuggingFaceTokenizer, ids: list[int]) -> list[str]:
    """Special tokens, and the texts between them."""
    found: list[str] = []
    run: list[int] = []
    special = {number: token for token, number in tokenizer.special_ids.items()}
    for number in [*ids, -1]:
        if number >= 0 and number not in special:
            run.append(number)
            continue
        found += [tokenizer.decode(run)] if run else []
        found += [f"[{special[number]}]"] if number >= 0 else []
        run = []
    return found


EXPECTED = {
    "chatml": [
        "[<|im_start|>]", "system\nBe  brief.", "[<|im_end|>]", "\n",
        "[<|im_start|>]", "user\n Hi\nthere ", "[<|im_end|>]", "\n",
        "[<|im_start|>]", "assistant\nYes? ", "[<|im_end|>]", "\n",
        "[<|im_start|>]", "user\n你好 <|im_end|>", "[<|im_end|>]", "\n",
        "[<|im_start|>]", "assistant\n",
    ],
    "llama-3": [
        "[<s>]", "[<|start_header_id|>]", "system", "[<|end_header_id|>]", "\n\nBe  brief.", "[<|eot_id|>]",
        "[<|start_header_id|>]", "user", "[<|end_header_id|>]", "\n\nHi\nthere", "[<|eot_id|>]",
        "[<|start_header_id|>]", "assistant", "[<|end_header_id|>]", "\n\nYes?", "[<|eot_id|>]",
        "[<|start_header_id|>]", "user", "[<|end_header_id|>]", "\n\n你好 <|im_end|>", "[<|eot_id|>]",
        "[<|start_header_id|>]", "assistant", "[<|end_header_id|>]", "\n\n",
    ],
    "llama-2": [
        "[<s>]", "[INST] <<SYS>>\nBe  brief.\n<</SYS>>\n\nHi\nthere [/INST] Yes? ", "[</s>]",
        "[<s>]", "[INST] 你好 <|im_end|> [/INST]",
    ],
    "plain": ["Be  brief.\n Hi\nthere ", "[<s>]", "Yes? ", "[</s>]", "你好 <|im_end|>", "[<s>]"],
}  # fmt: skip
"""As the models' makers document them."""


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_built_in_formats_equal_their_papers(folder: Path, name: str) -> None:
    tokenizer = HuggingFaceTokenizer(str(folder))
    found = spelled(tokenizer, renderer_of(tokenizer, folder, name).ids(TALK))
    assert found == EXPECTED[name]


def test_a_template_of_the_folder_is_the_built_in_one_and_transformers(folder: Path) -> None:
    transformers = needs("transformers")
    needs("jinja2")
    (folder / "chat_template.jinja").write_text(CHATML)
    tokenizer = HuggingFaceTokenizer(str(folder))
    own = renderer_of(tokenizer, folder)
    assert own.name.endswith("chat_template.jinja")
    assert own.ids(TALK) == renderer_of(tokenizer, folder, "chatml").ids(TALK)
    # of text that spells no token, transformers make the same
    plain = [*TALK[:-1], Message("user", "the other")]
    theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [message._asdict() for message in plain], add_generation_prompt=True, return_dict=False
    )
    assert own.ids(plain) == theirs
    own.sandbox.close()


@pytest.mark.parametrize("template", [
    CHATML, "{{ bos_token }}{{ messages[-1].content | trim }}{{ eos_token }}",
    "{{ '<|im_' }}{{ messages[-1].content }}{{ '|>' }}",
    "{% for c in messages[-1].content %}{{ c }}{% endfor %}",
])  # fmt: skip
def test_text_that_looks_like_a_token_stays_text(folder: Path, template: str) -> None:
    needs("jinja2")
    file = folder / "mine.jinja"
    file.write_text(template)
    tokenizer = HuggingFaceTokenizer(str(folder))
    renderer = renderer_of(tokenizer, folder, str(file))
    written = renderer.ids([Message("user", "plain")])
    for hostile in (*SPECIAL, "<|im_end|><s>", "end|>", "a <|im_", "end", "<|im_end", "start"):
        ids = renderer.ids([Message("user", hostile)])
        assert sum(n in tokenizer.special_ids.values() for n in ids) == sum(
            n in tokenizer.special_ids.values() for n in written
        ), hostile
        assert hostile in tokenizer.decode(ids)
    renderer.sandbox.close()


HOSTILE = {
    "never ends": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
                   "it takes more than 2 seconds"),
    "writes on": ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
                  "it writes more than 1,000,000 characters"),
    "all memory": ("{{ 'x' * 10000000000 }}", "it takes more memory than it may"),
    "a huge number": ("{{ 9 ** (9 ** 9) }}", "it takes more than 2 seconds|it takes more memory"),
    "reaches out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "reads files": ("{% include '/etc/passwd' %}", "no loader"),
    "imports": ("{{ cycler.__init__.__globals__.os.system('id') }}", "SecurityError"),
    "formats": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "SecurityError"),
    "changes": ("{{ messages.append(1) }}", "SecurityError"),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "itself without end"),
    "refuses": ("{{ raise_exception('no system text') }}", "TemplateError: no system text"),
    "no template": ("{% if %}", "TemplateSyntaxError"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.ci] if n == "a huge number" else []) for n in HOSTILE],
)
def test_a_hostile_template_is_an_error_and_harms_nobody(name: str) -> None:
    needs("jinja2")
    template, said = HOSTILE[name]
    seconds = 2.0 if "seconds" in said else 30.0
    sandbox = Sandbox(TemplateLimits(seconds=seconds, characters=1_000_000, memory=400 << 20))
    assert sandbox.render("{{ 1 + 1 }}", {}, "warm").text == "2"
    began = time.monotonic()
    variables = {"messages": [{"role": "user", "content": "x"}]}
    with pytest.raises(
        DataError, match="(?s)here: the chat template cannot be rendered.*(" + said + ")"
    ):
        sandbox.render(template, variables, "here")
    assert time.monotonic() - began < 20
    assert sandbox.render("{{ 1 + 1 }}", {}, "warm").text == "2"  # the next one is none the worse
    sandbox.close()


def test_without_a_template_of_its_own_the_tokens_decide(folder: Path, tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(str(folder))
    chatml = renderer_of(tokenizer, folder)
    ids = tokenizer.special_ids
    assert chatml.name == "chatml" and chatml.ends == {ids["</s>"], ids["<|im_end|>"]}
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 5, 100000, true]}')
    assert renderer_of(tokenizer, folder, "plain").ends == {3, 5, ids["</s>"]}
    data = gpt2(tmp_path)
    words = build_tokenizer(data)
    assert renderer_of(words, tmp_path / "none").name == "plain"
    with pytest.raises(ConfigError, match="has no special token <|im_start|>"):
        renderer_of(words, tmp_path / "none", "chatml")
    with pytest.raises(ConfigError, match="--chat-template mine is no file, and none of chatml"):
        renderer_of(words, tmp_path / "none", "mine")


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ("", "last message must be of user"),
        ("sua", "last message must be of user"),
        ("uu", "message 2 is of user, where assistant"),
        ("sa", "message 2 is of assistant, where user"),
        ("us", "message 2 is of system"),
    ],
)
def test_messages_out_of_turn_are_refused(folder: Path, roles: str, said: str) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    renderer = renderer_of(HuggingFaceTokenizer(str(folder)), folder, "plain")
    with pytest.raises(DataError, match=said):
        renderer.ids([Message(names[role], "x") for role in roles])
