"""Lanes: the rows of a training batch, each following documents segment by segment.

A run has a fixed number of lanes, numbered globally; worker r of W reads lanes r, r + W, ... so that the order of the
data does not depend on W. A lane reads documents of a segment store one after another, or windows drawn anywhere in
them (`sampling.py`), or texts of tasks (`task_lanes.py`).

Axes: R lanes of a worker, K segments of a window, T tokens of a segment.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pipelines.data.plan import Blend, Figures, Piece, Reads, cut_pieces, figures, plan

IGNORED = -100  # a label that is not asked for


class Window(NamedTuple):
    """The next K segments of each lane."""

    tokens: np.ndarray  # (R, K, T) int64, zeros behind a short segment's end
    labels: np.ndarray  # (R, K, T) int64, the next token or -100
    weights: np.ndarray  # (R, K, T) float32 of the labels in the loss
    lengths: np.ndarray  # (R, K) int64 real tokens
    reset: np.ndarray  # (R, K) bool, a document or a piece of one begins here
    segment_index: np.ndarray  # (R, K) int64, the segment's number since the last reset
    is_answer: np.ndarray  # (R, K, T) bool, the label is of an answer to a task's question


class Cursor(NamedTuple):
    """Where a lane is: everything before it has been read."""

    epoch: int = 0
    piece: int = 0  # place in the lane's list of that epoch
    segment: int = 0  # of the piece


class Describes(Protocol):
    """What the lanes of one kind have in common."""

    def describe(self) -> str: ...  # what they read, in a line


class Lane(Protocol):
    """A row of the batch."""

    number: int

    @property
    def source(self) -> Describes: ...

    def fill(self, window: Window, row: int, step: int) -> None: ...


class Passage(NamedTuple):
    """Consecutive segments of one document."""

    document: int  # place in the store's manifest
    start: int  # first segment
    stop: int  # behind the last one
    num_before: int  # segments since the last reset; 0: here is one


def put(store: Reads, eos_id: int | None, passage: Passage, window: Window, place: tuple[int, int]) -> None:
    """Writes a passage into a window, from (row, segment) on; a document's last token predicts `eos_id`, if any."""
    row, first = place
    tokens, labels = _text(store, eos_id, passage)
    for i in range(passage.stop - passage.start):
        part = slice(i * store.segment_len, (i + 1) * store.segment_len)
        size = len(tokens[part])
        window.tokens[row, first + i, :size] = tokens[part]
        window.labels[row, first + i, :size] = labels[part]
        window.weights[row, first + i, :size] = labels[part] != IGNORED
        window.lengths[row, first + i] = size
        window.segment_index[row, first + i] = passage.num_before + i
    window.reset[row, first] = passage.num_before == 0


def _text(store: Reads, eos_id: int | None, passage: Passage) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels of a passage."""
    document = store.manifest[passage.document]
    tokens = store.read(document, passage.start, min(passage.stop + 1, document.num_segments))
    size = min((passage.stop - passage.start) * store.segment_len, len(tokens))
    end = IGNORED if eos_id is None else eos_id
    following = np.append(tokens[1 : size + 1], end)[:size]
    return tokens[:size], following


class DocumentLane:
    """Follows the documents that are planned for it, epoch after epoch."""

    def __init__(self, source: "DocumentSource", number: int, cursor: Cursor) -> None:
        self.source = source
        self.number = number
        self.cursor = cursor

    def fill(self, window: Window, row: int, step: int) -> None:
        """Write the lane's next K segments into row `row`."""
        num_segments = window.tokens.shape[1]
        filled = 0
        while filled < num_segments:
            piece = self.source.lane(self.number, self.cursor.epoch)[self.cursor.piece]
            at = self.cursor.segment
            count = min(num_segments - filled, piece.num_segments - at)
            passage = Passage(piece.document, piece.start + at, piece.start + at + count, at)
            put(self.source.store, self.source.eos_id, passage, window, (row, filled))
            filled += count
            self._advance(count)

    def _advance(self, num_segments: int) -> None:
        """Move the cursor over segments of one piece, to the next piece or epoch at its end."""
        epoch, number, at = self.cursor
        pieces = self.source.lane(self.number, epoch)
        if at + num_segments < pieces[number].num_segments:
            self.cursor = Cursor(epoch, number, at + num_segments)
        elif number + 1 < len(pieces):
            self.cursor = Cursor(epoch, number + 1)
        else:
            self.cursor = Cursor(epoch + 1)


class DocumentSource:
    """The store's documents, planned onto lanes."""

    def __init__(
        self, store: Reads, num_lanes: int, *, seed: int, eos_id: int | None, piece_segments: int | None
    ) -> None:
        self.store = store
        self.eos_id = eos_id
        self.num_lanes = num_lanes
        self.seed = seed
        self._pieces = cut_pieces(store.manifest, piece_segments)
        self._blend = Blend(self._pieces, store.shares, num_lanes, seed) if store.shares else None
        self._plans: dict[int, list[list[Piece]]] = {}

    def lane(self, number: int, epoch: int) -> list[Piece]:
        """What lane `number` reads in an epoch."""
        return self._plan(epoch)[number]

    def figures(self) -> Figures:
        """Of the first epoch."""
        return figures(self.store, self._plan(0))

    def describe(self) -> str:
        """What the lanes read and what of it is waste, in a line."""
        found = self.figures()
        return (
            f"{found.num_lanes} rows follow {found.num_pieces} pieces of documents, {found.least_segments} to "
            f"{found.most_segments} segments a row and epoch; {found.padding_fraction:.1%} of it is padding"
        )

    def _plan(self, epoch: int) -> list[list[Piece]]:
        if epoch not in self._plans:
            pieces = self._pieces if self._blend is None else self._blend.pieces(epoch)
            self._plans = {epoch: plan(pieces, self.num_lanes, epoch, self.seed)} | {
                kept: lanes for kept, lanes in self._plans.items() if kept >= epoch - 1
            }
        return self._plans[epoch]


class Lanes:
    """The lanes of one worker."""

    def __init__(self, lanes: Sequence[Lane], segment_len: int) -> None:
        self.lanes = list(lanes)
        self.segment_len = segment_len

    def window(self, step: int, num_segments: int) -> Window:
        """The next segments of every lane; moves the cursors."""
        shape = (len(self.lanes), num_segments, self.segment_len)
        window = Window(
            tokens=np.zeros(shape, dtype=np.int64),
            labels=np.full(shape, IGNORED, dtype=np.int64),
            weights=np.zeros(shape, dtype=np.float32),
            lengths=np.zeros(shape[:2], dtype=np.int64),
            reset=np.zeros(shape[:2], dtype=bool),
            segment_index=np.zeros(shape[:2], dtype=np.int64),
            is_answer=np.zeros(shape, dtype=bool),
        )
        for row, lane in enumerate(self.lanes):
            lane.fill(window, row, step)
        return window

    def cursors(self) -> list[Cursor | None]:
        """Where each lane is; None for those that need no cursor, as they draw by the step."""
        return [lane.cursor if isinstance(lane, DocumentLane) else None for lane in self.lanes]

    def move(self, cursors: Sequence[Cursor | None]) -> None:
        """Sets the lanes to their cursors."""
        for lane, cursor in zip(self.lanes, cursors, strict=True):
            if isinstance(lane, DocumentLane) and cursor is not None:
                lane.cursor = cursor
