"""Documents that failed, as they stand in their files now; lines are found by number, and edits move them."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data import catalogue
from pipelines.data.catalogue import ERROR, Entry
from pipelines.summarising.ledger import Ledger

_Mark = tuple[str, str | None]  # id and hash of a text


class Mended:
    """Looks documents up again, and takes what it finds only where no other row of the job has it.

    Memory: a mark of each document that was tried again before.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._retried: dict[str, _Mark] | None = None  # by source: rows that are no longer as they were planned

    def look_up(self, entries: Sequence[Entry]) -> list[Entry]:
        """What is now in the place of each; an error where that is a document with a row of its own."""
        found = catalogue.look_up_again(entries)
        news = [new for old, new in zip(entries, found, strict=True) if _is_another(old, new)]
        others = self._others(news)
        taken = [
            _moved(old) if _is_another(old, new) and _has(others, new) else new
            for old, new in zip(entries, found, strict=True)
        ]
        if self._retried is not None:
            self._retried |= {entry.source: (entry.doc_id, entry.sha256) for entry in taken if entry.outcome is None}
        return taken

    def _others(self, news: Sequence[Entry]) -> list[tuple[str, _Mark]]:
        """Sources and marks of all rows with an id or a text of these."""
        if not news:
            return []
        if self._retried is None:
            self._retried = self._ledger.retried()
        ids, hashes = pa.array({new.doc_id for new in news}), pa.array({new.sha256 for new in news})
        found = list(self._retried.items())
        for table in self._ledger.planned():
            alike = pc.or_(pc.is_in(table["doc_id"], ids), pc.is_in(table["sha256"], hashes))
            entries = catalogue.from_table(table.filter(alike))
            found += [(entry.source, (entry.doc_id, entry.sha256)) for entry in entries]
        return found


def _is_another(old: Entry, new: Entry) -> bool:
    return new.outcome is None and (old.doc_id, old.sha256) != (new.doc_id, new.sha256)


def _has(others: Sequence[tuple[str, _Mark]], new: Entry) -> bool:
    """Whether another row has the document: by its id, or where that is but its place, by its text."""
    named = new.line is None or new.doc_id != f"{new.name}:{new.line}"
    return any(
        source != new.source and (doc_id == new.doc_id or (not named and sha256 == new.sha256))
        for source, (doc_id, sha256) in others
    )


def _moved(old: Entry) -> Entry:
    reason = "the file has changed: here is now a document with a row of its own; mend lines where they are"
    return old._replace(outcome=ERROR, reason=reason)
