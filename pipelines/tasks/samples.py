"""A text with questions in it and their right answers, and how a task makes one.

Axes: N tokens of a text, a tokens of an answer.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from pipelines.tasks.texts import Background, Encodes, Insert, Stream, joined


class Answer(NamedTuple):
    """What must be written at a place of the text."""

    at: int  # place of its first token
    tokens: np.ndarray  # (a,) int32
    num_choices: float  # chance is 1 / num_choices; infinite: there is no telling


class Scorer(NamedTuple):
    """A mark in [0, 1] for what a model writes freely behind the text without its last answer."""

    metric: str
    mark: Callable[[str], float]


@dataclass(frozen=True)
class Sample:
    """A text and what is asked in it. Questions and all answers are part of the text.

    It ends with the last answer, or with a few tokens behind it that say that it is over: they are trained, so that
    who writes freely knows where to end, and are no part of the answer.
    """

    stream: Stream
    num_tokens: int  # of the text
    answers: tuple[Answer, ...]  # in order, at least one
    needs_memory: bool = False  # what is asked for, or half the text, ends before the segment of the first answer
    depth: float | None = None  # where its facts stand between the earliest and the latest place, in [0, 1]
    oracle: float | None = None  # the share of answers that a named oracle without a memory of all has right
    scorers: tuple[Scorer, ...] = ()
    max_new_tokens: int = 0  # written for the scorers


class Wanted(NamedTuple):
    """What a sample is to be."""

    length: int  # tokens of the text, answers included
    segment_len: int
    depth: float | None = None  # None: facts stand anywhere


class Scene(NamedTuple):
    """What samples are made with."""

    tokenizer: Encodes
    background: Background

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a text that stands inside of another."""
        return self.tokenizer.encode_inside(text).astype(np.int32, copy=False)

    def begin(self, text: str) -> np.ndarray:
        """Tokens of a text's beginning."""
        return self.tokenizer.encode(text).astype(np.int32)

    def check_apart(self, symbols: Iterable[str]) -> None:
        """ValueError where two of these have the same tokens: `A` and `a` have where a tokenizer folds case."""
        known: dict[bytes, str] = {}
        for symbol in symbols:
            other = known.setdefault(self.encode(symbol).tobytes(), symbol)
            if other != symbol:
                raise ValueError(
                    f"the tokenizer has the same tokens for {other!r} and {symbol!r}; use another tokenizer"
                )


class Maker(Protocol):
    """Makes a sample of just the wanted length; TooShortError where it does not hold what it has to."""

    def __call__(self, scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample: ...


class TooShortError(ValueError):
    """The wanted length is too short for the sample that was drawn."""

    def __init__(self, need: int) -> None:
        super().__init__(f"facts, questions and answers need at least {need} tokens")
        self.need = need  # tokens


class Asked(NamedTuple):
    """A question and its answer."""

    question: np.ndarray  # tokens before the answer
    answer: np.ndarray
    num_choices: float
    end: np.ndarray = np.zeros(0, dtype=np.int32)  # tokens behind the answer


def ask(scene: Scene, question: str, answer: str, num_choices: float, *, end: str = "") -> Asked:
    return Asked(scene.encode(question), scene.encode(answer), num_choices, scene.encode(end))


def compose(
    scene: Scene,
    wanted: Wanted,
    facts: Sequence[np.ndarray],
    asked: Sequence[Asked],
    generator: np.random.Generator,
    *,
    place: Literal["anywhere", "start"] = "anywhere",
    between_blocks: bool = False,
    ends: Sequence[int] = (),
) -> Sample:
    """Background with facts in it, in the order given, and the questions with their answers at the end.

    Facts stand anywhere, at the start, or all at the wanted depth. Where there is room they end before the segment in
    which the first answer begins, so that only memory brings them there. Without facts the text is what is asked about,
    at least half of which lies before that segment wherever another precedes it. `between_blocks` and `ends` as in
    `joined`.
    """
    tail, answers = closing(asked, wanted.length)
    num_facts = sum(len(fact) for fact in facts)
    num_background = wanted.length - num_facts - len(tail)
    if num_background < 0:
        raise TooShortError(num_facts + len(tail))
    room = segment_start(answers[0].at, wanted.segment_len) - num_facts
    latest = min(room, num_background) if room >= 0 else num_background
    background = scene.background(num_background, generator)
    if place == "start":
        places = np.zeros(len(facts), dtype=np.int64)
    elif wanted.depth is not None:
        places = np.full(len(facts), round(wanted.depth * latest))
    else:
        places = np.sort(generator.integers(latest + 1, size=len(facts)))
    inserts = [Insert(int(at), fact) for at, fact in zip(places, facts, strict=True)]
    stream = joined(background, inserts, tail, between_blocks=between_blocks, ends=ends, latest=latest)
    depth = wanted.depth if place == "anywhere" else None
    return Sample(stream, wanted.length, answers, room >= 0 if facts else room > 0, depth)


def closing(asked: Sequence[Asked], length: int) -> tuple[np.ndarray, tuple[Answer, ...]]:
    """Questions and answers one after another, and where the answers stand in a text of `length` that they end."""
    tail = np.concatenate([part for one in asked for part in (one.question, one.answer, one.end)]).astype(np.int32)
    at, answers = length - len(tail), []
    for one in asked:
        answers.append(Answer(at + len(one.question), one.answer, one.num_choices))
        at += len(one.question) + len(one.answer) + len(one.end)
    return tail, tuple(answers)


def segment_start(at: int, segment_len: int) -> int:
    """The start of the segment whose last token read predicts token `at`."""
    return (at - 1) // segment_len * segment_len
