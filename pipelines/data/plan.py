"""Which lane reads which documents: balanced, in a seeded order, and in given proportions where stores are mixed.

Nothing here depends on how many workers there are, and an epoch's plan on nothing but the epoch's number.
"""

import heapq
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import NamedTuple, Protocol

import numpy as np

from pipelines.config import InputError
from pipelines.data.store import DocumentEntry


class Share(NamedTuple):
    """One of several stores that are read together."""

    documents: range  # its documents' places in the manifest
    weight: float  # of its segments among those that are read; weights are compared with one another


class Reads(Protocol):
    """The part of a segment store that lanes need."""

    segment_len: int
    manifest: list[DocumentEntry]

    @property
    def shares(self) -> Sequence[Share]: ...  # none: every document as often as any other

    def read(self, document: DocumentEntry, start: int, stop: int) -> np.ndarray: ...


class Piece(NamedTuple):
    """Consecutive segments of a document that a lane reads without a reset."""

    document: int  # place in the store's manifest
    start: int  # first segment
    stop: int  # behind the last one
    turn: int = 0  # how often its store was read through before, where stores have weights

    @property
    def num_segments(self) -> int:
        return self.stop - self.start


def cut_pieces(manifest: Sequence[DocumentEntry], max_segments: int | None) -> list[Piece]:
    """Documents whole, or in pieces of at most `max_segments` segments."""
    pieces = []
    for number, document in enumerate(manifest):
        size = max_segments or document.num_segments
        for start in range(0, document.num_segments, size):
            pieces.append(Piece(number, start, min(start + size, document.num_segments)))
    return pieces


def _order(piece: Piece, *keys: int) -> bytes:
    """What pieces are sorted by: another order for other keys, the seed first."""
    words = [*keys, piece.document, piece.start, *([piece.turn] if piece.turn else [])]
    return blake2b("/".join(map(str, words)).encode(), digest_size=8).digest()


def plan(pieces: Sequence[Piece], num_lanes: int, epoch: int, seed: int) -> list[list[Piece]]:
    """Each lane's pieces in an epoch: the longest first to the lane with the least, then a seeded order in the lane.

    Depends on nothing but its arguments. Raises InputError when a lane would have nothing to read.
    """
    _check_enough(len(pieces), num_lanes)
    keys = {piece: _order(piece, seed, epoch) for piece in pieces}
    loads = [(0, lane) for lane in range(num_lanes)]
    lanes: list[list[Piece]] = [[] for _ in range(num_lanes)]
    for piece in sorted(pieces, key=lambda piece: (-piece.num_segments, keys[piece])):
        load, lane = heapq.heappop(loads)
        lanes[lane].append(piece)
        heapq.heappush(loads, (load + piece.num_segments, lane))
    return [sorted(lane, key=keys.__getitem__) for lane in lanes]


def _check_enough(num_pieces: int, num_lanes: int) -> None:
    if num_pieces < num_lanes:
        raise InputError(
            f"{num_pieces} documents cannot fill {num_lanes} lanes; set batch_size to at most {num_pieces} "
            "(beside the rows that read texts of tasks), or follow long documents in pieces: dataset.piece_segments N"
        )


class Blend:
    """The pieces of several stores, epoch by epoch, in the proportions of their weights.

    An epoch has about as many segments as all stores together (a multiple of it where that would leave lanes empty).
    Each store is read through again and again, in another order each time, and an epoch takes up where the one before
    stopped: so all documents of a store are read equally often, and the proportions hold to within a piece.
    """

    def __init__(self, pieces: Sequence[Piece], shares: Sequence[Share], num_lanes: int, seed: int) -> None:
        _check_enough(len(pieces), num_lanes)
        self._seed = seed
        self._pieces = [[piece for piece in pieces if piece.document in share.documents] for share in shares]
        total = sum(share.weight for share in shares)
        num_segments = sum(piece.num_segments for piece in pieces)
        # Of a store whose longest piece has n segments, any Q segments in a row hold at least Q // n beginnings.
        longest = [max(piece.num_segments for piece in own) for own in self._pieces]
        self._quotas, size = [0.0] * len(shares), 0  # segments of each store in an epoch
        while sum(int(quota) // most for quota, most in zip(self._quotas, longest, strict=True)) < num_lanes:
            size += num_segments
            self._quotas = [size * share.weight / total for share in shares]

    def pieces(self, epoch: int) -> list[Piece]:
        """What is read in an epoch, store by store."""
        found: list[Piece] = []
        for number, (own, quota) in enumerate(zip(self._pieces, self._quotas, strict=True)):
            found += self._of_store(number, own, range(int(epoch * quota), int((epoch + 1) * quota)))
        return found

    def _of_store(self, number: int, own: Sequence[Piece], wanted: range) -> Iterable[Piece]:
        """The pieces that begin at these segments of a store that is read through again and again."""
        length = sum(piece.num_segments for piece in own)
        for turn in range(wanted.start // length, -(-wanted.stop // length)):
            at = turn * length
            for piece in sorted(own, key=lambda piece: _order(piece, self._seed, number, turn)):
                if at in wanted:
                    yield piece._replace(turn=turn)
                at += piece.num_segments


def token_shares(store: Reads) -> np.ndarray:
    """How likely a token drawn from the store is of each document, (N,) float64: by its length, or the weights."""
    sizes = np.array([document.num_tokens for document in store.manifest], dtype=np.float64)
    for share in store.shares:
        part = slice(share.documents.start, share.documents.stop)
        sizes[part] *= share.weight / sizes[part].sum()
    return sizes / sizes.sum()


# --- what a plan wastes -------------------------------------------------------------------------------


class Figures(NamedTuple):
    """What the lanes that read documents do in an epoch."""

    num_lanes: int
    num_pieces: int
    least_segments: int  # of a lane
    most_segments: int
    padding_fraction: float  # of the places in segments that hold no token: documents seldom fill their last one
    uneven_fraction: float  # how much less than the fullest lane the others read; they go on to the next epoch earlier


def figures(store: Reads, lanes: Sequence[Sequence[Piece]]) -> Figures:
    """Figures of an epoch's plan."""
    loads = [sum(piece.num_segments for piece in lane) for lane in lanes]
    num_tokens = sum(_num_tokens(store, piece) for lane in lanes for piece in lane)
    return Figures(
        num_lanes=len(lanes),
        num_pieces=sum(len(lane) for lane in lanes),
        least_segments=min(loads),
        most_segments=max(loads),
        padding_fraction=1 - num_tokens / (sum(loads) * store.segment_len),
        uneven_fraction=1 - sum(loads) / (max(loads) * len(loads)),
    )


def _num_tokens(store: Reads, piece: Piece) -> int:
    stop = min(piece.stop * store.segment_len, store.manifest[piece.document].num_tokens)
    return stop - piece.start * store.segment_len
