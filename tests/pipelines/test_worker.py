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
    return planned(folder, block_len)


def planned(folder: Path, block_len: int) -> Ledger:
    output = str(folder / "out")
    files = storage.expand([str(folder / "in.jsonl")], (".jsonl",))
    plan = planning.make_plan(Ledger(output), files, planning.Wishes(None, block_len, 2, 1))
    return Ledger(output, plan.name)


def worker_on(ledger: Ledger, attempt: int = 1, run: str = "run") -> BlockWorker:
    style = Style(5, rmt_core.Sampling(), 0)
    settings = Settings("m", "memory", "", style, 2, None, "cpu")
    assert ledger.plan is not None
    return BlockWorker(settings, Work(ledger.output, ledger.plan, "model", "settings", 4, attempt, run))


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


def test_interrupted_commands_blame_no_document(tmp_path: Path, strategy: Counting) -> None:
    ledger = ledger_of(tmp_path, 3, 3)
    strategy.deadly = {"d1"}
    for number in range(12):  # each ends with its command: Ctrl-C, a lost machine, a killed driver
        with pytest.raises(Killed):
            worker_on(ledger, run=f"run {number // 3}").run(0, committed=False)
    strategy.deadly = set()
    assert worker_on(ledger, run="last").run(0, committed=False).num_ok == 3


def test_a_long_document_that_is_read_on_each_time_is_no_killer(tmp_path: Path, strategy: Counting) -> None:
    ledger = ledger_of(tmp_path, 2, 2)
    strategy.deadly, strategy.store = {"d1"}, True
    for _ in range(20):
        with pytest.raises(Killed):
            worker_on(ledger).run(0, committed=False)
    strategy.deadly = set()
    assert worker_on(ledger).run(0, committed=False).num_ok == 2


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("before", "after", "summaries"),
    [
        (["a", None, "ccc"], ["a", "bb", "ccc"], ["1", "2", "3"]),  # mended where it was
        (["a", None, "ccc"], ["a", "ccc"], ["1", None, "3"]),
        (["a", None, "ccc"], ["bb", "a", "ccc"], ["1", None, "3"]),
        (["a", None, "ccc", None, "eeeee"], ["a", "ccc", "dddd", "eeeee"], ["1", None, "3", None, "5"]),
        (["a", None, "ccc", None, "eeeee"], ["a", "bb", "ccc", "dddd", "eeeee"], ["1", "2", "3", "4", "5"]),
    ],
)
def test_lines_that_have_moved_are_not_taken_for_what_failed(
    tmp_path: Path,
    strategy: Counting,
    before: list[str | None],
    after: list[str | None],
    summaries: list[str | None],
    named: bool,
) -> None:
    path, blocks = tmp_path / "in.jsonl", range((len(before) + 1) // 2)
    write(path, before, named=named)
    ledger = planned(tmp_path, 2)
    for block in blocks:
        worker_on(ledger).run(block, committed=False)
    write(path, after, named=named)
    for block in blocks:
        worker_on(ledger, attempt=2).run(block, committed=True)
    found = [row for block in blocks for row in rows(ledger, block)]
    assert [row["summary"] for row in found] == summaries
    moved = {row["error"] for row in found if row["status"] == "error"}
    assert all(reason.startswith("the file has changed") for reason in moved)


def test_what_was_mended_before_is_not_taken_again_from_another_line(tmp_path: Path, strategy: Counting) -> None:
    path = tmp_path / "in.jsonl"
    write(path, ["a", None, None, "dddd"], named=True)
    ledger = planned(tmp_path, 2)
    for attempt, texts in enumerate((["a", None, None, "dddd"], ["a", "bb", None, "dddd"], ["a", "x", "bb"]), 1):
        write(path, texts, named=True)
        for block in range(2):
            worker_on(ledger, attempt).run(block, committed=attempt > 1)
    assert [row["summary"] for block in range(2) for row in rows(ledger, block)] == ["1", "2", None, "4"]


def write(path: Path, texts: list[str | None], *, named: bool) -> None:
    """Lines of documents, with ids of their own or without; None is no JSON."""
    lines = [json.dumps({"text": text, **({"id": text} if named else {})}) if text else "not JSON" for text in texts]
    path.write_text("\n".join(lines))


def test_another_model_than_the_jobs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "open_strategy", lambda settings: (Counting(), "other"))
    with pytest.raises(RuntimeError, match="all machines share"):
        worker_on(ledger_of(tmp_path, 1, 1))


def test_ids_that_come_again_are_not_tried_again(tmp_path: Path, strategy: Counting) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a", "id": "x"}\n{"text": "bb", "id": "x"}\nno JSON\n')
    ledger = planned(tmp_path, 2)
    for block in range(2):
        worker_on(ledger).run(block, committed=False)
    assert [row["status"] for block in range(2) for row in rows(ledger, block)] == ["ok", "error", "error"]
    assert ledger.failed([0, 1], 1) == {1}
