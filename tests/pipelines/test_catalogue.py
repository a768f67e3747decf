"""The catalogue: every document of an input is found, hashed and read again alone; repeated ids are sorted out."""

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.data import catalogue
from pipelines.data.catalogue import Entry, Reader
from pipelines.data.inputs import InputFile
from pipelines.data.read import SUFFIXES, UnreadableError


def survey(folder: Path) -> list[Entry]:
    found = [one for file in storage.expand([str(folder)], SUFFIXES) for one in catalogue.survey(file)]
    return [one for one in found if isinstance(one, Entry)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("first æ")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"second"))
    lines = [b"\xef\xbb\xbf" + json.dumps({"text": "third"}).encode(), b"", b"no JSON"]
    lines += [json.dumps({"text": "æ fourth", "id": 7}, ensure_ascii=False).encode(), b'{"text": "no newline"}']
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines))
    texts = [f"row {n}" for n in range(10)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet", row_group_size=4)
    (tmp_path / "e.parquet").write_bytes(b"none")
    return tmp_path


TEXTS = ["first æ", "second", "third", "æ fourth", "no newline", *(f"row {n}" for n in range(10))]


def test_everything_is_found_in_order_with_its_hash(folder: Path) -> None:
    entries = survey(folder)
    ids = ["a", "b", "c.jsonl:1", "c.jsonl:3", "7", "c.jsonl:5", *(f"d.parquet:{n}" for n in range(1, 11)), "e.parquet"]
    assert [entry.doc_id for entry in entries] == ids
    good = [entry for entry in entries if entry.outcome is None]
    assert [entry.sha256 for entry in good] == [hashlib.sha256(text.encode()).hexdigest() for text in TEXTS]
    assert [entry.num_bytes for entry in good] == [len(text.encode()) for text in TEXTS]
    assert [entry.reason for entry in entries if entry.outcome] == [entries[3].reason, entries[-1].reason]
    assert entries[3].reason.startswith("not JSON")


def test_each_is_read_again_alone_in_any_order(folder: Path) -> None:
    good = [entry for entry in survey(folder) if entry.outcome is None]
    for order in (range(len(good)), reversed(range(len(good))), [9, 10, 5, 6, 14, 2]):
        reader = Reader()
        for n in order:
            assert b"".join(reader.open(good[n]).chunks).decode() == TEXTS[n]


def test_what_has_changed_since_is_noticed(folder: Path) -> None:
    good = {entry.doc_id: entry for entry in survey(folder) if entry.outcome is None}
    (folder / "a.txt").write_text("frist æ")
    (folder / "b.txt.gz").unlink()
    (folder / "c.jsonl").write_bytes((folder / "c.jsonl").read_bytes().replace(b"third", b"thord"))
    for doc_id, said in {"a": "has changed", "b": "No such file", "c.jsonl:1": "has changed"}.items():
        with pytest.raises(UnreadableError, match=said):
            list(Reader().open(good[doc_id]).chunks)
    assert b"".join(Reader().open(good["7"]).chunks).decode() == "æ fourth"


def test_the_file_comes_last_with_its_hash(folder: Path) -> None:
    (file,) = storage.expand([str(folder / "c.jsonl")], SUFFIXES)
    *_, last = catalogue.survey(file)
    assert last == InputFile(*file, sha256=hashlib.sha256((folder / "c.jsonl").read_bytes()).hexdigest())


def test_repeated_ids_are_skipped_with_the_same_text_and_errors_with_another() -> None:
    entries = [Entry("a", "", "", sha256="1"), Entry("b", "", "", sha256="2"), Entry("a", "", "", sha256="1")]
    entries += [Entry("a", "", "", sha256="3"), Entry("b", "", "", outcome="error", reason="no JSON")]
    found = list(catalogue.sort_out_repeated(entries))
    assert [entry.outcome for entry in found] == [None, None, "skipped", "error", "error"]
    assert [entry.is_repeated for entry in found] == [False, False, True, True, False]
    assert found[4] == entries[4]
    asked = [Entry("a", "", "", sha256=digest, url="/v1/completions") for digest in "12"]
    assert [entry.url for entry in catalogue.sort_out_repeated(asked)] == ["/v1/completions", None]  # one answer an id


def test_tables_give_the_entries_back(folder: Path) -> None:
    entries = survey(folder)
    assert catalogue.from_table(catalogue.to_table(entries)) == entries


def test_what_was_mended_is_found_where_it_failed(folder: Path) -> None:
    bad = [entry for entry in survey(folder) if entry.outcome]
    content = (folder / "c.jsonl").read_bytes()
    (folder / "c.jsonl").write_bytes(content.replace(b"no JSON", b'{"text": "mended", "id": "m"}'))
    again = catalogue.look_up_again(bad)
    assert [entry.doc_id for entry in again] == ["m", "e.parquet"]
    assert b"".join(Reader().open(again[0]).chunks) == b"mended"


def test_halves_of_surrogate_pairs_do_not_break_the_catalogue(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "id": "\\ud800"}\n{"custom_id": "\\ud800", "body": {}}\n')
    entries = survey(tmp_path)
    assert [entry.outcome for entry in entries] == ["error", "error"]
    assert catalogue.from_table(catalogue.to_table(entries)) == entries


def test_a_file_of_many_that_can_be_read_again_has_one_row_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "e.parquet").write_bytes(b"none")
    bad = survey(tmp_path)
    assert catalogue.look_up_again(bad)[0].reason == bad[0].reason
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "e.parquet")
    (again,) = catalogue.look_up_again(bad)
    assert (again.outcome, again.doc_id) == ("error", "e.parquet")
    assert "give it an output of its own" in again.reason


def test_requests_that_cannot_be_used_have_one_answer_too() -> None:
    asked = [Entry("a", "", "", outcome="error", reason="bad", url="/v1/completions") for _ in "12"]
    asked += [Entry("a", "", "", sha256="1", url="/v1/completions"), Entry("b", "", "", outcome="error", reason="bad")]
    found = list(catalogue.sort_out_repeated(asked))
    assert [entry.url for entry in found] == ["/v1/completions", None, None, None]
    assert [entry.outcome for entry in found] == ["error"] * 4
