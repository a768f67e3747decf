"""Perplexity: how well held-out text is predicted, segment by segment.

Documents are cut into rows of `length` tokens; what is left at a document's end, or all of a document that is shorter,
is a row too, as long as there is something to predict in it. A row begins with the model's initial state and nothing
before it; each of its tokens but the first is predicted, the first of a segment by the last of the segment before, so
the figure of segment s is the mean loss of what segment s predicts in those rows that reach it. Where memory helps, it
falls with s and the ablations do not.

Rows are read as streams, so that memory is the same at every length. For the same reason segments have a figure each
only up to a number of them, and behind those a figure for so many together.

Rows are put so that neighbours, which shuffled memories come from, are of different documents where that can be.
Intervals are over rows.

Axes: B rows of a batch, T tokens of a segment or of what is read at once, S stretches of segments, D width,
V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.config import InputError
from pipelines.data.tokenise import Tokenizer
from pipelines.tasks.base import (
    SHUFFLED,
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
from pipelines.tasks.held_out import HeldOut, blocks
from pipelines.tasks.intervals import Ratios
from rmt_core import RecurrentModel

_SINGLE = 128  # segments with a figure each; behind them there are half as many figures for every doubling
_BEFORE = 16  # tokens in front of those whose bytes are counted: more than make a character


class Row(NamedTuple):
    """Tokens start .. stop-1 of a document, at least two."""

    document: int
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


class Perplexity:
    """Loss in nats a token by segment index, its mean, and bits a byte."""

    settings = frozenset({"held_out", "limit_segments"})

    def check(self, length: int, segment_len: int, material: Material) -> None:
        check_length("perplexity", length, segment_len)
        if length < 2:
            raise InputError(f"perplexity at length {length}: nothing is predicted; use at least 2")
        rows_to_read(length, segment_len, material)

    def measure(self, model: RecurrentModel, length: int, material: Material) -> list[Figure]:
        rows = rows_to_read(length, model.segment_len, material)
        bounds = stretch_bounds(length - 1, model.segment_len)
        memories = memories_for(len(rows), material)
        found = {memory: Ratios(len(bounds) + 1) for memory in memories}  # by stretch, the loss, bits a byte
        num_same = 0
        for batch in batches(rows, material.batch_size):
            sizes = _sizes(batch, bounds, material)
            losses = batch_losses(
                model,
                batch,
                held_out=material.held_out,
                memories=memories,
                bounds=bounds,
                on_read=material.on_read,
            )
            for memory, nats in losses.items():
                whole = nats.sum(1, keepdims=True)
                for row in zip(np.hstack([nats, whole, whole / math.log(2)]), sizes, strict=True):
                    found[memory].add(*row)
            num_same += sum(a.document == b.document for a, b in zip(batch, [batch[-1], *batch[:-1]], strict=True))
        figures = []
        for memory, ratios in found.items():
            loss, *others = _figures(memory, ratios, bounds, model.segment_len)
            loss = loss._replace(
                num_read=sum(row.num_tokens for row in rows),
                num_held_out=sum(material.held_out.num_tokens),
                num_same_text=num_same if memory == SHUFFLED else None,
            )
            figures += [loss, *others]
        return figures


@torch.inference_mode()
def batch_losses(
    model: RecurrentModel,
    rows: Sequence[Row],
    *,
    held_out: HeldOut,
    memories: Sequence[str],
    bounds: np.ndarray,
    on_read: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """For each memory the summed nats of each row and stretch of segments, (B, S) float64. bounds (S + 1,)."""
    device = device_of(model)

    def parts(shift: int, on_read: Callable[[int], None] | None = None) -> Iterator[Part]:
        texts = [blocks(held_out, row.document, row.start + shift, row.stop - 1 + shift) for row in rows]
        return segments(texts, model.step_len, device, on_read)

    sums = {memory: torch.zeros(len(rows), len(bounds) - 1, dtype=torch.float64, device=device) for memory in memories}
    state = begin(model, len(rows), max(row.num_tokens for row in rows) - 1)
    for part, asked in zip(parts(0, on_read), parts(1), strict=True):
        starts = range(0, part.tokens.shape[1], model.segment_len)
        carried = state
        for memory in memories:
            out, new = model.step(part.tokens, given(memory, carried), part.lengths)
            nats = _nats(model, out.hidden, asked)
            for start in starts:
                stretch = int(np.searchsorted(bounds, part.start + start, side="right")) - 1
                sums[memory][:, stretch] += nats[:, start : start + model.segment_len].sum(1)
            state = new if memory == TRUE else state
    return {memory: summed.cpu().numpy() for memory, summed in sums.items()}


def _nats(model: RecurrentModel, hidden: Tensor, asked: Part) -> Tensor:
    """Nats of the tokens asked for given hidden states (B, T, D): (B, T) float64, 0 behind a row's end."""
    labels, rows = asked.tokens.flatten(), hidden.flatten(0, 1)
    found = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    there: slice | Tensor = slice(None)
    if asked.lengths is not None:
        places = torch.arange(asked.tokens.shape[1], device=labels.device)
        there = (places < asked.lengths[:, None]).flatten()
    labels = labels[there]
    nats = [
        F.cross_entropy(logits, labels[piece], reduction="none")
        for piece, logits in logits_in_pieces(model, rows[there])
    ]
    found[there] = torch.cat(nats).double()
    return found.view(asked.tokens.shape)


def stretch_bounds(num_predicted: int, segment_len: int) -> np.ndarray:
    """Where stretches of segments begin among so many predictions of a row, and where the last one ends: (S + 1,).

    Segments 0 to 127 are stretches of their own; 128 to 255, 256 to 511 and so on are 64 stretches each.
    """
    num_segments = -(-num_predicted // segment_len)
    starts = [0]
    while (at := starts[-1]) < num_segments:
        starts.append(min(num_segments, at + max(1, (1 << at.bit_length()) // _SINGLE)))
    return np.minimum(np.array(starts) * segment_len, num_predicted)


def _sizes(rows: Sequence[Row], bounds: np.ndarray, material: Material) -> np.ndarray:
    """Of each row the tokens that it predicts by stretch, all of them, and their bytes: (B, S + 2)."""
    predicted = np.array([[row.num_tokens - 1] for row in rows])
    num_bytes = [[_num_bytes(material.tokenizer, material.held_out, row)] for row in rows]
    return np.hstack([np.diff(np.minimum(bounds, predicted)), predicted, num_bytes])


def _num_bytes(tokenizer: Tokenizer, held_out: HeldOut, row: Row) -> int:
    """Bytes of what a row predicts; decoded behind tokens before it, as a decoder may treat the first of all apart."""
    num = 0
    before = held_out.read(row.document, row.start, row.start + 1)
    for block in blocks(held_out, row.document, row.start + 1, row.stop):
        both = np.concatenate([before, block])
        num += len(tokenizer.decode_bytes(both)) - len(tokenizer.decode_bytes(before))
        before = both[-_BEFORE:]
    return num


def _figures(memory: str, ratios: Ratios, bounds: np.ndarray, segment_len: int) -> Iterator[Figure]:
    """Of one memory; ratios by stretch of segments (S of them), then the loss, then bits a byte."""
    num_stretches = len(bounds) - 1
    loss, bits = num_stretches, num_stretches + 1

    def figure(metric: str, index: int, num_tokens: float) -> Figure:
        mean, low, high = ratios.interval(index)
        rows = int(ratios.num_rows[index])
        return Figure(metric, mean, memory, num_tokens=int(num_tokens), num_samples=rows, low=low, high=high)

    yield figure("loss", loss, ratios.size(loss))
    yield figure("bits_per_byte", bits, ratios.size(loss))
    firsts = [*(bounds[:-1] // segment_len).tolist(), -(-int(bounds[-1]) // segment_len)]
    for index in range(num_stretches):
        num = firsts[index + 1] - firsts[index]
        about = figure("loss_by_segment", index, ratios.size(index))
        yield about._replace(segment=firsts[index], num_segments=num if num > 1 else None)


# --- rows -------------------------------------------------------------------------------------------


def rows_to_read(length: int, segment_len: int, material: Material) -> list[Row]:
    """The rows to read, the longest first: all, or so many, evenly spread, as `limit_segments` allows."""
    num_tokens = material.held_out.num_tokens
    full = [Row(i, at, at + length) for i, num in enumerate(num_tokens) for at in range(0, num - length + 1, length)]
    short = [Row(i, num - num % length, num) for i, num in enumerate(num_tokens) if num % length >= 2]
    if not full:
        raise InputError(
            f"perplexity at length {length}: longer than every document of the held-out text "
            f"{material.held_out.name}; use at most {max(num_tokens)} or give longer text with --data"
        )
    if material.limit_segments is not None:
        segments_each = -(-length // segment_len)
        allowed = material.limit_segments // segments_each
        if not allowed:
            raise InputError(
                f"--limit-segments {material.limit_segments}: a row of {length} tokens is {segments_each} segments; "
                f"use at least {segments_each}, or {2 * segments_each} for shuffled memory too"
            )
        full, short = _spread(full, allowed), _spread(short, max(0, allowed - len(full)))
    return [*apart(full), *sorted(short, key=lambda row: -row.num_tokens)]


def _spread(rows: list[Row], num: int) -> list[Row]:
    return [rows[i * len(rows) // num] for i in range(num)] if num < len(rows) else rows


def batches(rows: Sequence[Row], batch_size: int) -> Iterator[list[Row]]:
    """Rows in order, by batches of nearly equal size in which neighbours are `apart`."""
    start = 0
    for size in batch_sizes(len(rows), batch_size):
        yield apart(rows[start : start + size])
        start += size


def apart(rows: Sequence[Row]) -> list[Row]:
    """Rows in an order in which neighbours, also the last and the first, are of different documents.

    That can be where no document has more than half of the rows. Others of one document are about half of their number
    apart. Documents with many rows take every second place first, then come those between.
    """
    counts = Counter(row.document for row in rows)
    ordered = sorted(rows, key=lambda row: (-counts[row.document], row))
    found = list(ordered)
    found[::2], found[1::2] = ordered[: -(-len(rows) // 2)], ordered[-(-len(rows) // 2) :]
    return found
