"""Perplexity: how well held-out text is predicted, segment by segment.

Documents are cut into rows of `length` tokens. A row begins with the model's initial state and nothing before it; each
of its tokens but the first is predicted, the first of a segment by the last of the segment before, so the figure of
segment s is the mean loss of what segment s predicts. Where memory helps, it falls with s and the ablations do not.

Intervals are over rows.

Axes: B rows of a batch, R rows in all, N tokens of a row, T tokens of a segment, K segments, D width, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.config import InputError
from pipelines.tasks.base import (
    TRUE,
    Figure,
    Material,
    batch_sizes,
    begin,
    check_length,
    device_of,
    given,
    logits_in_pieces,
    memories_for,
    segments,
)
from pipelines.tasks.intervals import ratio_interval
from rmt_core import RecurrentModel


class Row(NamedTuple):
    """A stretch of `length` tokens of a document."""

    document: int
    start: int


class Perplexity:
    """Loss in nats a token by segment index, its mean, and bits a byte."""

    settings = frozenset({"held_out", "limit_segments"})

    def check(self, length: int, segment_len: int, material: Material) -> None:
        check_length("perplexity", length, segment_len)
        if length < 2:
            raise InputError(f"perplexity at length {length}: nothing is predicted; use at least 2")
        _rows(length, segment_len, material)

    def measure(self, model: RecurrentModel, length: int, material: Material) -> list[Figure]:
        rows = _rows(length, model.segment_len, material)
        memories = memories_for(len(rows), material)
        nats: dict[str, list[np.ndarray]] = {memory: [] for memory in memories}  # (B, K) each
        num_bytes: list[int] = []
        for batch in _batches(rows, material.batch_size):
            texts = [material.held_out.read(row.document, row.start, row.start + length) for row in batch]
            num_bytes.extend(len(material.tokenizer.decode_bytes(text[1:])) for text in texts)
            for memory, losses in batch_losses(model, np.stack(texts), memories).items():
                nats[memory].append(losses)
        sizes = (_num_predicted(length, model.segment_len), np.array(num_bytes))
        return [figure for memory in memories for figure in _figures(memory, np.concatenate(nats[memory]), *sizes)]


@torch.inference_mode()
def batch_losses(model: RecurrentModel, texts: np.ndarray, memories: Sequence[str]) -> dict[str, np.ndarray]:
    """For each memory the summed nats of each row and segment, (B, K) float64. texts: (B, N) integers, N >= 2."""
    device = device_of(model)
    labels = torch.from_numpy(texts.astype(np.int64)).to(device)
    losses: dict[str, list[Tensor]] = {memory: [] for memory in memories}
    state = begin(model, len(texts), texts.shape[1] - 1)
    for part in segments([[text[:-1]] for text in texts], model.step_len, device):
        asked = labels[:, part.start + 1 : part.start + 1 + part.tokens.shape[1]]
        carried = state
        for memory in memories:
            out, new = model.step(part.tokens, given(memory, carried))
            pairs = zip(out.hidden.split(model.segment_len, 1), asked.split(model.segment_len, 1), strict=True)
            losses[memory].extend(_losses(model, *pair) for pair in pairs)
            state = new if memory == TRUE else state
    return {memory: torch.stack(sums, 1).cpu().numpy() for memory, sums in losses.items()}


def _losses(model: RecurrentModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """Nats of labels (B, T) given hidden states (B, T, D), summed over each row: (B,) float64."""
    flat = labels.flatten()
    nats = [
        F.cross_entropy(logits, flat[piece], reduction="none")
        for piece, logits in logits_in_pieces(model, hidden.flatten(0, 1))
    ]
    return torch.cat(nats).double().view(labels.shape).sum(1)


def _num_predicted(length: int, segment_len: int) -> np.ndarray:
    """How many tokens each segment of a row predicts, (K,)."""
    ends = np.minimum(np.arange(0, length - 1 + segment_len, segment_len), length - 1)
    return np.diff(ends)


def _figures(memory: str, nats: np.ndarray, num_predicted: np.ndarray, num_bytes: np.ndarray) -> list[Figure]:
    """nats (R, K) of one memory, by rows and segments; num_predicted (K,) tokens of a row, num_bytes (R,)."""
    num_rows, each = len(nats), int(num_predicted.sum())

    def figure(metric: str, sums: np.ndarray, sizes: np.ndarray, num_tokens: int, segment: int | None = None) -> Figure:
        mean, low, high = ratio_interval(sums, sizes)
        tokens = num_rows * num_tokens
        return Figure(metric, mean, memory, segment, num_tokens=tokens, num_samples=num_rows, low=low, high=high)

    whole = nats.sum(1)
    return [
        figure("loss", whole, np.full(num_rows, each), each),
        figure("bits_per_byte", whole / math.log(2), num_bytes, each),
        *(
            figure("loss_by_segment", nats[:, index], np.full(num_rows, num), int(num), index)
            for index, num in enumerate(num_predicted)
        ),
    ]


def _rows(length: int, segment_len: int, material: Material) -> list[Row]:
    """The rows to read: all that fit, or so many, evenly spread, as `limit_segments` allows."""
    num_tokens = material.held_out.num_tokens
    rows = [Row(i, at * length) for i, num in enumerate(num_tokens) for at in range(num // length)]
    if not rows:
        raise InputError(
            f"perplexity at length {length}: longer than every document of the held-out text "
            f"{material.held_out.name}; use at most {max(num_tokens)} or give longer text with --data"
        )
    if material.limit_segments is None:
        return rows
    segments_each = -(-length // segment_len)
    allowed = material.limit_segments // segments_each
    if not allowed:
        raise InputError(
            f"--limit-segments {material.limit_segments}: a row of {length} tokens is {segments_each} segments; "
            f"use at least {segments_each}, or {2 * segments_each} for shuffled memory too"
        )
    return [rows[i * len(rows) // allowed] for i in range(allowed)] if allowed < len(rows) else rows


def _batches(rows: list[Row], batch_size: int) -> Iterator[list[Row]]:
    start = 0
    for size in batch_sizes(len(rows), batch_size):
        yield rows[start : start + size]
        start += size
