"""Every kind of memory learns to use what it carries: minutes of training in all, on one core.

A model of two layers and width 64 reads segments of 16 tokens. What it is asked for in the last segment stood in an
earlier one, where attention does not reach: with its memory it answers, with the memory zeroed before every segment it
guesses. Each kind has a task of its nature, and the settings that it was seen to learn with.

Axes: B rows, T tokens of a segment, N tokens of a text, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import rmt_core
from rmt_core import RecurrentModel
from rmt_core.state import State, zeroed

T = 16
NUM_VALUES, NUM_NOISE = 16, 8
KEY, ASK = NUM_VALUES + NUM_NOISE, NUM_VALUES + NUM_NOISE + 1
VOCAB = NUM_VALUES + NUM_NOISE + 2
BATCH = 32
IGNORED = rmt_core.IGNORED


class Texts(NamedTuple):
    """A batch of a task."""

    tokens: Tensor  # (B, N)
    labels: Tensor  # (B, N) the answer where one is asked for


Task = Callable[[int, int, torch.Generator], Texts]


def recall(batch_size: int, num_segments: int, generator: torch.Generator) -> Texts:
    """`KEY value` in the noise of the first segment; `ASK` at the end of the last one, answered with the value."""
    shape = (batch_size, num_segments * T)
    tokens = torch.randint(NUM_VALUES, NUM_VALUES + NUM_NOISE, shape, generator=generator)
    values = torch.randint(NUM_VALUES, (batch_size,), generator=generator)
    at, rows = torch.randint(0, T - 1, (batch_size,), generator=generator), torch.arange(batch_size)
    tokens[rows, at], tokens[rows, at + 1], tokens[:, -1] = KEY, values, ASK
    labels = torch.full(shape, IGNORED)
    labels[:, -1] = values
    return Texts(tokens, labels)


def copy(batch_size: int, num_segments: int, generator: torch.Generator) -> Texts:
    """A segment of values, then the same again: each but the first predicted from the segment before."""
    values = torch.randint(NUM_VALUES, (batch_size, T), generator=generator)
    tokens = values.repeat(1, num_segments)
    labels = torch.cat([tokens[:, 1:], torch.full((batch_size, 1), IGNORED)], dim=1)
    labels[:, :T] = IGNORED
    return Texts(tokens, labels)


def sort(batch_size: int, num_segments: int, generator: torch.Generator) -> Texts:
    """Symbols whose odds drift along the text; after `ASK` in a last segment of noise all of them, the most frequent
    first. Guessing one of those not yet listed is right in 0.41 of the places."""
    shape, num_symbols = (batch_size, (num_segments - 1) * T), 6
    ends = torch.randint(1, 10, (2, batch_size, 1, num_symbols), generator=generator).double().square()
    start, end = ends / ends.sum(-1, keepdim=True)
    drift = (torch.arange(shape[1]).double() + 1)[:, None] / shape[1]
    odds = start + (end - start) * drift  # (B, N - T, symbols)
    symbols = torch.multinomial(odds.flatten(0, 1), 1, generator=generator).view(shape)
    counts = torch.nn.functional.one_hot(symbols, num_symbols).sum(1)
    answers = counts.argsort(dim=-1, descending=True, stable=True)
    noise = torch.randint(NUM_VALUES, NUM_VALUES + NUM_NOISE, (batch_size, T - num_symbols), generator=generator)
    noise[:, -1] = ASK
    tokens = torch.cat([symbols, noise, answers], dim=1)
    labels = torch.full(tokens.shape, IGNORED)
    labels[:, -num_symbols - 1 : -1] = answers
    return Texts(tokens, labels)


class Kind(NamedTuple):
    """How one kind is trained, and by how much it must win."""

    memory: Any
    task: Task = recall
    num_segments: tuple[int, ...] = (1, 2, 3)  # stages: the most segments of a batch; tested at the last
    steps: tuple[int, ...] = (40, 160, 100)  # of each stage
    learning_rate: float = 3e-3
    accuracy: float = 0.9  # at least, with the memory
    without: float = 0.2  # at most, with the memory zeroed; guessing gives 1 / 16


KINDS = {
    "rmt": Kind({"kind": "rmt", "num_tokens": 4}),
    "xl": Kind({"kind": "xl", "cache_len": T}, copy, (2,), (200,)),
    "armt": Kind({"kind": "armt", "num_tokens": 4, "key_width": 16}),
    "shm": Kind({"kind": "shm", "size": 24}),
    "lamemo": Kind({"kind": "lamemo", "cache_len": 2 * T}),
    "bmojo": Kind({"kind": "bmojo", "window": 8, "state_size": 16}, steps=(60, 200, 160)),
    "bmojo-full": Kind({"kind": "bmojo", "window": 8, "state_size": 16, "num_eidetic": 4}),
    "memformer": Kind({"kind": "memformer", "num_slots": 8}, steps=(60, 200, 160)),
    "infinity": Kind(
        {"kind": "infinity", "num_basis": 32, "num_samples": 32}, sort, (3,), (300,), accuracy=0.75, without=0.5
    ),
}


def build(memory: Any) -> RecurrentModel:
    backbone = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
    }
    return rmt_core.build(backbone=backbone, memory=memory, segment_len=T)


def train(kind: Kind, seed: int) -> RecurrentModel:
    torch.manual_seed(seed)
    model, generator = build(kind.memory).train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=kind.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    done, total = 0, sum(kind.steps)
    for most, steps in zip(kind.num_segments, kind.steps, strict=True):
        for _ in range(steps):
            least = 2 if kind.task is not recall else 1
            num_segments = int(torch.randint(min(least, most), most + 1, (), generator=generator))
            tokens, labels = kind.task(BATCH, num_segments, generator)
            for group in optimizer.param_groups:
                group["lr"] = kind.learning_rate * min(1.0, (done + 1) / 20, 0.05 + 2 * (total - done) / total)
            optimizer.zero_grad()
            model(tokens, labels, generator=generator).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
    return model.eval()


@torch.no_grad()
def accuracy(model: RecurrentModel, texts: Texts, change: Callable[[State], State]) -> float:
    """Fraction of answers that are right where `change` is made to the state before every segment."""
    state, right, asked = model.init_state(len(texts.tokens)), 0, 0
    for tokens, labels in zip(texts.tokens.split(T, 1), texts.labels.split(T, 1), strict=True):
        out, state = model.step(tokens, change(state))
        there = labels != IGNORED
        right += int((out.logits.argmax(-1) == labels)[there].sum())
        asked += int(there.sum())
    return right / asked


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_it_answers_with_its_memory_and_not_without(name: str) -> None:
    kind = KINDS[name]
    model = train(kind, seed=0)
    texts = kind.task(256, kind.num_segments[-1], torch.Generator().manual_seed(10**6))
    with_memory, without = accuracy(model, texts, lambda state: state), accuracy(model, texts, zeroed)
    assert with_memory >= kind.accuracy, (with_memory, without)
    assert without <= kind.without, (with_memory, without)
