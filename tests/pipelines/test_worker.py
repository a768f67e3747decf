"""A worker on a block: committed rows stay, and a document that kills whoever reads it ends as an error."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import rmt_core
from pipelines import storage
from pipelines.summarising import planning, worker
from pipelines.summarising.documents import Style, Summary, Text
from pipelines.summarising.ledger import Ledger
from pipelines.summarising.strategies import Settings
from pipelines.summarising.worker import BlockWorker, Work


class Killed(BaseException):
    pass


class Counting:
    """A strategy whose summaries are lengths; some documents kill it."""

    num_rows = 2

    def __init__(self) -> None:
        self.deadly: set[str] = set()
        self.store = False  # whether the deadly are read on each time
        self.seen: list[list[str]] = []

    def summarise(self, documents: Iterable[Text]) -> Iterator[Summary]:
        texts = list(documents)
        self.seen.append([text.doc_id for text in texts])
        for text in texts:
            size = len(b"".join(text.chunks))
            if text.doc_id in self.deadly:
                if self.store and text.keeper is not None:
                    text.keeper.keep((text.keeper.load() or b"") + b"x")
                raise Killed
            yield Summary(text.doc_id, str(size), size, 1, 1, finish_reason="stop")


@pytest.fixture
def strategy(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting()
    monkeypatch.setattr(worker, "open_strategy", lambda settings: (counting, "model"))
    return counting


def ledger_of(folder: Path, count: int, block_len: int) -> Ledger:
    lines = [json.dumps({"text": "x" * (n + 1), "id": f"d{n}"}) for n in range(count)]
    (folder / "in.jsonl").write_text("\n".join(lines))
    ledger = Ledger(str(folder / "out"))
    files = storage.expand([str(folder / "in.jsonl")], (".jsonl",))
    planning.make_plan(ledger, files, planning.Wishes(None, block_len, 2, 1))
    return ledger


def worker_on(ledger: Ledger, attempt: int = 1) -> BlockWorker:
    style = Style(5, rmt_core.Sampling(), 0)
    settings = Settings("m", "memory", "", style, 2, None, "cpu")
    return BlockWorker(settings, Work(ledger.output, "model", "settings", 4, attempt))


def rows(ledger: Ledger, block: int = 0) -> list[dict[str, Any]]:
    return ledger.rows(block).to_pylist()


def test_a_block_gives_its_rows_in_order(tmp_path: Path, strategy: Counting) -> None:
    ledger = ledger_of(tmp_path, 7, 3)
    assert [worker_on(ledger).run(block, committed=False).num_ok for block in range(3)] == [3, 3, 1]
    found = [row for block in range(3) for row in rows(ledger, block)]
    assert [(row["doc_id"], row["summary"]) for row in found] == [(f"d{n}", str(n + 1)) for n in range(7)]
    assert storage.list_names(storage.join(ledger.output, "states")) == []


def test_a_committed_block_is_not_made_again(tmp_path: Path, strategy: Counting) -> None:
    ledger = ledger_of(tmp_path, 3, 3)
    first = worker_on(ledger).run(0, committed=False)
    strategy.deadly = {"d1"}
    assert worker_on(ledger).run(0, committed=False) == first


def test_a_document_that_kills_who_reads_it_ends_as_an_error(tmp_path: Path, strategy: Counting) -> None:
    ledger = ledger_of(tmp_path, 4, 4)
    strategy.deadly = {"d2"}
    deaths = 0
    for _ in range(20):
        try:
            counts = worker_on(ledger).run(0, committed=False)
            break
        except Killed:
            deaths += 1
    assert (deaths, counts.num_ok, counts.num_error) == (5, 3, 1)
    assert [row["status"] for row in rows(ledger)] == ["ok", "ok", "error", "ok"]
    assert rows(ledger)[2]["error"] == "whoever read this document alone ended 3 times before it was done"
    assert storage.list_names(storage.join(ledger.output, "states")) == []
    strategy.deadly = set()
    assert worker_on(ledger, attempt=2).run(0, committed=True).num_ok == 4
    assert [row["attempt"] for row in rows(ledger)] == [1, 1, 2, 1]
    assert strategy.seen[-1] == ["d2"]


def test_a_long_document_that_is_read_on_each_time_is_no_killer(tmp_path: Path, strategy: Counting) -> None:
    ledger = ledger_of(tmp_path, 2, 2)
    strategy.deadly, strategy.store = {"d1"}, True
    for _ in range(20):
        with pytest.raises(Killed):
            worker_on(ledger).run(0, committed=False)
    strategy.deadly = set()
    assert worker_on(ledger).run(0, committed=False).num_ok == 2


def test_another_model_than_the_jobs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "open_strategy", lambda settings: (Counting(), "other"))
    with pytest.raises(RuntimeError, match="all machines share"):
        worker_on(ledger_of(tmp_path, 1, 1))
