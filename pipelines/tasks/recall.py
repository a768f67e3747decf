"""Recall: one fact in a long text, asked for at its end.

The text is prose from a book, or noise for tiny models. The fact is a sentence of its own, `The secret key is K.`, with
one of 16 letters; the text ends with the sentence's beginning, and what must follow is the letter. A model that forgot
can do no better than guess among the letters. The scheme is the "memorise" (fact first) and "detect and memorise" (fact
anywhere) tasks of Bulatov et al. 2023 (arXiv:2304.11062, section 4) put into real text, as in BABILong
(arXiv:2406.10149).
"""

import numpy as np

from pipelines.tasks.samples import Answer, Sample, Scene, TooShortError, Wanted, segment_start
from pipelines.tasks.texts import Encodes, Insert, Stream, joined

LETTERS = "ABCDEFGHIJKLMNOP"
FACT = "\nThe secret key is {}.\n"
QUESTION = "\nThe secret key is"
ANSWER = " {}"


def shortest_text(tokenizer: Encodes) -> int:
    """The fewest tokens that hold a fact and the question."""
    return max(len(tokenizer.encode(FACT.format(letter))) for letter in LETTERS) + len(tokenizer.encode(QUESTION))


def longest_answer(tokenizer: Encodes) -> int:
    """Tokens of the longest answer."""
    return max(len(tokenizer.encode(ANSWER.format(letter))) for letter in LETTERS)


def detect(scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    """The fact anywhere, or at the wanted depth."""
    longest = longest_answer(scene.tokenizer)  # every sample's question ends at the same token
    length, need = wanted.length - longest, shortest_text(scene.tokenizer)
    if length < need:
        raise TooShortError(need + longest)
    latest = segment_start(length, wanted.segment_len) - need + 1
    letter, fact, question = _drawn(scene.tokenizer, generator)
    num_text = length - len(question) - len(fact)
    stream: Stream = scene.background(num_text, generator)
    num_places = _num_places(num_text, latest if latest > 0 else None)
    at = int(generator.integers(num_places)) if wanted.depth is None else round(wanted.depth * (num_places - 1))
    answer = scene.encode(ANSWER.format(letter))
    tail = np.concatenate([question, answer]).astype(np.int32)
    return Sample(
        joined(stream, [Insert(at, fact.astype(np.int32))], tail),
        length + len(answer),
        (Answer(length, answer, len(LETTERS)),),
        latest > 0,
        wanted.depth,
    )


def memorise(scene: Scene, wanted: Wanted, generator: np.random.Generator) -> Sample:
    """The fact first."""
    return detect(scene, wanted._replace(depth=0.0), generator)


def _drawn(tokenizer: Encodes, generator: np.random.Generator) -> tuple[str, np.ndarray, np.ndarray]:
    """A letter, the fact and the question."""
    letter = LETTERS[int(generator.integers(len(LETTERS)))]
    return letter, tokenizer.encode(FACT.format(letter)), tokenizer.encode(QUESTION)


def _num_places(num_text: int, latest: int | None) -> int:
    """How many places a fact can take in so many tokens of text, beginning before token `latest`."""
    return num_text + 1 if latest is None else min(num_text + 1, max(latest, 1))
