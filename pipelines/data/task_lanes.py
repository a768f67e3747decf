"""Lanes that read texts of question tasks: what memory is trained on.

Axes: R lanes of a worker, K segments of a window, T tokens of a segment.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from pipelines.config import InputError
from pipelines.data.lanes import Window
from pipelines.data.plan import Reads, token_shares
from pipelines.tasks import texts
from pipelines.tasks.samples import Maker, Sample, Scene, TooShortError, Wanted
from pipelines.tasks.texts import Background, Encodes, Remembered, Stream

_ATTEMPTS = 100  # draws of a sample until one fits its window
_PROBES = 32  # draws that tell how short a task's texts can be


class TaskLane:
    """Texts with questions and their answers, each about as long as a window; drawn anew each step."""

    def __init__(self, source: "TaskSource", number: int) -> None:
        self.source = source
        self.number = number

    def fill(self, window: Window, row: int, step: int) -> None:
        """Write the text of this step into row `row`."""
        num_segments, segment_len = window.tokens.shape[1:]
        sample = self.source.draw(step, self.number, num_segments)
        tokens = texts.whole(sample.stream)
        size = len(tokens)
        flat = {name: getattr(window, name)[row].reshape(-1) for name in ("tokens", "labels", "weights", "is_answer")}
        flat["tokens"][:size] = tokens
        if self.source.text_weight:  # else the model's head is spared all that counts for nothing
            flat["labels"][: size - 1] = tokens[1:]
            flat["weights"][: size - 1] = self.source.text_weight
        for answer in sample.answers:
            asked = slice(answer.at - 1, answer.at - 1 + len(answer.tokens))
            flat["labels"][asked] = answer.tokens
            flat["weights"][asked] = self.source.answer_weight
            flat["is_answer"][asked] = True
        over = slice(sample.answers[-1].at - 1 + len(sample.answers[-1].tokens), size - 1)
        flat["labels"][over] = tokens[over.start + 1 :]
        flat["weights"][over] = self.source.answer_weight
        window.lengths[row] = np.clip(size - segment_len * np.arange(num_segments), 0, segment_len)
        window.segment_index[row] = np.arange(num_segments)
        window.reset[row, 0] = self.source.is_fresh(step, self.number)


class Choice(NamedTuple):
    """A task among those that lanes read."""

    name: str
    make: Maker
    background: Background
    weight: float = 1.0  # how often it is read, compared with the others
    depths: Sequence[float] = ()  # where facts stand, each equally likely; none: anywhere


class TaskSource:
    """Samples of one or several tasks, the same for the same seed, step and lane."""

    def __init__(
        self,
        tokenizer: Encodes,
        choices: Sequence[Choice],
        segment_len: int,
        *,
        seed: int,
        text_weight: float,
        answer_weight: float,
        fresh_fraction: float = 1.0,
    ) -> None:
        self.choices = list(choices)
        self.seed = seed
        self.text_weight = text_weight  # of a token in the loss
        self.answer_weight = answer_weight
        self.fresh_fraction = fresh_fraction  # of texts before which the memory is reset
        self._tokenizer = Remembered(tokenizer)
        self._segment_len = segment_len
        self._shares = np.array([choice.weight for choice in choices]) / sum(choice.weight for choice in choices)
        self._shortest = [self._probed(choice) for choice in choices]

    def describe(self) -> str:
        """What is read, in a line."""
        names = ", ".join(
            f"{choice.name} ({share:.0%})" if len(self.choices) > 1 else choice.name
            for choice, share in zip(self.choices, self._shares, strict=True)
        )
        return f"rows read texts of {names}; a token of an answer weighs {self.answer_weight:g} in the loss"

    def draw(self, step: int, lane: int, num_segments: int) -> Sample:
        """A text that ends anywhere in the last of `num_segments` segments, or fills it where it must.

        InputError where nothing that fits is drawn.
        """
        generator = np.random.default_rng((self.seed, step, lane))
        number = int(generator.choice(len(self.choices), p=self._shares)) if len(self.choices) > 1 else 0
        return self._draw(number, generator, num_segments)

    def is_fresh(self, step: int, lane: int) -> bool:
        """Whether this text begins with a fresh memory: the first one does, others as often as the fraction says."""
        return not step or float(np.random.default_rng((self.seed, step, lane, 1)).random()) < self.fresh_fraction

    def check(self, num_segments: int) -> None:
        """InputError where a task's texts do not fit windows of so many segments."""
        for number in range(len(self.choices)):
            for probe in range(_PROBES):
                self._draw(number, np.random.default_rng((self.seed, probe)), num_segments)

    def mean_len(self, num_segments: int) -> float:
        """Tokens that a window of so many segments holds on average, about."""
        longest = num_segments * self._segment_len
        least = [max(shortest, longest - self._segment_len + 1) for shortest in self._shortest]
        return float(np.dot(self._shares, [(longest + start) / 2 for start in least]))

    def _draw(self, number: int, generator: np.random.Generator, num_segments: int) -> Sample:
        choice, need = self.choices[number], self._shortest[number]
        longest = num_segments * self._segment_len
        if need <= longest:
            length = int(generator.integers(max(need, longest - self._segment_len + 1), longest + 1))
            seed = int(generator.integers(2**62))
            depth = None if not choice.depths else choice.depths[int(generator.integers(len(choice.depths)))]
            for attempt in range(_ATTEMPTS):
                for num_tokens in (length, longest):
                    drawn = np.random.default_rng((seed, attempt))
                    try:
                        return self._sample(choice, Wanted(num_tokens, self._segment_len, depth), drawn)
                    except TooShortError as error:
                        need = error.need
        raise InputError(
            f"a window of {num_segments} segments of {self._segment_len} tokens is too short for the facts, questions "
            f"and answers of {choice.name} ({need} tokens); use longer segments, or more of them "
            "(curriculum.num_segments, and curriculum.least_segments where it varies)"
        )

    def _sample(self, choice: Choice, wanted: Wanted, generator: np.random.Generator) -> Sample:
        return choice.make(Scene(self._tokenizer, choice.background), wanted, generator)

    def _probed(self, choice: Choice) -> int:
        """The fewest tokens that samples of a task were seen to need."""
        needs = []
        for probe in range(_PROBES):
            try:
                self._sample(choice, Wanted(1, self._segment_len), np.random.default_rng(probe))
            except TooShortError as error:
                needs.append(error.need)
            except ValueError as error:
                raise InputError(f"{choice.name}: {error}") from error
        return min(needs, default=1)


def store_prose(store: Reads) -> Background:
    """Excerpts of the store's documents, each token of a store equally likely to be the first.

    A document that is too short starts over.
    """
    shares = token_shares(store)

    def draw(num: int, generator: np.random.Generator) -> Stream:
        document = store.manifest[int(generator.choice(len(shares), p=shares))]
        start = int(generator.integers(document.num_tokens))
        found: list[np.ndarray] = []
        missing = num
        while missing > 0:
            segment, offset = divmod(start, store.segment_len)
            last = min(-(-(start + missing) // store.segment_len), document.num_segments)
            part = store.read(document, segment, last)[offset : offset + missing]
            found.append(part)
            missing -= len(part)
            start = 0
        return partial(iter, found)

    return draw
