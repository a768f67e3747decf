"""Tasks that end in a question with one right answer: how often the model gives it.

The text is read segment by segment with a state of fixed size. The answer counts when each of its tokens is the
likeliest of the whole vocabulary at its place after the true text before it; greedy decoding then writes just this
answer, and not otherwise.

Axes: B rows, N tokens of a text, a tokens of an answer, T tokens of a segment, D width, V vocabulary.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pipelines.config import InputError
from pipelines.data.tokenise import Tokenizer
from pipelines.tasks.base import (
    TRUE,
    Figure,
    Material,
    batch_sizes,
    check_length,
    device_of,
    given,
    logits_in_pieces,
    memories_for,
    segments,
)
from pipelines.tasks.held_out import HeldOut, opening
from pipelines.tasks.recall import Background, noise, prose
from rmt_core import RecurrentModel

PROSE_TOKENS = 4 * 1024**2  # of held-out text that excerpts are taken from

_NORMAL_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


class Sample(Protocol):
    """A text that ends in a question, and its answer."""

    @property
    def tokens(self) -> np.ndarray: ...  # (N,) int32, the question at its end

    @property
    def answer(self) -> np.ndarray: ...  # (a,) int32

    @property
    def num_choices(self) -> int: ...  # chance is 1 / num_choices


class Samples(Protocol):
    """Draws `num` texts of `length` tokens; the facts that are asked for begin before token `latest`."""

    def __call__(
        self, tokenizer: Tokenizer, background: Background, *, length: int, num: int, seed: int, latest: int | None
    ) -> Iterator[Sample]: ...


class Tokens(Protocol):
    """A number of tokens that depends on the tokenizer."""

    def __call__(self, tokenizer: Tokenizer) -> int: ...


class Interval(NamedTuple):
    low: float
    high: float


class QuestionTask:
    """Accuracy of the answers. Text, question and answer together have `length` tokens.

    `shortest_text` holds all facts and the question; `longest_answer` is the most tokens that an answer has. Where
    the length has room for it, facts end before the segment in which the answer begins: only memory brings them there.
    """

    settings = frozenset({"held_out", "background", "num_samples", "seed"})

    def __init__(self, name: str, samples: Samples, shortest_text: Tokens, longest_answer: Tokens) -> None:
        self.name = name
        self.samples = samples
        self.shortest_text = shortest_text
        self.longest_answer = longest_answer

    def check(self, length: int, segment_len: int, material: Material) -> None:
        check_length(self.name, length, segment_len)
        need = self.shortest_text(material.tokenizer) + self.longest_answer(material.tokenizer)
        if length < need:
            raise InputError(f"{self.name} at length {length}: fact, question and answer need at least {need} tokens")

    def measure(self, model: RecurrentModel, length: int, material: Material) -> list[Figure]:
        tokenizer, num = material.tokenizer, material.num_samples
        text_len = length - self.longest_answer(tokenizer)
        answering = (text_len - 1) // model.segment_len * model.segment_len  # where the answer's segment begins
        latest = answering - self.shortest_text(tokenizer) + 1
        needs_memory = latest > 0
        drawn = self.samples(
            tokenizer,
            _background(material.background, tokenizer, material.held_out),
            length=text_len,
            num=num,
            seed=material.seed,
            latest=latest if needs_memory else None,
        )
        memories = memories_for(num)
        num_right = dict.fromkeys(memories, 0)
        chance = 0.0
        for size in batch_sizes(num, material.batch_size):
            batch = list(itertools.islice(drawn, size))
            for memory, right in batch_answers(model, batch, memories).items():
                num_right[memory] += int(right.sum())
            chance += sum(1 / sample.num_choices for sample in batch) / num
        return [_figure(memory, num_right[memory], num, chance, needs_memory) for memory in memories]


def _figure(memory: str, num_right: int, num: int, chance: float, needs_memory: bool) -> Figure:
    low, high = wilson_interval(num_right, num)
    return Figure(
        "accuracy",
        num_right / num,
        memory,
        num_samples=num,
        low=low,
        high=high,
        chance=chance,
        needs_memory=needs_memory,
    )


@torch.inference_mode()
def batch_answers(model: RecurrentModel, samples: Sequence[Sample], memories: Sequence[str]) -> dict[str, np.ndarray]:
    """For each memory which samples are answered rightly, (B,) bool.

    The ablations give a segment another state but never change what is carried, so they are run only over
    segments in which a token of an answer is predicted.
    """
    device = device_of(model)
    rows = [np.concatenate([sample.tokens, sample.answer[:-1]]) for sample in samples]
    asked = _asked(samples)
    right = {memory: np.ones(len(samples), dtype=bool) for memory in memories}
    state = model.init_state(len(samples))
    for part in segments(rows, model.segment_len, device):
        end = part.start + part.tokens.shape[1]
        here = asked[(part.start <= asked[:, 1]) & (asked[:, 1] < end)]  # (asked here, 3)
        carried = state
        for memory in memories if len(here) else (TRUE,):
            out, new = model.step(part.tokens, given(memory, carried), part.lengths)
            state = new if memory == TRUE else state
            if len(here):
                wrong = here[_chosen(model, out.hidden, here[:, 0], here[:, 1] - part.start) != here[:, 2]]
                right[memory][wrong[:, 0]] = False
    return right


def _asked(samples: Sequence[Sample]) -> np.ndarray:
    """Every token of every answer: (row, the place that predicts it, the token), (all answers' tokens, 3) int64."""
    found = [
        (row, len(sample.tokens) - 1 + i, int(token))
        for row, sample in enumerate(samples)
        for i, token in enumerate(sample.answer)
    ]
    return np.array(found, dtype=np.int64)


def _chosen(model: RecurrentModel, hidden: Tensor, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The likeliest next token at places of rows of hidden (B, T, D): (places,) int64."""
    device = hidden.device
    at = hidden[torch.from_numpy(rows).to(device), torch.from_numpy(places).to(device)]  # (places, D)
    return torch.cat([logits.argmax(-1) for _, logits in logits_in_pieces(model, at)]).cpu().numpy()


def _background(kind: str, tokenizer: Tokenizer, held_out: HeldOut) -> Background:
    return noise(tokenizer) if kind == "noise" else prose(opening(held_out, PROSE_TOKENS))


def wilson_interval(num_right: int, num: int) -> Interval:
    """The 95 % score interval of a proportion (Wilson 1927): sound at 0, at 1 and for few samples, unlike p +- 2 s."""
    p, z2 = num_right / num, _NORMAL_95**2
    middle = (p + z2 / (2 * num)) / (1 + z2 / num)
    half = _NORMAL_95 / (1 + z2 / num) * math.sqrt(p * (1 - p) / num + z2 / (4 * num**2))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))
