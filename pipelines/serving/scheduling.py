"""Who goes next: three kinds of work, taken in fixed shares, the longest waiting first.

A batch holds work of one shape. Its kind is chosen by stride scheduling: each kind has a pass, which grows by one over
its share whenever a batch is run for it, and the least pass goes next. So a book being read never starves a
conversation, nor the other way round, and no kind saves up turns while it has nothing to do.
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

Owner = TypeVar("Owner")


class Kind(Enum):
    """What a session is at."""

    READ = "read"  # full segments of what it was given
    TAIL = "tail"  # the rest after them, before the first token is written
    WRITE = "write"  # one token at a time, and the closing of segments that these fill


class Shape(NamedTuple):
    """What can be computed together."""

    stage: str  # "close" a full segment, "open" its first tokens, "extend" it by one token
    num_tokens: int  # of each row; of "open" the length that shorter ones are padded to


class Work(NamedTuple, Generic[Owner]):
    """The next thing that one session needs."""

    owner: Owner
    kind: Kind
    shape: Shape
    since: int  # number of the step after which it was ready: who waits longest has the least


class Scheduler:
    """Chooses batches by shares of steps, `write_steps_per_read` of each other kind to one of reading."""

    def __init__(self, write_steps_per_read: int) -> None:
        if write_steps_per_read < 1:
            raise ValueError(f"write_steps_per_read is {write_steps_per_read}; it must be at least 1")
        self._stride = {Kind.READ: float(write_steps_per_read), Kind.TAIL: 1.0, Kind.WRITE: 1.0}
        self._pass = dict.fromkeys(Kind, 0.0)
        self._waiting: set[Kind] = set()

    def choose(self, ready: Sequence[Work[Owner]], num_rows: Mapping[str, int]) -> list[Work[Owner]]:
        """The next batch: at most `num_rows` of its stage; empty where nothing is ready.

        The kind's longest waiting work gives the shape. Rows that its kind leaves free go to other kinds' work of
        that shape.
        """
        kinds = {work.kind for work in ready}
        if not kinds:
            self._waiting = set()
            return []
        self._admit(kinds)
        kind = min(kinds, key=lambda kind: (self._pass[kind], list(Kind).index(kind)))
        self._pass[kind] += self._stride[kind]
        shape = min((work for work in ready if work.kind is kind), key=lambda work: work.since).shape
        fitting = sorted(
            (work for work in ready if work.shape == shape), key=lambda work: (work.kind is not kind, work.since)
        )
        return fitting[: num_rows[shape.stage]]

    def _admit(self, kinds: set[Kind]) -> None:
        """A kind that had nothing to do starts with the others: it neither owes turns nor is owed any."""
        running = [self._pass[kind] for kind in kinds & self._waiting]
        for kind in kinds - self._waiting:
            self._pass[kind] = max([self._pass[kind], *([min(running)] if running else [])])
        self._waiting = kinds
