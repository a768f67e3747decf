"""Dividing files among workers: every document once, in order, whole."""

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.data.parts import FilePart, plan, read_part, survey
from pipelines.data.read import SUFFIXES, Document


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("one document " * 50)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"another " * 50))
    lines = [json.dumps({"text": f"line {i}"}) for i in range(23)]
    lines[4], lines[9] = "", "no JSON"
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(17)]}), tmp_path / "d.parquet", row_group_size=5)
    (tmp_path / "e.jsonl").write_text("")
    (tmp_path / "f.parquet").write_bytes(b"no parquet")
    pq.write_table(pa.table({"words": ["x"] * 9}), tmp_path / "g.parquet")
    return tmp_path


def contents(parts: list[FilePart]) -> list[tuple[object, ...]]:
    found = []
    for part in parts:
        for one in read_part(part):
            text = b"".join(one.chunks).decode() if isinstance(one, Document) else one.reason
            found.append((part.name, one.line, one.document_id, text))
    return found


def test_a_survey_counts_lines_and_rows_and_sums_bytes(folder: Path) -> None:
    surveyed = {one.file.name: one for one in map(survey, storage.expand([str(folder)], SUFFIXES))}
    assert {name: one.num_records for name, one in surveyed.items()} == {
        "a.txt": 1, "b.txt.gz": 1, "c.jsonl": 23, "d.parquet": 17, "e.jsonl": 1, "f.parquet": 1, "g.parquet": 9,
    }  # fmt: skip
    assert surveyed["a.txt"].file.sha256 == hashlib.sha256((folder / "a.txt").read_bytes()).hexdigest()
    gone = survey(storage.FileEntry(str(folder / "gone.txt"), "gone.txt", -1, 0))
    assert (gone.num_records, gone.file.sha256) == (1, None)


@pytest.mark.parametrize("num_units", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("min_records", [1, 4])
def test_parts_hold_every_document_once_and_in_order(folder: Path, num_units: int, min_records: int) -> None:
    surveyed = [survey(file) for file in storage.expand([str(folder)], SUFFIXES)]
    whole = contents([FilePart(one.file.uri, one.file.name, 0, None) for one in surveyed])
    assert (
        len(whole) == 1 + 1 + 22 + 17 + 0 + 1 + 1
    )  # a blank line is nothing; a broken file and a wrong one are faults
    units = plan(surveyed, num_units, min_records)
    assert 1 <= len(units) <= num_units
    assert contents([part for unit in units for part in unit]) == whole


def test_units_are_about_equal_and_never_too_small(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 1000)
    surveyed = [survey(file) for file in storage.expand([str(tmp_path)], SUFFIXES)]
    sizes = [[(part.start, part.stop) for part in unit] for unit in plan(surveyed, 4, 8)]
    assert sizes == [[(0, 250)], [(250, 500)], [(500, 750)], [(750, None)]]
    assert len(plan(surveyed, 1000, 300)) == 4


def test_a_damaged_file_ends_with_a_fault_and_keeps_what_came_before(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(bytes(range(256)) * 5000)[:3000])
    (found,) = read_part(FilePart(str(tmp_path / "a.txt.gz"), "a.txt.gz", 0, None))
    assert isinstance(found, Document)
    (missing,) = read_part(FilePart(str(tmp_path / "b.txt"), "b.txt", 0, None))
    assert not isinstance(missing, Document)
    assert missing.kind == "unreadable"
