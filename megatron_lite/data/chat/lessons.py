"""What of a conversation is learned: the answers and the token that ends each, and nothing else.

Where an answer begins and ends is asked of the template, never searched for in the text.  One that says
so by {% generation %} ... {% endgeneration %} is believed: what it writes there is learned, and only that.
Of another:

    prompt   the conversation up to the answer, as the model is asked         ... assistant\\n
    answered the conversation up to the answer, as it stands when it is over  ... assistant\\nYes.<end>\\n
    whole    all of it

An answer is what `answered` has behind `prompt`, up to its last special token, which ends it.  Where
prompt and answered are no beginnings of the whole (a template that changes what was said before),
each answer becomes a sample of its own, with what is before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_lite.config.errors import DataError
from megatron_lite.data.chat.conversation import ChatVocabulary, Renderer
from megatron_lite.data.chat.formats import Message, check_turns
from megatron_lite.data.chat.pieces import GenerationBlock, Rendered, TextPlace


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation, and the numbers of its answers that are learned."""

    messages: tuple[Message, ...]
    learned: frozenset[int]

    @classmethod
    def of(cls, messages: Sequence[Message]) -> Dialogue:
        """One of which every answer is learned."""
        answers = (n for n, message in enumerate(messages) if message.role == "assistant")
        return cls(tuple(messages), frozenset(answers))


@dataclass(frozen=True, slots=True)
class Lesson:
    """ids: a sample; mask: 1 for each of them that is learned, 0 for what is only read.

    ends: the tokens that end its answers.
    """

    ids: list[int]
    mask: list[int]
    ends: frozenset[int]


class _Span(NamedTuple):
    """What is learned, between two places; ending: the piece with the token that ends it."""

    begin: TextPlace
    end: TextPlace
    ending: int


def lessons_of(renderer: Renderer, dialogue: Dialogue) -> list[Lesson]:
    """The samples of a conversation: one, or one for each answer where the template asks for that.

    Raises DataError for messages out of turn, and for a template that cannot be learned from.
    """
    messages = dialogue.messages
    check_turns(messages)
    whole, blocks = renderer.rendering(messages, asks=False)
    if blocks is not None:
        return [_lesson(renderer, whole, _spans_of_blocks(renderer, dialogue, whole, blocks))]
    spans = [_span(renderer, messages, number, whole) for number in sorted(dialogue.learned)]
    found = [span for span in spans if span is not None]
    if len(found) == len(spans):
        return [_lesson(renderer, whole, found)]
    return [_alone(renderer, messages, number) for number in sorted(dialogue.learned)]


def _spans_of_blocks(
    renderer: Renderer,
    dialogue: Dialogue,
    whole: Sequence[Rendered],
    blocks: Sequence[GenerationBlock],
) -> list[_Span]:
    """Of all blocks, or of those of the answers that are learned."""
    answers = Dialogue.of(dialogue.messages).learned
    if dialogue.learned != answers:
        if len(blocks) != len(answers):
            raise DataError(
                f"{renderer.name}: this chat template writes {len(blocks)} {{% generation %}} blocks for "
                f"{len(answers)} answers, so that nothing says which are of those that are only read"
            )
        each = zip(sorted(answers), blocks, strict=True)
        blocks = [block for number, block in each if number in dialogue.learned]
    spans = []
    for begin, end in blocks:
        special = [n for n in range(begin.piece, end.piece) if isinstance(whole[n], int)]
        behind = whole[end.piece] if end.characters else ""
        if not special or (isinstance(behind, str) and behind[: end.characters].strip()):
            raise DataError(
                f"{renderer.name}: this chat template has no special token at the end of what stands in "
                "{% generation %}: a model would never learn to stop - put {% endgeneration %} behind the "
                "token that ends an answer"
            )
        spans.append(_Span(begin, end, special[-1]))
    return spans


def _alone(renderer: Renderer, messages: Sequence[Message], number: int) -> Lesson:
    """An answer with what is before it."""
    until = messages[: number + 1]
    whole = renderer.pieces(until, asks=False)
    span = _span(renderer, until, number, whole)
    if span is None:
        raise DataError(
            f"{renderer.name}: what this chat template writes before answer {number + 1} (message "
            "number) is no beginning of what it writes with it, so that nothing says where the answer "
            "begins - choose another with --chat-template"
        )
    return _lesson(renderer, whole, [span])


def _span(
    renderer: Renderer, messages: Sequence[Message], number: int, whole: Sequence[Rendered]
) -> _Span | None:
    """Where an answer stands in a rendering; None where that does not begin as it did before."""
    begin = _place(renderer.pieces(messages[:number], asks=True), whole)
    last = number + 1 == len(messages)
    answered = whole if last else renderer.pieces(messages[: number + 1], asks=False)
    end = _place(answered, whole)
    if begin is None or end is None or end < begin:
        return None
    special = [n for n in range(begin.piece, end.piece) if isinstance(whole[n], int)]
    behind = answered[-1] if answered else ""
    if not special or (isinstance(behind, str) and behind.strip()):
        raise DataError(
            f"{renderer.name}: this chat template puts no special token behind an answer: a model would "
            "never learn to stop - choose another with --chat-template"
        )
    return _Span(begin, TextPlace(special[-1] + 1, 0), special[-1])


def _place(beginning: Sequence[Rendered], whole: Sequence[Rendered]) -> TextPlace | None:
    """Where a rendering ends in another; None where it is no beginning of it."""
    if not beginning:
        return TextPlace(0, 0)
    last = len(beginning) - 1
    if list(whole[:last]) != list(beginning[:last]) or len(whole) <= last:
        return None
    mine, theirs = beginning[last], whole[last]
    if mine == theirs:
        return TextPlace(last + 1, 0)
    if isinstance(mine, str) and isinstance(theirs, str) and theirs.startswith(mine):
        return TextPlace(last, len(mine))
    return None


def _lesson(renderer: Renderer, whole: Sequence[Rendered], spans: Sequence[_Span]) -> Lesson:
    ids: list[int] = []
    begins: list[int] = []  # of each piece, its first token
    for piece in whole:
        begins.append(len(ids))
        ids += renderer.encode([piece])

    def tokens_before(place: TextPlace) -> int:
        if not place.characters:
            return begins[place.piece] if place.piece < len(whole) else len(ids)
        inside = _tokens_before(renderer, whole[place.piece], place.characters)
        return begins[place.piece] + inside

    mask = [0] * len(ids)
    for span in spans:
        first, last = tokens_before(span.begin), tokens_before(span.end)
        mask[first:last] = [1] * (last - first)
    return Lesson(ids, mask, frozenset(_token(whole[span.ending]) for span in spans))


def _token(piece: Rendered) -> int:
    assert isinstance(piece, int), piece
    return piece


def _tokens_before(renderer: Renderer, piece: Rendered, characters: int) -> int:
    """Tokens of a text that begin before its first so many characters are over.

    One that begins before and ends behind counts: no prompt ends inside of it, so it is not learned.
    """
    assert isinstance(piece, str), piece
    vocabulary, before = renderer.vocabulary, piece[:characters]
    head, ids = vocabulary.text(before), vocabulary.text(piece)
    if ids[: len(head)] == head:
        return len(head)
    return _tokens_that_hold(vocabulary, ids, before)


def _tokens_that_hold(vocabulary: ChatVocabulary, ids: Sequence[int], text: str) -> int:
    """The fewest first tokens whose text begins so."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        if vocabulary.tokenizer.decode(ids[:middle]).startswith(text):
            high = middle
        else:
            low = middle + 1
    if not vocabulary.tokenizer.decode(ids[:low]).startswith(text):
        raise DataError(
            "the tokenizer changes the text where an answer begins, so that no token can be said to be "
            "the first of the answer"
        )
    return low
