"""Many documents through one model: read side by side, each continued after a prompt.

The rows of a batch read one segment of their document each. When a document ends, its row is given to the next one at
once, so rows are idle only when no document is left. Ended documents wait, as states of constant size, until enough of
them are there to be continued together.

What a document gives depends on the document, its id and the settings, not on the documents beside it (up to rounding:
a matrix product with other numbers of rows may differ in its last digit, which can decide between two equally likely
tokens). A document that fails, in its tokens, in the model or in the tokenizer, fails alone: a batch that raises is
run again row by row. A document with a `Keeper` has its state stored as it is read and goes on from there another time.

Memory: the model, and for each of `num_rows` documents a state of constant size and the last part of its tokens.

Axes: B rows, T tokens of a segment.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

import rmt_core
from pipelines.data.tokenise import Tokenizer
from pipelines.serving.documents import DocumentError, Keeper, Summary, describe, document_seed
from rmt_core.state import State

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_HORIZON = 10_000  # documents begun or waiting in order behind one that still is being read


@dataclass(frozen=True)
class Writing:
    """How a document is continued."""

    prompt: Sequence[int]  # tokens read after the document
    max_new_tokens: int
    sampling: rmt_core.Sampling
    seed: int  # a document's own seed is made of this and its id


class Document(NamedTuple):
    """A text to read."""

    doc_id: str
    tokens: Iterable[np.ndarray]  # (any length,) int parts of it; made while they are read, may raise
    writing: Writing | None = None  # None: as the engine is set
    keeper: Keeper | None = None


class _Reader:
    """A document on a row: its tokens taken segment by segment, the memory after those read."""

    def __init__(self, position: int, document: Document, state: State, writing: Writing) -> None:
        self.position = position
        self.doc_id = document.doc_id
        self.writing = document.writing or writing
        self.keeper = document.keeper
        self.parts = iter(document.tokens)
        self.state = state  # one row
        self.hidden: Tensor | None = None  # (1, D) at the last token of the last whole segment
        self.num_tokens = 0
        self.num_read = 0  # segments
        self.segment: Tensor | None = None  # (T,) to be read next; None: only the rest is left
        self.begun = time.monotonic()
        self._waiting: deque[np.ndarray] = deque()
        self._num_waiting = 0

    def resume(self, keeper: Keeper, fingerprint: str, segment_len: int, device: torch.device) -> None:
        """Go on from what was kept: its segments are tokenised again, not read."""
        data = keeper.load()
        if data is None:
            return
        try:
            kept = rmt_core.state.to(rmt_core.state.from_bytes(data, fingerprint), device)
        except ValueError as error:  # altered on disk: the document is read from its beginning
            log.warning("%s: %s", self.doc_id, error)
            return
        self.state, self.hidden = kept["state"], kept["hidden"]
        num_segments = int(kept["num_segments"])
        for _ in range(num_segments):
            self.advance(segment_len)
        if self.segment is None:
            raise DocumentError(f"its text ends before the {num_segments} segments that were read of it before")
        self.num_read = num_segments

    def keep(self, keeper: Keeper, fingerprint: str) -> None:
        """Store the state where it is time."""
        if not keeper.every or self.num_read % keeper.every:
            return
        num_segments = torch.tensor([self.num_read])
        kept = {"state": self.state, "hidden": self.hidden, "num_segments": num_segments}
        keeper.keep(rmt_core.state.to_bytes(kept, fingerprint))

    def advance(self, segment_len: int) -> None:
        """Cut the next whole segment. Raises what the document's tokens raise."""
        while self._num_waiting < segment_len:
            part = next(self.parts, None)
            if part is None:
                self.segment = None
                return
            self._waiting.append(part)
            self._num_waiting += len(part)
            self.num_tokens += len(part)
        self.segment = self._take(segment_len)

    def rest(self) -> list[int]:
        """The tokens after the last whole segment."""
        return self._take(self._num_waiting).tolist()

    def _take(self, count: int) -> Tensor:
        self._num_waiting -= count
        taken = []
        while count:
            part = self._waiting.popleft()
            if len(part) > count:
                self._waiting.appendleft(part[count:])
                part = part[:count]
            taken.append(part)
            count -= len(part)
        joined = np.concatenate(taken) if taken else np.zeros(0)
        return torch.from_numpy(joined.astype(np.int64))


class BatchEngine:
    """Reads up to `num_rows` documents at a time with one model; see the module's description."""

    def __init__(self, model: rmt_core.RecurrentModel, tokenizer: Tokenizer, writing: Writing, num_rows: int) -> None:
        if num_rows < 1:
            raise ValueError(f"num_rows is {num_rows}; it must be at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.writing = writing
        self.num_rows = num_rows
        self.device = model.backbone.lm.get_input_embeddings().weight.device

    @cached_property
    def fingerprint(self) -> str:
        """Of the model; all its weights are hashed for it, so only where states are kept."""
        return rmt_core.fingerprint(self.model)

    def summarise(self, documents: Iterable[Document]) -> Iterator[Summary]:
        """One summary a document, in the documents' order; documents are taken from the iterable as rows get free."""
        waiting = enumerate(documents)
        done: dict[int, Summary] = {}
        reading: list[_Reader] = []
        ended: list[_Reader] = []
        given = 0
        exhausted = False
        while reading or ended or not exhausted:
            while not exhausted and len(reading) < self.num_rows and len(done) < _HORIZON:
                taken = next(waiting, None)
                if taken is None:
                    exhausted = True
                    break
                reader = _Reader(*taken, state=self.model.init_state(1), writing=self.writing)
                self._open(reader, reading, ended, done)
                if len(ended) >= self.num_rows:
                    break
            self._step(reading, ended, done)
            if len(ended) >= self.num_rows or not reading:
                self._write(ended, done)
                ended = []
            while given in done:
                yield done.pop(given)
                given += 1

    def _open(self, reader: _Reader, reading: list[_Reader], ended: list[_Reader], done: dict[int, Summary]) -> None:
        try:
            if reader.keeper is not None:
                reader.resume(reader.keeper, self.fingerprint, self.model.segment_len, self.device)
        except Exception as error:  # the border of a document, as below
            done[reader.position] = self._failed(reader, error)
        else:
            self._advance([reader], reading, ended, done)

    def _advance(
        self, readers: Sequence[_Reader], reading: list[_Reader], ended: list[_Reader], done: dict[int, Summary]
    ) -> None:
        """Put each reader among those that have a segment to read, have ended, or have failed."""
        for reader in readers:
            try:
                reader.advance(self.model.segment_len)
                if reader.num_tokens == 0:
                    raise DocumentError("the document is empty")
            except Exception as error:  # the border of a document: whatever it raises is its own result
                done[reader.position] = self._failed(reader, error)
                continue
            (ended if reader.segment is None else reading).append(reader)

    def _step(self, reading: list[_Reader], ended: list[_Reader], done: dict[int, Summary]) -> None:
        """Read one segment of each row."""
        readers, reading[:] = list(reading), []
        kept = self._isolated(self._read, readers, done)
        for reader in kept:
            if reader.keeper is not None:
                reader.keep(
                    reader.keeper, self.fingerprint
                )  # not a row's fault where it fails: a full disk ends the job
        self._advance(kept, reading, ended, done)

    @torch.inference_mode()
    def _read(self, readers: Sequence[_Reader]) -> list[_Reader]:
        tokens = torch.stack([reader.segment for reader in readers if reader.segment is not None])  # (B, T)
        state = rmt_core.state.stack([reader.state for reader in readers])
        out, state = self.model.step(tokens.to(self.device), state)
        hidden = out.hidden[:, -1]  # (B, D)
        _check_finite(hidden)
        for i, reader in enumerate(readers):
            reader.state, reader.hidden = rmt_core.state.select(state, [i]), hidden[i : i + 1]
            reader.num_read += 1
        return list(readers)

    def _write(self, ended: Sequence[_Reader], done: dict[int, Summary]) -> None:
        """Continue documents that have ended."""
        rests = {reader.position: reader.rest() for reader in ended}

        def write(readers: Sequence[_Reader]) -> list[Summary]:
            return self._continue(readers, [rests[reader.position] for reader in readers])

        for readers in self._alike(ended):
            written = self._isolated(write, readers, done)
            left = [reader for reader in readers if reader.position not in done]
            done.update({reader.position: summary for reader, summary in zip(left, written, strict=True)})

    def _alike(self, ended: Sequence[_Reader]) -> Iterator[list[_Reader]]:
        """Up to `num_rows` at a time that are continued in the same way."""
        groups: dict[tuple[object, ...], list[_Reader]] = {}
        for reader in ended:
            writing = reader.writing
            groups.setdefault((tuple(writing.prompt), writing.max_new_tokens, writing.sampling), []).append(reader)
        for group in groups.values():
            for start in range(0, len(group), self.num_rows):
                yield group[start : start + self.num_rows]

    @torch.inference_mode()
    def _continue(self, readers: Sequence[_Reader], rests: Sequence[list[int]]) -> list[Summary]:
        session = rmt_core.open_session(self.model, len(readers))
        hidden = [session.hidden[:1] if reader.hidden is None else reader.hidden for reader in readers]
        count = [reader.num_tokens - len(rest) for reader, rest in zip(readers, rests, strict=True)]
        session = session._replace(
            state=rmt_core.state.stack([reader.state for reader in readers]),
            hidden=torch.cat(hidden),
            num_read=torch.tensor(count, device=self.device),
        )
        writing = readers[0].writing
        generation = rmt_core.generate(
            self.model,
            [[*rest, *writing.prompt] for rest in rests],
            writing.max_new_tokens,
            session=session,
            sampling=writing.sampling,
            stop_tokens=[] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id],
            seeds=[document_seed(reader.writing.seed, reader.doc_id) for reader in readers],
        )
        _check_finite(generation.session.hidden)
        return [
            self._summary(reader, self.tokenizer.decode(tokens), len(tokens), finish_reason=reason)
            for reader, tokens, reason in zip(readers, generation.tokens, generation.finish_reasons, strict=True)
        ]

    def _isolated(
        self,
        work: Callable[[Sequence[_Reader]], list[_Result]],
        readers: Sequence[_Reader],
        done: dict[int, Summary],
    ) -> list[_Result]:
        """The results of `work` on all readers at once; where that raises, of each alone, without those that fail."""
        if not readers:
            return []
        try:
            return work(readers)
        except Exception as error:  # some row's fault; whose is seen by running each alone
            if len(readers) == 1:
                done[readers[0].position] = self._failed(readers[0], error)
                return []
        return [result for reader in readers for result in self._isolated(work, [reader], done)]

    def _summary(
        self, reader: _Reader, text: str, num_written: int, *, error: str = "", finish_reason: str | None = None
    ) -> Summary:
        num_segments = math.ceil(reader.num_tokens / self.model.segment_len)
        elapsed_s = time.monotonic() - reader.begun
        return Summary(
            reader.doc_id, text, reader.num_tokens, num_segments, num_written, error, finish_reason, elapsed_s
        )

    def _failed(self, reader: _Reader, error: Exception) -> Summary:
        return self._summary(reader, "", 0, error=describe(error))


def _check_finite(hidden: Tensor) -> None:
    if not bool(torch.isfinite(hidden).all()):
        raise DocumentError("the model's values are not finite")
