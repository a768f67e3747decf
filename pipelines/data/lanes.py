"""Lanes: the rows of a training batch, each following documents segment by segment.

A run has a fixed number of lanes, numbered globally; worker r of W reads lanes r, r + W, ... so that the order of the
data does not depend on W. A lane reads documents of a segment store one after another, or texts with planted facts.

Axes: R lanes of a worker, K segments of a window, T tokens of a segment.
"""

import heapq
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple, Protocol

import numpy as np

from pipelines.config import InputError
from pipelines.data.store import DocumentEntry
from pipelines.tasks import recall

IGNORED = -100  # a label that is not asked for


class Window(NamedTuple):
    """The next K segments of each lane."""

    tokens: np.ndarray  # (R, K, T) int64, zeros behind a short segment's end
    labels: np.ndarray  # (R, K, T) int64, the next token or -100
    weights: np.ndarray  # (R, K, T) float32 of the labels in the loss
    lengths: np.ndarray  # (R, K) int64 real tokens
    reset: np.ndarray  # (R, K) bool, a document begins here
    segment_index: np.ndarray  # (R, K) int64, the segment's number in its document
    is_answer: np.ndarray  # (R, K, T) bool, the label is the answer to a planted question


class Piece(NamedTuple):
    """Consecutive segments of a document that a lane reads without a reset."""

    document: int  # place in the store's manifest
    start: int  # first segment
    stop: int  # behind the last one

    @property
    def num_segments(self) -> int:
        return self.stop - self.start


class Cursor(NamedTuple):
    """Where a lane is: everything before it has been read."""

    epoch: int = 0
    piece: int = 0  # place in the lane's list of that epoch
    segment: int = 0  # of the piece


class Reads(Protocol):
    """The part of a segment store that lanes need."""

    segment_len: int
    manifest: list[DocumentEntry]

    def read(self, document: DocumentEntry, start: int, stop: int) -> np.ndarray: ...


def cut_pieces(manifest: Sequence[DocumentEntry], max_segments: int | None) -> list[Piece]:
    """Documents whole, or in pieces of at most `max_segments` segments."""
    pieces = []
    for number, document in enumerate(manifest):
        size = max_segments or document.num_segments
        for start in range(0, document.num_segments, size):
            pieces.append(Piece(number, start, min(start + size, document.num_segments)))
    return pieces


def plan(pieces: Sequence[Piece], num_lanes: int, epoch: int, seed: int) -> list[list[Piece]]:
    """Each lane's pieces in an epoch: the longest first to the lane with the least, then a seeded order in the lane.

    Depends on nothing but its arguments. Raises InputError when a lane would have nothing to read.
    """
    if len(pieces) < num_lanes:
        raise InputError(
            f"{len(pieces)} documents cannot fill {num_lanes} lanes; set batch_size to at most {len(pieces)} "
            "(beside the lanes of planted facts), or follow long documents in pieces: data.piece_segments N"
        )

    def order(piece: Piece) -> bytes:
        return blake2b(f"{seed}/{epoch}/{piece.document}/{piece.start}".encode(), digest_size=8).digest()

    loads = [(0, lane) for lane in range(num_lanes)]
    lanes: list[list[Piece]] = [[] for _ in range(num_lanes)]
    for piece in sorted(pieces, key=lambda piece: (-piece.num_segments, order(piece))):
        load, lane = heapq.heappop(loads)
        lanes[lane].append(piece)
        heapq.heappush(loads, (load + piece.num_segments, lane))
    return [sorted(lane, key=order) for lane in lanes]


def padding_fraction(lanes: Sequence[Sequence[Piece]]) -> float:
    """How much less than the fullest lane the others read in an epoch, on average, in [0, 1]."""
    loads = [sum(piece.num_segments for piece in lane) for lane in lanes]
    return 1 - sum(loads) / (max(loads) * len(loads))


class DocumentLane:
    """Follows the documents that are planned for it, epoch after epoch."""

    def __init__(self, source: "DocumentSource", number: int, cursor: Cursor) -> None:
        self.source = source
        self.number = number
        self.cursor = cursor

    def fill(self, window: Window, row: int, step: int) -> None:
        """Write the lane's next K segments into row `row`."""
        num_segments, segment_len = window.tokens.shape[1:]
        filled = 0
        while filled < num_segments:
            piece = self.source.lane(self.number, self.cursor.epoch)[self.cursor.piece]
            at = self.cursor.segment
            count = min(num_segments - filled, piece.num_segments - at)
            tokens, labels = self.source.text(piece, piece.start + at, piece.start + at + count)
            for i in range(count):
                part = slice(i * segment_len, (i + 1) * segment_len)
                size = len(tokens[part])
                window.tokens[row, filled + i, :size] = tokens[part]
                window.labels[row, filled + i, :size] = labels[part]
                window.weights[row, filled + i, :size] = labels[part] != IGNORED
                window.lengths[row, filled + i] = size
                window.segment_index[row, filled + i] = at + i
            window.reset[row, filled] = at == 0
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
        self.pieces = cut_pieces(store.manifest, piece_segments)
        self.num_lanes = num_lanes
        self.seed = seed
        self._plans: dict[int, list[list[Piece]]] = {}

    def lane(self, number: int, epoch: int) -> list[Piece]:
        """What lane `number` reads in an epoch."""
        if epoch not in self._plans:
            self._plans = {epoch: plan(self.pieces, self.num_lanes, epoch, self.seed)} | {
                kept: lanes for kept, lanes in self._plans.items() if kept >= epoch - 1
            }
        return self._plans[epoch][number]

    def text(self, piece: Piece, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels of segments [start, stop); a document's last token predicts the end token, if any."""
        document = self.store.manifest[piece.document]
        tokens = self.store.read(document, start, min(stop + 1, document.num_segments))
        size = min((stop - start) * self.store.segment_len, len(tokens))
        end = IGNORED if self.eos_id is None else self.eos_id
        following = np.append(tokens[1 : size + 1], end)[:size]
        return tokens[:size], following


class RecallLane:
    """Texts with a planted fact and a question at the end, each exactly as long as a window; drawn anew each step."""

    def __init__(self, source: "RecallSource", number: int) -> None:
        self.source = source
        self.number = number

    def fill(self, window: Window, row: int, step: int) -> None:
        """Write the text of this step into row `row`."""
        num_segments, segment_len = window.tokens.shape[1:]
        sample = self.source.draw(step, self.number, num_segments, segment_len)
        tokens = np.concatenate([sample.tokens, sample.answer])
        size, question = len(tokens), len(sample.tokens)
        flat = {name: getattr(window, name)[row].reshape(-1) for name in ("tokens", "labels", "weights", "is_answer")}
        flat["tokens"][:size] = tokens
        flat["labels"][: size - 1] = tokens[1:]
        flat["weights"][: size - 1] = self.source.text_weight
        flat["weights"][question - 1 : size - 1] = self.source.answer_weight
        flat["is_answer"][question - 1 : size - 1] = True
        window.lengths[row] = np.clip(size - segment_len * np.arange(num_segments), 0, segment_len)
        window.segment_index[row] = np.arange(num_segments)
        window.reset[row, 0] = True


class RecallSource:
    """Planted facts in excerpts of the store's documents, or in noise."""

    def __init__(
        self,
        tokenizer: recall.Encodes,
        background: recall.Background,
        *,
        seed: int,
        text_weight: float,
        answer_weight: float,
    ) -> None:
        self.tokenizer = tokenizer
        self.background = background
        self.seed = seed
        self.text_weight = text_weight
        self.answer_weight = answer_weight
        self.shortest = recall.shortest_text(tokenizer)  # tokens, without the answer
        self.longest_answer = recall.longest_answer(tokenizer)

    def draw(self, step: int, lane: int, num_segments: int, segment_len: int) -> recall.RecallSample:
        """A text that ends, with its answer, anywhere in the last of `num_segments` segments.

        Where there is room the fact stands before the segment in which the answer begins, so that only memory
        brings it there.
        """
        generator = np.random.default_rng((self.seed, step, lane))
        longest = num_segments * segment_len - self.longest_answer
        shortest = max(self.shortest, longest - segment_len + 1)
        if shortest > longest:
            raise InputError(
                f"a window of {num_segments} segments of {segment_len} tokens is too short for a planted fact and its "
                f"question ({self.shortest} tokens and the answer); use longer segments, or more of them at first "
                "(curriculum.num_segments) with curriculum.vary no"
            )
        length = int(generator.integers(shortest, longest + 1))
        answering = (length - 1) // segment_len * segment_len  # where the answer's segment begins
        latest = answering - self.shortest + 1
        drawn = recall.samples(
            self.tokenizer,
            self.background,
            length=length,
            num=1,
            seed=int(generator.integers(2**62)),
            latest=latest if latest > 0 else None,
        )
        return next(drawn)


def store_prose(store: Reads) -> recall.Background:
    """Excerpts of the store's documents, each token equally likely to be the first; a short document starts over."""
    sizes = np.array([document.num_tokens for document in store.manifest], dtype=np.float64)

    def draw(num: int, generator: np.random.Generator) -> np.ndarray:
        document = store.manifest[int(generator.choice(len(sizes), p=sizes / sizes.sum()))]
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
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int32)

    return draw


class Lanes:
    """The lanes of one worker."""

    def __init__(self, lanes: Sequence[DocumentLane | RecallLane], segment_len: int) -> None:
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

    def cursors(self) -> dict[int, Cursor]:
        """Lane number -> cursor, of the lanes that read documents."""
        return {lane.number: lane.cursor for lane in self.lanes if isinstance(lane, DocumentLane)}
