"""Texts of one task whose facts stand at a chosen depth, and where they stand there."""

from collections.abc import Iterator

import numpy as np

from pipelines.config import InputError
from pipelines.tasks import TASKS
from pipelines.tasks.questions import QuestionTask
from pipelines.tasks.samples import Sample, Scene, TooShortError, Wanted
from pipelines.tasks.texts import Stream

_PROBE = 64  # tokens that tell where the background begins
_HEAD = 2**12  # tokens in which facts that stand first end


def draw(task: str, scene: Scene, wanted: Wanted, seed: int, index: int) -> Sample:
    """Text number `index`: the same facts at every depth. InputError where the task cannot."""
    maker = TASKS.get(task)
    if not isinstance(maker, QuestionTask) or "depths" not in maker.settings:
        able = ", ".join(name for name, one in TASKS.items() if "depths" in one.settings)
        raise InputError(f"--task {task}: its facts cannot be put at a place of a text; use {able}")
    try:
        return maker.make(scene, wanted, np.random.default_rng((seed, index)))
    except TooShortError as error:
        raise InputError(
            f"{task} at length {wanted.length}: facts, questions and answers need at least {error.need} tokens"
        ) from error


def facts_of(early: Stream, late: Stream) -> np.ndarray:
    """The tokens before the background of a text whose facts stand first: `late` begins with that background."""
    background = head(late, _PROBE)
    text = head(early, _HEAD)
    for num in range(len(text) - len(background) + 1):
        if np.array_equal(text[num : num + len(background)], background):
            return text[:num]
    raise InputError("the text is too short to tell facts and background apart; use a longer --length")


def head(stream: Stream, num: int) -> np.ndarray:
    """The first tokens of a text."""
    found: list[np.ndarray] = []
    for block in stream():
        found.append(block)
        if sum(map(len, found)) >= num:
            break
    return np.concatenate(found)[:num]


def find(stream: Stream, wanted: np.ndarray) -> int:
    """Where the tokens `wanted` stand in a text for the first time. InputError where they do not, or are none."""
    if not len(wanted):
        raise InputError("the facts have one place only; use a longer --length")
    for start, text in _overlapping(stream, len(wanted) - 1):
        for at in np.flatnonzero(text == wanted[0]).tolist():
            if np.array_equal(text[at : at + len(wanted)], wanted):
                return start + int(at)
    raise InputError("the facts do not stand together in the text; use another --task")


def _overlapping(stream: Stream, num: int) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of a text and where they begin, each with the last `num` tokens before it."""
    kept = np.zeros(0, dtype=np.int32)
    start = 0
    for block in stream():
        text = np.concatenate([kept, block])
        yield start, text
        kept = text[max(0, len(text) - num) :]
        start += len(text) - len(kept)
