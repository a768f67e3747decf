"""Where in a text a binary gate lets the memory be written, and how answers fare where it does elsewhere than at facts.

Each text has its facts at a place of its own, drawn evenly from the earliest to the latest. Of every segment before the
one that asks is recorded what share of the memory's tokens it wrote, and the gate's probability, the mean of all
tokens. Segments are told apart by where they stand:

    opening    the text's first segment, where no fact stands in it: there is nothing to be lost yet
    before     the others before the facts: what they write is what the facts are then written over
    facts      those that the facts stand in
    next       the one behind these, in which a model may finish what it writes
    after      all others: writing there is what loses facts

Axes: B texts, S segments before the one that asks, M memory tokens.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.config import InputError
from pipelines.data.tokenise import Tokenizer
from pipelines.tasks import placed, texts
from pipelines.tasks.base import TRUE, batch_sizes, device_of, segments
from pipelines.tasks.questions import batch_marks
from pipelines.tasks.samples import Sample, Scene, Wanted
from rmt_core import RecurrentModel
from rmt_core.memory.rmt import BinaryGate
from rmt_core.state import State

PLACES = OPENING, BEFORE, FACTS, NEXT, AFTER = "opening", "before", "facts", "next", "after"
_USUAL_THRESHOLD = 0.5  # of a gate that is given none
_MOST_PASSAGES = 16  # that are shown
_PASSAGE_TOKENS = 24


class Told(NamedTuple):
    """Texts and the segments of their facts."""

    samples: list[Sample]
    first: np.ndarray  # (B,) int64
    last: np.ndarray  # (B,) int64
    num_segments: int  # before the one that asks


class Passage(NamedTuple):
    """How a segment begins that writes the memory where no fact stands."""

    row: int  # its text
    segment: int
    words: str


class Writes(NamedTuple):
    """What was recorded."""

    written: np.ndarray  # (B, S) share of the memory's tokens
    probability: np.ndarray  # (B, S) mean of the memory's tokens
    highest: np.ndarray  # (B, S) that of the token with the highest one
    places: np.ndarray  # (B, S) of PLACES, as its number
    first: np.ndarray  # (B,) the facts' first segment
    right: np.ndarray  # (B,) bool: all answers
    threshold: float  # of the gate
    passages: list[Passage]  # before the facts and after them, the surest first


def check(model: RecurrentModel) -> None:
    """InputError for a memory that every segment writes."""
    settings = model.config.memory
    num_gated = sum(one.get("gate") == "binary" for one in settings)
    if num_gated != 1 or not isinstance(_memory_of(model, model.init_state(1)), Tensor):
        kinds = " with ".join(one["kind"] for one in settings)
        raise InputError(f'memory {kinds} has no binary gate; use one rmt with "gate": "binary", without past memories')


def _gated(model: RecurrentModel) -> int:
    """Which of the model's memories has a binary gate."""
    return next(at for at, one in enumerate(model.config.memory) if one.get("gate") == "binary")


def _memory_of(model: RecurrentModel, state: State) -> State:
    """The part of the state that the gate lets be written."""
    return state[_gated(model)] if len(model.config.memory) > 1 else state


def make_texts(
    task: str, tokenizer: Tokenizer, background: texts.Background, wanted: Wanted, num: int, seed: int = 0
) -> Told:
    """`num` texts of the wanted length. InputError where the task has no such, or too few segments before it asks."""
    scene = Scene(tokenizer, background)
    size = wanted.segment_len
    samples, first, last = [], [], []
    for i in range(num):
        depth = np.random.default_rng((seed, i, 1)).random()
        sample = placed.draw(task, scene, wanted._replace(depth=depth), seed, i)
        early, late = (placed.draw(task, scene, wanted._replace(depth=end), seed, i) for end in (0.0, 1.0))
        facts = placed.facts_of(early.stream, late.stream)
        at = placed.find(sample.stream, facts)
        samples.append(sample)
        first.append(at // size)
        last.append((at + len(facts) - 1) // size)
    num_segments = min(sample.answers[0].at - 1 for sample in samples) // size
    if num_segments < 3:
        raise InputError(
            f"only {num_segments} segments of {size} tokens precede the one that asks; use a longer --length"
        )
    return Told(samples, np.array(first), np.array(last), num_segments)


# --- recording --------------------------------------------------------------------------------------


@torch.inference_mode()
def record(model: RecurrentModel, told: Told, tokenizer: Tokenizer, batch_size: int) -> Writes:
    """Reads all texts, so many at once, and once more for their answers."""
    traces: list[tuple[np.ndarray, ...]] = []
    right: list[bool] = []
    for rows in batch_sizes(len(told.samples), batch_size):
        batch = told.samples[len(right) : len(right) + rows]
        traces.append(_record_batch(model, batch, told.num_segments))
        right += [bool(one.all()) for one in batch_marks(model, batch, (TRUE,), tokenizer).right[TRUE]]
    written, probability, highest = (np.concatenate(parts) for parts in zip(*traces, strict=True))
    places = places_of(told.first, told.last, told.num_segments)
    given = model.config.memory[_gated(model)]["write_threshold"]
    threshold = _USUAL_THRESHOLD if given is None else given
    passages = [
        Passage(row, segment, _words(told.samples[row], segment, model.segment_len, tokenizer))
        for row, segment in surest(highest, elsewhere(written, places))[:_MOST_PASSAGES].tolist()
    ]
    return Writes(written, probability, highest, places, told.first, np.array(right), threshold, passages)


def elsewhere(written: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Which segments write the memory before the facts or after them, (B, S) bool."""
    return (written > 0) & np.isin(places, [PLACES.index(BEFORE), PLACES.index(AFTER)])


def surest(probability: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The chosen ones of (B, S), those with the highest probability first: (n, 2) int64."""
    found = np.argwhere(chosen)
    return found[np.argsort(-probability[chosen], kind="stable")]


def _words(sample: Sample, segment: int, size: int, tokenizer: Tokenizer) -> str:
    """How a segment of a text begins."""
    blocks = texts.in_blocks(sample.stream(), size)
    return tokenizer.decode(next(itertools.islice(blocks, segment, None))[:_PASSAGE_TOKENS])


def _record_batch(model: RecurrentModel, samples: Sequence[Sample], num: int) -> tuple[np.ndarray, ...]:
    """Shares of tokens written, and of their probabilities the mean and the highest, (B, S) each."""
    state = model.init_state(len(samples))
    written = []
    rows = [texts.cut(sample.stream(), num * model.segment_len) for sample in samples]
    [gate] = (module for module in model.memory.modules() if isinstance(module, BinaryGate))
    with _probabilities(gate) as found:
        for part in segments(rows, model.segment_len, device_of(model)):
            new = model.step(part.tokens, state, part.lengths)[1]
            written.append((_memory_of(model, new) != _memory_of(model, state)).any(-1).float().mean(-1))
            state = new
    probabilities = torch.stack(found, 1).float().cpu()
    return torch.stack(written, 1).cpu().numpy(), probabilities.mean(-1).numpy(), probabilities.amax(-1).numpy()


@contextlib.contextmanager
def _probabilities(gate: BinaryGate) -> Iterator[list[Tensor]]:
    """Those with which the gate would write each token, (B, M) for every segment that is read meanwhile."""
    found: list[Tensor] = []

    def note(gate: Any, inputs: tuple[Tensor, Tensor]) -> None:
        found.append(torch.sigmoid(gate.logit(*inputs).float())[..., 0])

    handle = gate.register_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def places_of(first: np.ndarray, last: np.ndarray, num: int) -> np.ndarray:
    """Where each of `num` segments stands, (B, S): of PLACES, as its number. first, last (B,): of the facts."""
    at, first, last = np.arange(num)[None], first[:, None], last[:, None]
    chosen = [(at >= first) & (at <= last), at == last + 1, at > last, at == 0]
    names = [FACTS, NEXT, AFTER, OPENING]
    return np.select(chosen, [PLACES.index(name) for name in names], PLACES.index(BEFORE))
