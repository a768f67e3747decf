"""Documents of any length through a model with memory, read and continued side by side by the serving engine.

A document is given to the engine in laps: requests that read so many whole segments, each from where the last ended;
then one that reads the rest and the prompt, and writes. Documents that write go on beside others that read, and when
one is done the next is begun. Between laps a document's state can be stored, and another time it is gone on from there.

What a document gives depends on the document, its id and the settings, not on the documents beside it (up to rounding:
a matrix product with other numbers of rows may differ in its last digit, which can decide between two equally likely
tokens). A document that fails, in its text, in the model or in the tokenizer, fails alone.

Memory: the model, and for each of up to 2 x `num_rows` documents a state of constant size and one lap of its tokens.

Axes: T tokens of a segment.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch

import rmt_core
from pipelines.data.read import UnreadableError
from pipelines.data.tokenise import LossyTextError, Tokenizer, encode_chunks
from pipelines.serving.engine import Engine
from pipelines.serving.engine import Settings as EngineSettings
from pipelines.serving.loading import Loaded
from pipelines.serving.readers import Position, Reader
from pipelines.serving.requests import Done, Event, Failed, Request
from pipelines.storage import StorageError
from pipelines.summarising.documents import DocumentError, Keeper, Summary, Text, describe, document_seed

log = logging.getLogger(__name__)

_LAP = 16  # segments: few enough that their tokens are small beside a state
_HORIZON = 10_000  # documents begun or waiting in order behind one that still is being read


class _Course:
    """A document on its way: the tokens that the engine has not got, and where it stands."""

    def __init__(self, place: int, text: Text, tokens: Iterator[np.ndarray], start: Position) -> None:
        self.place = place  # among the documents
        self.text = text
        self.at = start
        self.num_tokens = 0
        self.begun = time.monotonic()
        self._parts = tokens
        self._waiting: deque[np.ndarray] = deque()
        self._num_waiting = 0

    def take(self, most: int) -> list[int]:
        """The next tokens; fewer than `most` at the end only. Raises what the text raises."""
        while self._num_waiting < most and (part := next(self._parts, None)) is not None:
            self._waiting.append(part)
            self._num_waiting += len(part)
            self.num_tokens += len(part)
        taken: list[int] = []
        while self._waiting and len(taken) < most:
            part = self._waiting.popleft()
            wanted = most - len(taken)
            taken += part[:wanted].tolist()
            if len(part) > wanted:
                self._waiting.appendleft(part[wanted:])
        self._num_waiting -= len(taken)
        return taken

    def lap(self) -> int:
        """Segments of the next lap, which ends at the latest where the state is to be stored."""
        every = self.text.keeper.every if self.text.keeper is not None else 0
        return min(_LAP, every - self.at.num_segments % every) if every else _LAP

    def resume(self, keeper: Keeper, fingerprint: str, segment_len: int) -> None:
        """Go on from what was kept: its segments are tokenised again, not read."""
        data = keeper.load()
        if data is None:
            return
        try:
            kept = rmt_core.state.from_bytes(data, fingerprint)
        except ValueError as error:  # altered on disk: the document is read from its beginning
            log.warning("%s: %s", self.text.doc_id, error)
            return
        num_segments = int(kept["num_segments"])
        for _ in range(num_segments):
            if len(self.take(segment_len)) < segment_len:
                raise DocumentError(f"its text ends before the {num_segments} segments that were read of it before")
        self.at = Position(kept["state"], (), kept["hidden"], num_segments * segment_len, num_segments)

    def keep(self, fingerprint: str) -> None:
        """Store the state where it is time."""
        keeper = self.text.keeper
        if keeper is None or not keeper.every or self.at.num_segments % keeper.every:
            return
        num_segments = torch.tensor([self.at.num_segments])
        kept = {"state": self.at.state, "hidden": self.at.hidden, "num_segments": num_segments}
        keeper.keep(rmt_core.state.to_bytes(kept, fingerprint))


class MemoryStrategy:
    """Up to `num_rows` segments or written tokens at a time, of twice as many documents; see the module's docstring."""

    def __init__(self, loaded: Loaded, prompt: str, num_rows: int) -> None:
        self.num_rows = num_rows
        self._tokenizer = loaded.tokenizer
        self._fingerprint = loaded.fingerprint
        self._segment_len = loaded.model.segment_len
        self._prompt: list[int] = loaded.tokenizer.encode(prompt).tolist()
        settings = EngineSettings(num_rows, num_rows, write_steps_per_read=1, exact=False, prefix_bytes=0)
        self._engine = Engine(loaded.model, settings, fingerprint=loaded.fingerprint)

    def summarise(self, documents: Iterable[Text]) -> Iterator[Summary]:
        """One summary a document, in the documents' order; they are taken from the iterable as others end."""
        waiting = enumerate(documents)
        running: dict[Reader, _Course] = {}
        done: dict[int, Summary] = {}
        given, exhausted = 0, False
        try:
            while running or not exhausted:
                while not exhausted and len(running) < 2 * self.num_rows and len(done) < _HORIZON:
                    taken = next(waiting, None)
                    if taken is None:
                        exhausted = True
                    else:
                        self._begin(*taken, running, done)
                for reader, event in self._engine.step():
                    if isinstance(event, Done | Failed):
                        self._ended(running.pop(reader), reader, event, running, done)
                while given in done:
                    yield done.pop(given)
                    given += 1
        finally:  # whoever asked may have gone
            for reader in running:
                self._engine.cancel(reader)

    def _begin(self, place: int, text: Text, running: dict[Reader, _Course], done: dict[int, Summary]) -> None:
        course = _Course(place, text, _tokens(self._tokenizer, text.chunks), self._engine.start())
        try:
            if text.keeper is not None:
                course.resume(text.keeper, self._fingerprint, self._segment_len)
        except StorageError:  # where texts come from fails: no fault of this one
            raise
        except Exception as error:  # the border of a document: whatever it raises is its own result
            done[place] = self._failed(course, describe(error))
        else:
            self._go_on(course, running, done)

    def _go_on(self, course: _Course, running: dict[Reader, _Course], done: dict[int, Summary]) -> None:
        """Gives the engine the document's next lap."""
        try:
            running[self._engine.add(self._request(course), course.at)] = course
        except StorageError:
            raise
        except Exception as error:  # the border of a document, as above
            done[course.place] = self._failed(course, describe(error))

    def _request(self, course: _Course) -> Request:
        most = course.lap() * self._segment_len
        tokens = course.take(most)
        if len(tokens) == most:
            return Request(tokens)
        if not course.num_tokens:
            raise DocumentError("the document is empty")
        style, eos_id = course.text.style, self._tokenizer.eos_id
        return Request(
            [*tokens, *self._prompt],
            style.max_new_tokens,
            sampling=style.sampling,
            seed=document_seed(style.seed, course.text.doc_id),
            stop_tokens=() if eos_id is None else (eos_id,),
        )

    def _ended(
        self, course: _Course, reader: Reader, event: Event, running: dict[Reader, _Course], done: dict[int, Summary]
    ) -> None:
        """What becomes of a document whose request has ended."""
        if isinstance(event, Failed):
            done[course.place] = self._failed(course, event.message)
        elif reader.request.max_new_tokens:
            done[course.place] = self._written(course, reader)
        else:
            course.at = reader.position()
            course.keep(self._fingerprint)  # not the document's fault where it fails: a full disk ends the job
            self._go_on(course, running, done)

    def _written(self, course: _Course, reader: Reader) -> Summary:
        try:
            text = self._tokenizer.decode(reader.written)
        except Exception as error:  # the border of a document, as above
            return self._failed(course, describe(error))
        return self._summary(course, text, len(reader.written), finish_reason=reader.reason)

    def _failed(self, course: _Course, error: str) -> Summary:
        return self._summary(course, "", 0, error=error)

    def _summary(
        self, course: _Course, text: str, num_written: int, *, error: str = "", finish_reason: str | None = None
    ) -> Summary:
        return Summary(
            doc_id=course.text.doc_id,
            text=text,
            num_tokens=course.num_tokens,
            num_segments=math.ceil(course.num_tokens / self._segment_len),
            num_written=num_written,
            error=error,
            finish_reason=finish_reason,
            elapsed_s=time.monotonic() - course.begun,
        )


def _tokens(tokenizer: Tokenizer, chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
    try:
        yield from encode_chunks(tokenizer, chunks)
    except (UnreadableError, LossyTextError) as error:
        raise DocumentError(str(error)) from error
