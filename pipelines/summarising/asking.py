"""Many documents through one instruct model: their programs run side by side, their prompts in common batches.

What a document gives depends on the document, its id and the settings, not on those beside it (up to rounding). A
prompt on which the model fails fails its document alone. A program that gets the same replies asks the same prompts, so
the replies so far are all that is kept of a long document: another time they are given to it again, and the rest is
asked.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from pipelines.config import InputError, canonical_json
from pipelines.storage import StorageError
from pipelines.summarising.documents import DocumentError, Summary, Text, describe, document_seed
from pipelines.summarising.instruct import Ask, InstructModel, Reply
from pipelines.summarising.rereading import DEFAULT_PIECE_LEN, PROGRAMS, Program, Reading, Room, frames, most_new_tokens
from pipelines.summarising.text_pieces import Pieces

log = logging.getLogger(__name__)

_FORMAT = "rmt-replies-1"


class _Task:
    """A document's program: the prompts that it asks, and the replies to them as they come."""

    def __init__(self, position: int, text: Text, program: Program, reading: Reading) -> None:
        self.position = position
        self.text = text
        self.reading = reading
        self.begun = time.monotonic()
        self.end: Reply | None = None  # what the program ended with
        self.waiting: list[tuple[int, Ask]] = []  # (place among the replies, prompt) of what is not asked yet
        self._program = program
        self._replies: list[Reply | None] = []  # to the prompts asked last
        self._log: list[Reply] = []  # to all before them
        self._num_kept = 0

    def start(self) -> None:
        """Up to the first prompt that has no reply yet. Raises what the document raises."""
        kept = self._load()
        self._ask(next(self._program))
        while kept and self.end is None:
            for place, _ in list(self.waiting):
                if not kept:
                    return
                self.waiting.pop(0)
                self._take(place, kept.pop(0))

    def answer(self, place: int, reply: Reply) -> None:
        """The reply to a prompt; with the last one that waits, the program goes on. Raises what the document raises."""
        self._take(place, reply)

    def keep(self) -> None:
        """Store the replies where it is time."""
        keeper = self.text.keeper
        if keeper is not None and keeper.every and len(self._log) - self._num_kept >= keeper.every:
            keeper.keep(_to_bytes(self._log))
            self._num_kept = len(self._log)

    def _take(self, place: int, reply: Reply) -> None:
        self._replies[place] = reply
        replies = [reply for reply in self._replies if reply is not None]
        if len(replies) < len(self._replies):
            return
        self._log += replies
        try:
            self._ask(self._program.send(replies))
        except StopIteration as stop:
            self.end, self.waiting = stop.value, []

    def _ask(self, prompts: Sequence[list[int]]) -> None:
        self._replies = [None] * len(prompts)
        style, asked = self.text.style, len(self._log)
        self.waiting = [
            (n, Ask(prompt, style.max_new_tokens, style.sampling, self._seed(asked + n)))
            for n, prompt in enumerate(prompts)
        ]

    def _seed(self, number: int) -> int:
        return document_seed(self.text.style.seed, f"{self.text.doc_id}/{number}")

    def _load(self) -> list[Reply]:
        data = None if self.text.keeper is None else self.text.keeper.load()
        if data is None:
            return []
        try:
            kept = _from_bytes(data)
        except ValueError as error:  # altered on disk: the document is read from its beginning
            log.warning("%s: %s", self.text.doc_id, error)
            return []
        self._num_kept = len(kept)
        return kept


def _to_bytes(replies: Sequence[Reply]) -> bytes:
    body = {"format": _FORMAT, "replies": [[reply.ids, reply.finish_reason] for reply in replies]}
    digest = hashlib.sha256(canonical_json(body).encode()).hexdigest()
    return canonical_json({**body, "sha256": digest}).encode()


def _from_bytes(data: bytes) -> list[Reply]:
    """ValueError where they are not as they were written."""
    try:
        body: dict[str, Any] = json.loads(data)
        digest = body.pop("sha256")
        replies = [Reply(ids, reason) for ids, reason in body["replies"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not kept replies: {len(data)} bytes ({error})") from error
    if body.get("format") != _FORMAT or hashlib.sha256(canonical_json(body).encode()).hexdigest() != digest:
        raise ValueError(f"not kept replies: of {len(data)} bytes some were altered after they were written")
    return replies


class Asking:
    """Runs a program of `rereading` over documents, `num_rows` prompts at a time."""

    def __init__(self, model: InstructModel, name: str, instruction: str, piece_len: int | None, num_rows: int) -> None:
        self.model = model
        self.num_rows = num_rows
        self._name = name
        self._program = PROGRAMS[name]
        self._frames = frames(model, instruction)
        self._piece_len = piece_len or DEFAULT_PIECE_LEN

    def check(self, max_new_tokens: int) -> None:
        """InputError where the model's context is too short for summaries of this length."""
        most = most_new_tokens(self._name, self._frames, self.model.context_len)
        if max_new_tokens > most:
            raise InputError(
                f"max_new_tokens {max_new_tokens} leaves no room for text in the model's context of "
                f"{self.model.context_len} tokens; "
                + (f"use at most {most}" if most > 0 else "use a shorter prompt or another model")
            )

    def summarise(self, documents: Iterable[Text]) -> Iterator[Summary]:
        """One summary a document, in the documents' order; documents are taken from the iterable as rows get free."""
        waiting = enumerate(documents)
        tasks: list[_Task] = []
        done: dict[int, Summary] = {}
        given, exhausted = 0, False
        while tasks or not exhausted:
            while not exhausted and len(tasks) < self.num_rows:
                taken = next(waiting, None)
                if taken is None:
                    exhausted = True
                elif (task := self._begin(*taken, done)) is not None:
                    tasks.append(task)
            self._step(tasks, done)
            tasks = [task for task in tasks if task.position not in done]
            while given in done:
                yield done.pop(given)
                given += 1

    def _begin(self, position: int, text: Text, done: dict[int, Summary]) -> _Task | None:
        room = Room(self.model.context_len, text.style.max_new_tokens, self._piece_len)
        reading = Reading(Pieces(self.model, text.chunks), room)
        task = _Task(position, text, self._program(reading, self._frames, room), reading)
        try:
            try:
                self.check(text.style.max_new_tokens)
            except InputError as error:
                raise DocumentError(str(error)) from error
            task.start()
        except StorageError:  # where texts come from fails: no fault of this one
            raise
        except Exception as error:  # the border of a document: whatever it raises is its own result
            done[position] = self._summary(task, None, describe(error))
            return None
        return self._unless_ended(task, done)

    def _step(self, tasks: Sequence[_Task], done: dict[int, Summary]) -> None:
        """One batch: prompts of equal settings, those of earlier documents first."""
        asks = [(task, place, ask) for task in tasks for place, ask in task.waiting]
        asks = [item for item in asks if item[2].max_new_tokens == asks[0][2].max_new_tokens][: self.num_rows]
        for task, place, ask in asks:
            task.waiting.remove((place, ask))
        for (task, place, _), reply in zip(asks, self._isolated([ask for _, _, ask in asks]), strict=True):
            if task.position in done:
                continue
            try:
                if isinstance(reply, Exception):
                    raise reply
                task.answer(place, reply)
            except StorageError:
                raise
            except Exception as error:  # the border of a document, as above
                done[task.position] = self._summary(task, None, describe(error))
            else:
                task.keep()
                self._unless_ended(task, done)

    def _isolated(self, asks: Sequence[Ask]) -> list[Reply | Exception]:
        """A reply to each prompt; where the batch raises, each is asked alone and those that fail give the reason."""
        if not asks:
            return []
        try:
            return list(self.model.generate(asks))
        except torch.AcceleratorError:  # the device is lost: no prompt's fault, and nothing can be computed any more
            raise
        except Exception as error:  # some prompt's fault; whose is seen by asking each alone
            if len(asks) == 1:
                return [error]
        return [reply for ask in asks for reply in self._isolated([ask])]

    def _unless_ended(self, task: _Task, done: dict[int, Summary]) -> _Task | None:
        if task.end is None:
            return task
        done[task.position] = self._summary(task, task.end, "")
        return None

    def _summary(self, task: _Task, end: Reply | None, error: str) -> Summary:
        return Summary(
            doc_id=task.text.doc_id,
            text="" if end is None else self.model.decode(end.ids),
            num_tokens=task.reading.num_tokens,
            num_segments=task.reading.num_pieces,
            num_written=0 if end is None else len(end.ids),
            error=error,
            finish_reason=None if end is None else end.finish_reason,
            elapsed_s=time.monotonic() - task.begun,
        )
