"""A long unit of a preparation, spread over Ray's workers: one reads it and writes its file, all tokenise."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ray

from pipelines import storage
from pipelines.data import progress, segment
from pipelines.data.batches import Batch, pieces_of
from pipelines.data.pieces import Encoded
from pipelines.data.segment import Unit, UnitResult

_MAX_RETRIES = 100  # of what a lost worker did: it goes on from the batches that are kept


def begin(unit: Unit, in_flight: int, where: Mapping[str, str]) -> "ray.ObjectRef[UnitResult]":
    """Has a unit made, with so many batches of it in flight at a time, on nodes that have these labels."""
    write = ray.remote(max_retries=_MAX_RETRIES, label_selector=dict(where))(_write)
    return write.remote(unit, in_flight, where)


def _write(unit: Unit, in_flight: int, where: Mapping[str, str]) -> UnitResult:
    """What becomes of a unit, made now or found finished."""
    done = progress.load_unit(unit)
    if done is None:
        spread = _Spread(unit, in_flight, where)
        done = segment.write_unit(unit, spread)
        progress.save_unit(unit, done)
        spread.forget()
    return done


class _Spread:
    """Tokenises the batches of one unit on all workers, and keeps their tokens until the unit is finished.

    Others have at most two batches a core; what would be more for them is tokenised here, so that nobody waits.
    """

    def __init__(self, unit: Unit, in_flight: int, where: Mapping[str, str]) -> None:
        self._unit = unit
        self._in_flight = in_flight  # batches that are held, two for each core, this one's among them
        self._kept = set(storage.list_names(unit.output))  # of an interrupted run
        self._names: list[str] = []
        self._elsewhere: list[_Elsewhere] = []  # not yet done
        self._encode = ray.remote(max_retries=_MAX_RETRIES, label_selector=dict(where))(progress.encode_and_save)

    def __call__(self, found: Iterable[Batch]) -> Iterator[tuple[Batch, Sequence[Encoded]]]:
        waiting: deque[tuple[Batch, _Elsewhere | Sequence[Encoded]]] = deque()
        for batch in found:
            waiting.append((batch, self._begin(batch)))
            while waiting and (len(waiting) > self._in_flight or _is_done(waiting[0][1])):
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())

    def _begin(self, batch: Batch) -> "_Elsewhere | Sequence[Encoded]":
        """The tokens of a batch, or who makes them."""
        pieces = pieces_of(batch)
        if not pieces:
            return []
        name = progress.tokens_name(self._unit, pieces)
        self._names.append(name)
        found = progress.load_tokens(storage.join(self._unit.output, name)) if name in self._kept else None
        if found is not None:
            return found
        self._elsewhere = [each for each in self._elsewhere if not each.is_done()]
        if len(self._elsewhere) >= self._in_flight - 2:
            return progress.encode_and_save(self._unit, pieces, name)
        begun = _Elsewhere(self._encode.remote(self._unit, pieces, name))
        self._elsewhere.append(begun)
        return begun

    def forget(self) -> None:
        """Deletes what is kept, now that the unit is finished."""
        there = set(storage.list_names(self._unit.output))
        for name in there.intersection(self._names):
            storage.delete(storage.join(self._unit.output, name))


class _Elsewhere:
    """A batch that another worker tokenises."""

    def __init__(self, tokens: Any) -> None:
        self._tokens = tokens
        self._future = tokens.future()

    def is_done(self) -> bool:
        """Whether it is. Unlike `ray.wait`, asking this gives no core to others meanwhile."""
        return bool(self._future.done())

    def result(self) -> Sequence[Encoded]:
        """Its tokens. While they are waited for, the core that is reserved here is another task's: units that have all
        the cores would else wait for one another."""
        if not self.is_done():
            ray.wait([self._tokens])
        return self._future.result()


def _is_done(tokens: _Elsewhere | Sequence[Encoded]) -> bool:
    return not isinstance(tokens, _Elsewhere) or tokens.is_done()


def _finished(batch: Batch, tokens: _Elsewhere | Sequence[Encoded]) -> tuple[Batch, Sequence[Encoded]]:
    return batch, tokens.result() if isinstance(tokens, _Elsewhere) else tokens
