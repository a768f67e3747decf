"""A worker of a summary job: holds the model, takes a block of documents, commits their rows.

Memory: the model; for each document being read a state of constant size and a piece of its text (1 MiB of it and its
tokens), for one that is a JSONL line or a Parquet row all of its text; the rows of one block; a mark of each document
that was tried again in earlier rounds, where one was mended since.
"""

import hashlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipelines.config import fingerprint
from pipelines.data import catalogue
from pipelines.data.catalogue import Entry, Reader
from pipelines.data.read import UnreadableError
from pipelines.summarising import rows
from pipelines.summarising.documents import DocumentError, Summary, Text
from pipelines.summarising.ledger import Counts, Ledger, count
from pipelines.summarising.mended import Mended
from pipelines.summarising.strategies import Settings, open_strategy, style_of

_TRIES_TOGETHER = 2  # of a block: then each document is read alone, to find one that kills who reads it
_TRIES_ALONE = 3  # of a document that stays where it was, within one run: a command that is interrupted blames none


class Work(NamedTuple):
    """What a worker is given beside the settings of its strategy."""

    output: str
    plan: str  # its name
    model: str  # fingerprint that is expected
    settings: str  # fingerprint of all that decides what is written
    state_every: int  # segments between stored states; 0: none are stored
    attempt: int  # 1, and one more for each round of retries
    run: str  # another one each time that the command is given


class BlockWorker:
    """Blocks of documents in, committed rows out."""

    def __init__(self, settings: Settings, work: Work) -> None:
        self._settings = settings
        self._work = work
        self._ledger = Ledger(work.output, work.plan)
        self._strategy, found = open_strategy(settings)
        if found != work.model:
            raise RuntimeError(
                f"the model in {settings.model} is {found[:16]} here, but {work.model[:16]} where the job was started; "
                "give a directory that all machines share"
            )
        self._reader = Reader()
        self._mended = Mended(self._ledger)

    def run(self, block: int, *, committed: bool) -> Counts:
        """Makes the rows of a block, or where it is `committed` those that failed and may be tried again."""
        if not committed and self._ledger.has(block):  # by an actor that died after it
            return count(self._ledger.rows(block, ["status", "num_tokens"]))
        entries = self._ledger.entries(block)
        kept = self._kept(block, entries) if committed else {}
        due = [n for n in range(len(entries)) if n not in kept]
        if not due:
            return count(self._ledger.rows(block, ["status", "num_tokens"]))
        if committed:  # what failed may have been mended since
            for n, entry in zip(due, self._mended.look_up([entries[n] for n in due]), strict=True):
                entries[n] = entry
        made = {n: self._row(entries[n], None) for n in due if entries[n].outcome is not None}
        readable = [n for n in due if n not in made]
        for n, summary in self._summaries(block, {n: entries[n] for n in readable}):
            made[n] = self._row(entries[n], summary)
        counts = self._ledger.commit(block, [{**kept, **made}[n] for n in range(len(entries))])
        self._ledger.forget(block, (self._key(entry) for entry in entries))
        return counts

    def _summaries(self, block: int, entries: dict[int, Entry]) -> Iterator[tuple[int, Summary]]:
        """A summary of each; side by side, or alone where work on the block has ended often before it was done."""
        tries = self._ledger.tries(block)
        ours = tries if tries.get("run") == self._work.run else {}
        alone = ours.get("reading")  # the document that was being read alone when the last try ended
        deaths = {int(n): count for n, count in ours.get("deaths", {}).items()}
        if alone is not None and alone["progress"] == self._progress(entries.get(alone["document"])):
            deaths[alone["document"]] = deaths.get(alone["document"], 0) + 1
        tries = {"times": tries.get("times", 0) + 1, "run": self._work.run, "deaths": deaths}
        self._ledger.note(block, tries)
        if tries["times"] <= _TRIES_TOGETHER:
            texts = (self._text(entry) for entry in entries.values())
            yield from zip(entries, self._strategy.summarise(texts), strict=True)
            return
        for n, entry in entries.items():
            if deaths.get(n, 0) >= _TRIES_ALONE:
                reason = f"whoever read this document alone ended {deaths[n]} times before it was done"
                yield n, Summary(entry.doc_id, "", 0, 0, 0, reason)
                continue
            self._ledger.note(block, {**tries, "reading": {"document": n, "progress": self._progress(entry)}})
            yield n, next(iter(self._strategy.summarise([self._text(entry)])))

    def _progress(self, entry: Entry | None) -> str | None:
        """A mark of what is stored of a document: another one means that it was read on."""
        data = None if entry is None else self._ledger.keeper(self._key(entry), 0).load()
        return None if data is None else hashlib.sha256(data).hexdigest()

    def _kept(self, block: int, entries: list[Entry]) -> dict[int, dict[str, Any]]:
        """The rows of a committed block that stay: all but errors that were not tried in this round."""
        found = dict(enumerate(self._ledger.rows(block).to_pylist()))
        return {
            n: row
            for n, row in found.items()
            if row["status"] != rows.ERROR or row["attempt"] >= self._work.attempt or entries[n].is_repeated
        }

    def _row(self, entry: Entry, summary: Summary | None) -> dict[str, Any]:
        about = {
            "model": self._work.model,
            "strategy": self._settings.strategy,
            "settings": self._work.settings,
            "attempt": self._work.attempt,
            "finished_unix_s": int(time.time()),
        }
        return rows.row(entry, summary, about)

    def _text(self, entry: Entry) -> Text:
        found = self._reader.open(entry)
        keeper = None
        if self._work.state_every:
            keeper = self._ledger.keeper(self._key(entry), self._work.state_every)
        return Text(entry.doc_id, _chunks(found), style_of(self._settings.style, found.request), keeper)

    def _key(self, entry: Entry) -> str:
        return fingerprint([entry.doc_id, entry.sha256, self._work.model, self._work.settings])


def _chunks(text: catalogue.Text) -> Iterator[bytes]:
    try:
        yield from text.chunks
    except UnreadableError as error:
        raise DocumentError(str(error)) from error
