"""Tasks that ask: how often the model gives the right answers.

The text is made while it is read, segment by segment, with a state of fixed size. An answer counts when each of its
tokens is the likeliest of the whole vocabulary at its place after the true text before it; greedy decoding then writes
just this answer, and not otherwise. Of a sample with several answers the share that is right counts. Where a sample
has scorers, the model also writes freely, at most to the tokenizer's end token, and the scorers mark what it wrote;
an ablated memory is given again before every segment that it begins in writing.

Axes: B rows, T tokens of a segment, D width, V vocabulary.
"""

import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import rmt_core
from pipelines.config import InputError
from pipelines.data.tokenise import Tokenizer
from pipelines.tasks import texts
from pipelines.tasks.base import (
    TRUE,
    Figure,
    Material,
    Part,
    batch_sizes,
    begin,
    check_length,
    device_of,
    given,
    logits_in_pieces,
    memories_for,
    segments,
)
from pipelines.tasks.intervals import wilson_interval
from pipelines.tasks.samples import Maker, Sample, Scene, TooShortError, Wanted
from rmt_core import DoesNotFitError, FullContext, Output, RecurrentModel
from rmt_core.state import State

ACCURACY, EXACT, AT_DEPTH, ORACLE = "accuracy", "exact", "accuracy_at_depth", "oracle"
CHANCE = "chance"  # stands in the lines of accuracies
UNWRITTEN = "num_unwritten"  # samples behind whose text full attention has no room to write
_SHORT = 4096  # tokens, up to which depths may give the same place
_PROBES = 8  # texts, at most, that tell whether they do
_NOTHING = -1  # in place of a token where values are no numbers
NOT_FINITE = "num_not_finite"  # samples at whose answers a model's values are no numbers, as where a state overflows


class Marks(NamedTuple):
    """What each memory got for the samples of a batch."""

    right: dict[str, list[np.ndarray]]  # memory -> for each sample which answers are right, (num answers,) bool
    scores: dict[str, list[dict[str, float]]]  # memory -> for each sample mark by metric
    not_finite: dict[str, list[bool]]  # memory -> for each sample whether values at its answers are no numbers


class _Read(NamedTuple):
    """A part of the texts that a model has read."""

    part: Part
    memory: str
    before: State
    out: Output
    after: State


class QuestionTask:
    """Accuracy of the answers to texts of `length` tokens, answers included.

    `has_background` where facts stand in prose or noise; `has_depths` where they may be put at chosen depths. Tasks of
    one `family` draw alike, others apart.
    """

    def __init__(
        self,
        name: str,
        make: Maker,
        *,
        has_background: bool = True,
        has_depths: bool = False,
        family: str | None = None,
    ) -> None:
        self.name = name
        self.make = make
        reads = {"held_out", "background"} if has_background else set()
        self.settings = frozenset({"num_samples", "seed", "compiled", *reads, *({"depths"} if has_depths else ())})
        self._has_depths = has_depths
        self._family = zlib.crc32((family or name).encode())

    def check(self, length: int, segment_len: int, material: Material) -> None:
        check_length(self.name, length, segment_len)
        enough = length
        while need := self._need(enough, segment_len, material):
            enough = need  # what is drawn for another length may need more
        if enough > length:
            raise InputError(
                f"{self.name} at length {length}: facts, questions and answers need more tokens; {enough} are enough"
            )

    def _need(self, length: int, segment_len: int, material: Material) -> int:
        """Tokens that the longest of the samples needs, where that is more than `length`; else 0."""
        need = 0
        for index in range(material.num_samples):
            try:
                self._sample(index, length, segment_len, material)
            except TooShortError as error:
                need = max(need, error.need)
            except ValueError as error:
                raise InputError(f"{self.name}: {error}") from error
        return need

    def measure(self, model: RecurrentModel, length: int, material: Material) -> list[Figure]:
        def draw(index: int) -> Sample:
            return self._sample(index, length, model.segment_len, material)

        found = measured(model, material.num_samples, draw, material)
        same = self._same_places(length, model.segment_len, material)
        return [one._replace(same_place=True) if one.metric == AT_DEPTH and one.depth in same else one for one in found]

    def _same_places(self, length: int, segment_len: int, material: Material) -> set[float]:
        """Depths at which the facts of most texts stand where they do at the depth before; of short texts alone."""
        depths = sorted(material.depths) if self._has_depths and length <= _SHORT else []
        num = min(_PROBES, material.num_samples)  # others were not checked to fit
        read = {}
        for depth in depths:
            asked = replace(material, depths=(depth,))
            samples = [self._sample(index, length, segment_len, asked) for index in range(num)]
            read[depth] = [texts.whole(sample.stream).tobytes() for sample in samples]
        return {
            depth
            for before, depth in itertools.pairwise(depths)
            if 2 * sum(a == b for a, b in zip(read[before], read[depth], strict=True)) > num
        }

    def _sample(self, index: int, length: int, segment_len: int, material: Material) -> Sample:
        """The same one for the same seed and length; drawing takes no time to speak of, the text is made when read."""
        depths = material.depths if self._has_depths else ()
        wanted = Wanted(length, segment_len, depths[index % len(depths)] if depths else None)
        scene = Scene(material.tokenizer, _background(material))
        return self.make(scene, wanted, np.random.default_rng((material.seed, length, index, self._family)))


def measured(model: RecurrentModel, num: int, draw: Callable[[int], Sample], material: Material) -> list[Figure]:
    """The figures of samples 0 to num - 1, of which no more than a batch is there at once."""
    memories = memories_for(num, material)
    samples: list[Sample] = []
    marks = Marks(
        {memory: [] for memory in memories}, {memory: [] for memory in memories}, {memory: [] for memory in memories}
    )
    for size in batch_sizes(num, material.batch_size):
        batch = [draw(len(samples) + i) for i in range(size)]
        found = batch_marks(
            model, batch, memories, material.tokenizer, compiled=material.compiled, on_read=material.on_read
        )
        for memory in memories:
            marks.right[memory].extend(found.right[memory])
            marks.scores[memory].extend(found.scores[memory])
            marks.not_finite[memory].extend(found.not_finite[memory])
        samples.extend(replace(sample, stream=_nothing) for sample in batch)
    return figures(samples, marks)


def _nothing() -> Iterator[np.ndarray]:
    """The text of a sample that has been read."""
    return iter(())


def figures(samples: Sequence[Sample], marks: Marks) -> list[Figure]:
    """Accuracy by memory; by depth, for whole samples, by scorer and of the oracle where there are such."""
    chance = _chance(samples)
    needs_memory = all(sample.needs_memory for sample in samples)
    depths = sorted({sample.depth for sample in samples if sample.depth is not None})
    found = []

    def add(
        metric: str, memory: str, values: Sequence[float], chance: float | None, depth: float | None = None
    ) -> None:
        found.append(_figure(metric, memory, values, chance, needs_memory)._replace(depth=depth))

    for memory, right in marks.right.items():
        add(ACCURACY, memory, [float(one.mean()) for one in right], chance)
    if any(len(sample.answers) > 1 for sample in samples):
        for memory, right in marks.right.items():
            add(EXACT, memory, [float(one.all()) for one in right], None)
    for metric in dict.fromkeys(scorer.metric for sample in samples for scorer in sample.scorers):
        for memory, scores in marks.scores.items():
            if values := [one[metric] for one in scores if metric in one]:
                add(metric, memory, values, None)
    for depth in depths if len(depths) > 1 else []:
        for memory, right in marks.right.items():
            values = [float(one.mean()) for one, sample in zip(right, samples, strict=True) if sample.depth == depth]
            add(AT_DEPTH, memory, values, chance, depth)
    oracles = [sample.oracle for sample in samples if sample.oracle is not None]
    if oracles:
        found.append(_figure(ORACLE, None, oracles, None, None))
    if any(map(any, marks.not_finite.values())):
        found += [Figure(NOT_FINITE, float(sum(rows)), memory) for memory, rows in marks.not_finite.items()]
    if num := sum(1 for sample, one in zip(samples, marks.scores[TRUE], strict=True) if sample.scorers and not one):
        found.append(Figure(UNWRITTEN, float(num)))
    return found


def _chance(samples: Sequence[Sample]) -> float | None:
    """What guessing gives; None where there is no telling among what."""
    if any(math.isinf(answer.num_choices) for sample in samples for answer in sample.answers):
        return None
    return float(np.mean([np.mean([1 / answer.num_choices for answer in sample.answers]) for sample in samples]))


def _figure(
    metric: str, memory: str | None, values: Sequence[float], chance: float | None, needs_memory: bool | None
) -> Figure:
    low, high = wilson_interval(sum(values), len(values))
    mean = sum(values) / len(values)
    return Figure(
        metric, mean, memory, num_samples=len(values), low=low, high=high, chance=chance, needs_memory=needs_memory
    )


@torch.inference_mode()
def batch_marks(
    model: RecurrentModel,
    samples: Sequence[Sample],
    memories: Sequence[str],
    tokenizer: Tokenizer,
    *,
    compiled: bool = False,
    on_read: Callable[[int], None] | None = None,
) -> Marks:
    """Marks of a batch, each text read once.

    The ablations give a segment another state but never change what is carried, so they are run only over
    segments in which a token of an answer is predicted. Behind a text's last token nothing is asked: it is not read.
    """
    device = device_of(model)
    asked = _asked(samples)
    marks = Marks(
        {memory: [np.ones(len(sample.answers), dtype=bool) for sample in samples] for memory in memories},
        {memory: [{} for _ in samples] for memory in memories},
        {memory: [False] * len(samples) for memory in memories},
    )
    state = _begin(model, samples)
    skimmer = rmt_core.Skimmer(model, compiled=compiled)
    for part in segments(
        [texts.cut(sample.stream(), sample.num_tokens - 1) for sample in samples], model.step_len, device, on_read
    ):
        first, last = np.searchsorted(asked[:, 1], (part.start, part.start + part.tokens.shape[1]))
        here = asked[first:last]
        if not len(here):
            state = skimmer.after(part.tokens, state, part.lengths)
            continue
        carried = state
        for memory in memories:
            before = given(memory, carried)
            out, new = model.step(part.tokens, before, part.lengths)
            state = new if memory == TRUE else state
            chosen = _chosen(model, out.hidden, here[:, 0], here[:, 1] - part.start)
            for row, answer in here[chosen != here[:, 2]][:, [0, 3]].tolist():
                marks.right[memory][row][answer] = False
            for row in here[chosen == _NOTHING, 0].tolist():
                marks.not_finite[memory][row] = True
            _score(model, samples, _Read(part, memory, before, out, new), tokenizer, marks.scores[memory])
    return marks


def _begin(model: RecurrentModel, samples: Sequence[Sample]) -> State:
    """The state before the texts; under full attention with room for what is written behind them, where that fits."""
    num_read = max(sample.num_tokens for sample in samples) - 1
    num_written = max(sample.max_new_tokens for sample in samples)
    try:
        return begin(model, len(samples), num_read + num_written)
    except DoesNotFitError:
        if not num_written:
            raise
        return begin(model, len(samples), num_read)


def _asked(samples: Sequence[Sample]) -> np.ndarray:
    """Tokens of all answers by place: (row, the place that predicts it, the token, the answer), (n, 4) int64."""
    found = [
        (row, answer.at - 1 + i, int(token), number)
        for row, sample in enumerate(samples)
        for number, answer in enumerate(sample.answers)
        for i, token in enumerate(answer.tokens)
    ]
    return np.array(sorted(found, key=lambda one: one[1]), dtype=np.int64)


def _score(
    model: RecurrentModel,
    samples: Sequence[Sample],
    read: _Read,
    tokenizer: Tokenizer,
    scores: list[dict[str, float]],
) -> None:
    """Let those rows write whose last answer begins behind a token of this part, and mark what they wrote.

    Under full attention those only that there is room for.
    """
    part = read.part
    places = [sample.answers[-1].at - part.start for sample in samples]
    rows = {
        row: at
        for row, (sample, at) in enumerate(zip(samples, places, strict=True))
        if sample.scorers and 0 < at <= part.tokens.shape[1]
        if _has_room(model, read.after, part.start + at + sample.max_new_tokens - 1)  # the last one is not read
    }
    if not rows:
        return
    ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    most = {row: samples[row].max_new_tokens for row in rows}
    for row, tokens in zip(rows, _written(model, read, rows, most, ends), strict=True):
        text = tokenizer.decode(tokens[: most[row]])
        scores[row] = {scorer.metric: scorer.mark(text) for scorer in samples[row].scorers}


def _has_room(model: RecurrentModel, state: State, num_tokens: int) -> bool:
    return not isinstance(model, FullContext) or num_tokens <= state.keys[0].shape[2]


def _written(
    model: RecurrentModel, read: _Read, rows: dict[int, int], most: dict[int, int], ends: Sequence[int]
) -> list[list[int]]:
    """What rows write behind so many tokens of the part that was read, at most so many, or some more."""
    if isinstance(model, FullContext):
        return [
            model.write(read.after, row, (read.part.start + at, read.out.hidden[row, at - 1]), most[row], ends)
            for row, at in rows.items()
        ]
    session = rmt_core.open_session(model, len(rows))._replace(state=rmt_core.state.select(read.before, list(rows)))
    prompts = [read.part.tokens[row, :at].tolist() for row, at in rows.items()]
    num = max(most.values())
    if read.memory == TRUE:
        return rmt_core.generate(model, prompts, num, session=session, stop_tokens=ends).tokens
    return _written_from_one_state(model, prompts, num, session, ends)


def _written_from_one_state(
    model: RecurrentModel, prompts: Sequence[Sequence[int]], num: int, session: rmt_core.Session, ends: Sequence[int]
) -> list[list[int]]:
    """What rows write that have the session's state before every segment, also before those that they begin.

    They write up to the end of the segment of any of them at a time. One that has stopped would stop again.
    """
    same = session.state
    read = rmt_core.generate(model, prompts, 0, session=session)
    session, reasons = read.session._replace(state=same), read.finish_reasons
    written: list[list[int]] = [[] for _ in prompts]
    num_written = 0
    while num_written < num and "length" in reasons:
        num_open = max(int(n) for n, reason in zip(session.lengths, reasons, strict=True) if reason == "length")
        size = min(num - num_written, model.segment_len - num_open)
        more = rmt_core.generate(model, [[]] * len(prompts), size, session=session, stop_tokens=ends)
        session, reasons = more.session._replace(state=same), more.finish_reasons
        written = [[*before, *new] for before, new in zip(written, more.tokens, strict=True)]
        num_written += size
    return written


def _chosen(model: RecurrentModel, hidden: Tensor, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The likeliest next token at places of rows of hidden (B, T, D), `_NOTHING` where none is: (places,) int64."""
    device = hidden.device
    at = hidden[torch.from_numpy(rows).to(device), torch.from_numpy(places).to(device)]  # (places, D)
    found = [logits.argmax(-1).where(logits.isfinite().all(-1), _NOTHING) for _, logits in logits_in_pieces(model, at)]
    return torch.cat(found).cpu().numpy()


def _background(material: Material) -> texts.Background:
    if material.background == "noise":
        return texts.noise(material.tokenizer)
    return texts.prose(material.held_out)
