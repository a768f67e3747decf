"""Stories in book prose: the sentences of a small world, in their order, anywhere in a long text (BABILong).

The scheme is that of Kuratov et al. 2024 (arXiv:2406.10149). Beside the answer that greedy decoding must write to the
letter there are two marks for what the model writes freely: strict, the right label and no other, those of the question
aside; and lax, the right label among whatever else. A full stop behind the answer ends the text. It is trained and ends
what the strict mark reads, but the answer is the label alone: nothing but that has to be written to be right to the
letter.

As published, facts stand between sentences: behind a token that ends one, the nearest to their place.
A story that the wanted length does not hold is drawn again a few times, so that short texts hold short stories alone.

Deviations of the strict mark: labels are whole words, where the published code finds them inside of others, so that
`none` names `one` too and can never be right, and `know` names `no`; and a line's end ends the sentence that is marked,
as the question behind a story is a line of its own (not for published files: `names_only` of `published_sentence`).
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from functools import partial

import numpy as np

from pipelines.tasks import babi
from pipelines.tasks.samples import Answer, Asked, Maker, Sample, Scene, Scorer, TooShortError, Wanted, ask, compose
from pipelines.tasks.texts import Insert, joined

QUESTION = "\nQuestion: {}\nAnswer:"
END = "."
SENTENCE_ENDS = ".!?"
MORE_TOKENS = 8  # written beyond the longest label

_ATTEMPTS = 8  # stories drawn until one fits
_MOST_ALONG = 256  # facts of a story that is asked about as it goes

STRICT, LAX = "strict", "lax"


def story_task(task: str) -> Maker:
    """The task `qa1` to `qa5`: a story and one question."""
    return partial(_that_fits, partial(_told, task))


def every_question(task: str) -> Maker:
    """The same stories, each with as many questions as there are of which none tells a later answer.

    Of these texts more is learned than of those with one question. What is written freely is not marked.
    """
    return partial(_that_fits, partial(_told_for_every_question, task))


def asked_along(task: str) -> Maker:
    """A story of up to 256 facts that is asked about as it goes.

    To train on: a memory is told after many a step whether it took it. Facts and questions stand anywhere, in their
    order. How many facts are followed by a question is drawn anew for each text, as an answer may tell later ones; and
    so is how much of the text is background.
    """
    return partial(_that_fits, partial(_along, task))


def _along(task: str, scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    most = int(generator.integers(wanted.length + 1))  # tokens of the story; more where its first question needs them
    return _scattered(scene, wanted.length, _pieces(task, scene, most, wanted.length, generator), generator)


def _pieces(
    task: str, scene: Scene, wanted: int, longest: int, generator: np.random.Generator
) -> list[tuple[np.ndarray, Asked | None]]:
    """Facts, and questions with their answers, up to the last question that `wanted` tokens hold.

    One question at least, if need be within `longest` tokens.
    """
    share = generator.random()  # of facts that are asked about
    pieces: list[tuple[np.ndarray, Asked | None]] = []
    num = num_kept = 0  # tokens, and pieces up to the last question
    for fact, question in itertools.islice(babi.episodes(task, generator), _MOST_ALONG):
        pieces.append((scene.encode(f"\n{fact}\n"), None))
        num += len(pieces[-1][0])
        asked = None
        if question is not None and (not num_kept or generator.random() < share):
            asked = _ask(scene, *question)
            pieces.append((np.concatenate([asked.question, asked.answer, asked.end]), asked))
            num += len(pieces[-1][0])
        if num > (wanted if num_kept else longest):
            break
        if asked is not None:
            num_kept = len(pieces)
    if not num_kept:
        raise TooShortError(num)
    return pieces[:num_kept]


def _scattered(
    scene: Scene, length: int, pieces: Sequence[tuple[np.ndarray, Asked | None]], generator: np.random.Generator
) -> Sample:
    """Pieces anywhere in background, in their order; the last one ends the text."""
    sizes = [len(tokens) for tokens, _ in pieces]
    free = length - sum(sizes)
    places = np.sort(np.append(generator.integers(free + 1, size=len(pieces) - 1), free))
    starts = places + np.cumsum([0, *sizes[:-1]])
    answers = tuple(
        Answer(int(start) + len(asked.question), asked.answer, asked.num_choices)
        for start, (_, asked) in zip(starts, pieces, strict=True)
        if asked is not None
    )
    inserts = [Insert(int(at), tokens) for at, (tokens, _) in zip(places[:-1], pieces[:-1], strict=True)]
    return Sample(joined(scene.background(free, generator), inserts, pieces[-1][0]), length, answers)


def _ask(scene: Scene, question: str, answer: str) -> Asked:
    return ask(scene, QUESTION.format(question), f" {answer}", len(babi.choices(question, answer)), end=END)


def _that_fits(make: Maker, scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    refused = []
    for _ in range(_ATTEMPTS):
        try:
            return make(scene, wanted, generator)
        except TooShortError as error:
            refused.append(error)
    raise min(refused, key=lambda error: error.need)


def _told(task: str, scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    story, labels = babi.story(task, generator), babi.LABELS[task]
    sample = _asking([(story.question, story.answer)], story, scene, wanted, generator)
    longest = max(len(scene.encode(f" {label}")) for label in labels)
    return marked(sample, story.question, story.answer, labels, longest + MORE_TOKENS)


def _told_for_every_question(task: str, scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    story = babi.story(task, generator)
    return _asking(story.together, story, scene, wanted, generator)


def _asking(
    questions: Sequence[tuple[str, str]],
    story: babi.Story,
    scene: Scene,
    wanted: Wanted,
    generator: np.random.Generator,
) -> Sample:
    facts = [scene.encode(f"\n{fact}\n") for fact in story.facts]
    asked = [_ask(scene, question, answer) for question, answer in questions]
    return compose(scene, wanted, facts, asked, generator, ends=sentence_ends(scene))


def sentence_ends(scene: Scene) -> list[int]:
    """Tokens that end a sentence."""
    return [int(scene.encode(mark)[-1]) for mark in SENTENCE_ENDS]


def marked(sample: Sample, question: str, answer: str, labels: Sequence[str], max_new_tokens: int) -> Sample:
    """The sample with both scorers."""
    scorers = (
        Scorer(STRICT, lambda written: float(is_strictly_right(written, question, answer, labels))),
        Scorer(LAX, lambda written: float(is_laxly_right(written, answer))),
    )
    return dataclasses.replace(sample, scorers=scorers, max_new_tokens=max_new_tokens)


def is_strictly_right(written: str, question: str, answer: str, labels: Sequence[str]) -> bool:
    """Whether the first sentence or line names the answer only."""
    return names_only(first_sentence(written), question, answer, labels)


def names_only(sentence: str, question: str, answer: str, labels: Sequence[str]) -> bool:
    """Whether of the labels that the question does not name it names the answer, or all parts of a list, and no other.

    Labels and answers are the same in whatever case.
    """
    named = {label.lower() for label in labels if _names(sentence, label) and not _names(question, label)}
    return named == {part.lower() for part in parts(answer)}


def is_laxly_right(written: str, answer: str) -> bool:
    """Whether the answer occurs, or all parts of a list."""
    return all(part.lower() in written.lower() for part in parts(answer))


def parts(answer: str) -> list[str]:
    """Those of a list such as `apple,milk`; a way such as `s,e` is one label, told by its length as published."""
    is_list = "," in answer and len(answer) > len("s,e")
    return [part.strip() for part in answer.split(",")] if is_list else [answer]


def _names(text: str, label: str) -> bool:
    """As a word, whatever its case: `no` is not named by `know`."""
    return re.search(rf"\b{re.escape(label)}\b", text, re.IGNORECASE) is not None


def first_sentence(written: str) -> str:
    """In lower case, up to the first line's or sentence's end."""
    return re.split(r"[.\n]", written.strip().lower(), maxsplit=1)[0]


def published_sentence(written: str) -> str:
    """In lower case, up to the first full stop or what BABILong's prompts put around examples and texts.

    The published code looks for `Question` too, but in lower case, where it finds none: a further question is read.
    """
    return re.split(r"\.|<context>|<example>", written.lower(), maxsplit=1)[0]
