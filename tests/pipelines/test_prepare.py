"""prepare: every document whole and exact in the store, or a row in errors.jsonl; the same again does nothing."""

import contextlib
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import claim, prepare, storage
from pipelines.config import InputError
from pipelines.data import inputs, progress, segment, store
from pipelines.data.inputs import InputFile, plan_units
from pipelines.data.read import SUFFIXES
from pipelines.data.segment import Unit, UnitResult, write_unit
from pipelines.data.store import SegmentStore
from pipelines.data.tokenise import ByteTokenizer
from pipelines.storage import FileEntry

ROOT = Path(__file__).resolve().parents[2]
HARD = "\ufeffNUL \0, CRLF \r\n, lone \r, tab\t, e\u0301 caf\u00e9, \U0001f468\u200d\U0001f469, \u2028 <eos> end \n"


def _texts(opened: SegmentStore) -> dict[str, bytes]:
    """Document id -> its bytes, read segment by segment."""
    tokenizer = opened.load_tokenizer()
    out = {}
    for entry in opened.manifest:
        segments = [opened.read(entry, n, n + 1) for n in range(entry.num_segments)]
        assert all(len(tokens) == opened.segment_len for tokens in segments[:-1])
        assert 0 < len(segments[-1]) <= opened.segment_len
        out[entry.document_id] = data = tokenizer.decode_bytes(np.concatenate(segments))
        assert (entry.num_bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert entry.num_tokens == sum(map(len, segments))
    return out


def _errors(output: Path | str) -> list[tuple[str, str | None, int | None, str]]:
    """(file name, document id, line, kind) of every row."""
    rows = map(json.loads, storage.read_bytes(storage.join(str(output), store.ERRORS)).splitlines())
    return [(row["source"].rpartition("/")[2], row["document_id"], row["line"], row["kind"]) for row in rows]


# --- one work unit, without Ray -----------------------------------------------------------------------


def _unit(tmp_path: Path, *names: str, segment_len: int = 5) -> tuple[UnitResult, dict[str, bytes]]:
    """What becomes of files in tmp_path as one unit."""
    output = tmp_path / "store"
    output.mkdir(exist_ok=True)
    tokenizer = ByteTokenizer()
    tokenizer.save_pretrained(output)
    files = [storage.expand([str(tmp_path / name)], SUFFIXES)[0] for name in names]
    result = write_unit(Unit(0, files, str(output), segment_len, tokenizer.fingerprint))
    store.write_manifest(str(output), result.documents)
    content = dict.fromkeys(store._IDENTITY, 0) | {"format": store.FORMAT, "segment_len": segment_len}
    storage.write_json(str(output / store.STORE), content | {"tokenizer_fingerprint": tokenizer.fingerprint})
    return result, _texts(SegmentStore(str(output)))


def _kinds(result: UnitResult) -> list[tuple[str | None, int | None, str]]:
    return [(error.document_id, error.line, error.kind) for error in result.errors]


def test_every_format_gives_the_text_back_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(HARD.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(HARD.encode()[:9]) + gzip.compress(HARD.encode()[9:]))
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": HARD}) + "\n")
    pq.write_table(pa.table({"text": [HARD], "id": ["d"]}), tmp_path / "d.parquet")
    result, texts = _unit(tmp_path, "a.txt", "b.txt.gz", "c.jsonl", "d.parquet")
    assert texts == dict.fromkeys(["a", "b", "c.jsonl:1", "d"], HARD.encode())
    assert not result.errors


@pytest.mark.parametrize("num_bytes", [1, 4, 5, 6, 10])
def test_segments_are_full_but_for_the_last(tmp_path: Path, num_bytes: int) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * num_bytes)
    result, texts = _unit(tmp_path, "a.txt")
    assert texts == {"a": b"x" * num_bytes}
    assert result.documents[0].num_segments == -(-num_bytes // 5)


def test_faulty_json_lines_are_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "one", "id": "x"}',
        b"nope",
        b'{"id": "y"}',
        b"  \t\r",
        b'{"text": "two", "id": "x"}',
        b'{"text": null, "id": "n"}',
        b'{"text": 5}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'["text"]',
        b'{"text": "", "id": "e"}',
        b'{"text": "seven", "id": 7}',
        b'{"text": "z", "id": [1]}',
        b"[" * 100_000,
        b'{"text": "later", "id": "e"}',
        b'{"text": "no newline at the end"}',
    ]
    (tmp_path / "l.jsonl").write_bytes(b"\r\n".join(lines))
    result, texts = _unit(tmp_path, "l.jsonl")
    assert texts == {"x": b"one", "7": b"seven", "e": b"later", "l.jsonl:16": b"no newline at the end"}
    assert _kinds(result) == [
        (None, 2, "not_json"),
        ("y", 3, "no_text"),
        ("x", 5, "duplicate_id"),
        ("n", 6, "no_text"),
        ("l.jsonl:7", 7, "no_text"),
        (None, 8, "not_utf8"),
        (None, 9, "not_utf8"),
        (None, 10, "not_json"),
        ("e", 11, "empty"),
        (None, 13, "bad_id"),
        (None, 14, "not_json"),
    ]


def test_faulty_files_are_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes(b"x" * 3_000_000 + b"\xe9t\xe9" + b"y" * 3_000_000)
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:-100])
    (tmp_path / "no.txt.gz").write_bytes(b"plain text")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 but not really PAR1")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["text", "text"]), tmp_path / "twice.parquet")
    (tmp_path / "good.txt").write_bytes(b"good")
    result, texts = _unit(
        tmp_path, "empty.txt", "latin.txt", "cut.txt.gz", "no.txt.gz", "no.parquet", "other.parquet",
        "numbers.parquet", "twice.parquet", "good.txt",
    )  # fmt: skip
    assert texts == {"good": b"good"}
    assert result.documents[0].row_offset == 0
    assert _kinds(result) == [
        ("empty", None, "empty"),
        ("latin", None, "not_utf8"),
        ("cut", None, "unreadable"),
        ("no", None, "unreadable"),
        (None, None, "unreadable"),
        (None, None, "no_text"),
        (None, None, "no_text"),
        (None, None, "unreadable"),
    ]
    assert "byte 3000000" in result.errors[1].reason
    for file in result.inputs:
        assert file.sha256 == hashlib.sha256((tmp_path / file.name).read_bytes()).hexdigest()


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    texts = pa.array(["a", None, "", "b", "c", "d"]).dictionary_encode()
    ids = pa.array([10, 11, 12, 10, None, 13])
    pq.write_table(pa.table({"text": texts, "id": ids, "more": ids}), tmp_path / "p.parquet", row_group_size=4)
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xfe"]).buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "q.parquet")
    pq.write_table(pa.table({"text": pa.array(["e" * 99], pa.string_view())}), tmp_path / "v.parquet")
    result, found = _unit(tmp_path, "p.parquet", "q.parquet", "v.parquet")
    assert found == {"10": b"a", "p.parquet:5": b"c", "13": b"d", "q.parquet:1": b"ok", "v.parquet:1": b"e" * 99}
    assert _kinds(result) == [
        ("11", 2, "no_text"),
        ("12", 3, "empty"),
        ("10", 4, "duplicate_id"),
        ("q.parquet:2", 2, "not_utf8"),
    ]


def test_a_file_that_vanished_is_reported(tmp_path: Path) -> None:
    output = tmp_path / "store"
    ByteTokenizer().save_pretrained(output)
    file = FileEntry(str(tmp_path / "gone.txt"), "gone.txt", -1, 0)
    result = write_unit(Unit(0, [file], str(output), 5, ByteTokenizer().fingerprint))
    assert _kinds(result) == [(None, None, "unreadable")]
    assert not (output / store.part_name(0)).exists()


def test_a_long_document_is_held_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "_HELD_TOKENS", 1000)
    data = bytes(np.random.default_rng(0).integers(0, 128, 2_500_000, dtype=np.uint8))
    (tmp_path / "a.txt").write_bytes(data)
    held = []
    encode = segment.encode

    def watched(tokenizer: Any, pieces: Any) -> Any:
        held.append(sum(len(piece.text) for piece in pieces))
        return encode(tokenizer, pieces)

    monkeypatch.setattr(segment, "encode", watched)
    _, texts = _unit(tmp_path, "a.txt", segment_len=1024)
    assert texts == {"a": data}
    assert len(held) > 1
    assert max(held) <= 2**20 + 2**19


@pytest.mark.parametrize("num_held", [1, 2000, 2**21])
def test_a_fault_anywhere_in_a_document_means_that_nothing_of_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_held: int
) -> None:
    monkeypatch.setattr(segment, "_HELD_TOKENS", num_held)
    monkeypatch.setattr(store, "ROW_GROUP_TOKENS", 700)
    monkeypatch.setattr("pipelines.data.batches.BATCH_CHARS", 1000)
    monkeypatch.setattr("pipelines.data.read.CHUNK_BYTES", 1000)
    monkeypatch.setattr("pipelines.data.pieces.PIECE_CHARS", 1000)
    good = b"words that are good, " * 500
    (tmp_path / "1.txt").write_bytes(good + b"\xff" + good)
    (tmp_path / "2.txt").write_bytes(good)
    (tmp_path / "3.txt.gz").write_bytes(gzip.compress(os.urandom(9000).hex().encode() + good)[:-9])
    (tmp_path / "4.txt").write_bytes(good[::-1])
    (tmp_path / "4.jsonl").write_text(json.dumps({"id": "2", "text": "late"}) + "\n")
    result, texts = _unit(tmp_path, "1.txt", "2.txt", "3.txt.gz", "4.txt", "4.jsonl")
    assert texts == {"2": good, "4": good[::-1]}
    assert _kinds(result) == [("1", None, "not_utf8"), ("3", None, "unreadable"), ("2", 1, "duplicate_id")]
    assert [document.row_offset for document in result.documents] == [0, len(good) // 5]
    made = (tmp_path / "store" / store.part_name(0)).read_bytes()
    _unit(tmp_path, "2.txt", "4.txt")
    assert made == (tmp_path / "store" / store.part_name(0)).read_bytes()
    assert not list((tmp_path / "store").glob(".*"))


def test_long_documents_that_are_all_faulty_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "_HELD_TOKENS", 1)
    monkeypatch.setattr("pipelines.data.read.CHUNK_BYTES", 1000)
    monkeypatch.setattr("pipelines.data.pieces.PIECE_CHARS", 1000)
    (tmp_path / "1.txt").write_bytes(b"words that are good, " * 500 + b"\xff")
    result, texts = _unit(tmp_path, "1.txt")
    assert (texts, _kinds(result)) == ({}, [("1", None, "not_utf8")])
    assert [file.name for file in result.inputs] == ["1.txt"]
    assert not list((tmp_path / "store").glob("*segments*"))
    result, texts = _unit(tmp_path, "1.txt", segment_len=2**20)  # so that no segment was written
    assert (texts, _kinds(result)) == ({}, [("1", None, "not_utf8")])
    assert not list((tmp_path / "store").glob("*segments*"))


def test_an_interruption_while_a_file_is_made_anew_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "_HELD_TOKENS", 1)
    monkeypatch.setattr("pipelines.data.read.CHUNK_BYTES", 1000)
    monkeypatch.setattr("pipelines.data.pieces.PIECE_CHARS", 1000)
    (tmp_path / "1.txt").write_bytes(b"words that are good, " * 500 + b"\xff")
    (tmp_path / "2.txt").write_bytes(b"good")
    copy = store._copy_without
    seen: list[str] = []

    def interrupted(old: Path, new: Path, drop: Any) -> None:
        copy(old, new, drop)
        seen.extend(path.name for path in new.parent.glob(".*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_copy_without", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _unit(tmp_path, "1.txt", "2.txt")
    assert len(seen) == 2
    assert all(progress._TEMPORARY.fullmatch(name) for name in seen)  # so that also after a kill they are ours
    assert not list((tmp_path / "store").glob(".*"))


def test_long_units_are_begun_as_there_are_cores(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    units = [Unit(n, [FileEntry(f"{n}.txt", f"{n}.txt", 2**40, 0)], "", 1, "") for n in range(7)]
    num_ended, most = 0, 0

    def begin(unit: Unit, in_flight: int, where: Any) -> Any:
        nonlocal most
        most = max(most, unit.number + 1 - num_ended)
        return prepare.ray.put(UnitResult(unit.number, [], [], []))

    monkeypatch.setattr(prepare.spreading, "begin", begin)
    found = []
    for result in prepare._written(units):
        found.append(result.number)
        num_ended += 1
    assert sorted(found) == list(range(7))
    assert most <= prepare._num_cpus()


@pytest.mark.parametrize("segment_len", [1, 7, 100])
def test_documents_that_are_written_while_they_are_read_become_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segment_len: int
) -> None:
    monkeypatch.setattr("pipelines.data.pieces.PIECE_CHARS", 1000)
    monkeypatch.setattr(store, "ROW_GROUP_TOKENS", 700)
    letters = np.random.default_rng(0).choice(list("etaoin shrdlu"), 9001)
    for n, length in enumerate([9001, 7, 4000, 1, 8999]):
        (tmp_path / f"{n}.txt").write_text("".join(letters[:length]))
    names = [f"{n}.txt" for n in range(5)]
    whole, made = _unit(tmp_path, *names, segment_len=segment_len), (tmp_path / "store" / store.part_name(0))
    before = made.read_bytes()
    for num_held in (1, 1001, 4000):
        monkeypatch.setattr(segment, "_HELD_TOKENS", num_held)
        assert _unit(tmp_path, *names, segment_len=segment_len) == whole
        assert made.read_bytes() == before


# --- plans ------------------------------------------------------------------------------------------------


def test_units_follow_the_files_alone() -> None:
    files = [FileEntry(str(n), f"{n}.txt", size, 0) for n, size in enumerate([1, 2, inputs.UNIT_BYTES, 5, -1, 7])]
    assert [[int(file.uri) for file in unit] for unit in plan_units(files)] == [[0, 1], [2], [3, 4, 5]]
    many = [FileEntry(str(n), f"{n}.txt", 0, 0) for n in range(2 * inputs.UNIT_FILES + 1)]
    assert [len(unit) for unit in plan_units(many)] == [inputs.UNIT_FILES, inputs.UNIT_FILES, 1]


def test_the_input_is_the_same_if_names_and_contents_are(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    listed = storage.expand([str(tmp_path)], SUFFIXES)
    before = [InputFile(*file, hashlib.sha256(file.name[:1].encode()).hexdigest()) for file in listed]
    assert inputs.difference(before, listed) is None
    touched = [file._replace(mtime_ns=1, uri=file.uri) for file in listed]
    assert inputs.difference(before, touched) is None
    (tmp_path / "b.txt").write_text("c")
    os.utime(tmp_path / "b.txt", ns=(5, 5))
    assert inputs.difference(before, storage.expand([str(tmp_path)], SUFFIXES)) == "changed b.txt"
    assert inputs.difference(before, listed[:1]) == "removed b.txt"
    assert inputs.difference(before[:1], listed) == "added b.txt"
    assert inputs.difference(before[::-1], listed) == "the same files in another order"


def _callings(root: Path, *patterns: str) -> dict[str, str]:
    """File's path below `root` -> what gives its documents' ids, for those whose names alone would not do."""
    found = inputs.distinct_callings(storage.expand([str(root / pattern) for pattern in patterns], SUFFIXES))
    return {os.path.relpath(uri, root): called for uri, called in found.items()}


def _write(root: Path, *names: str, text: str = "some") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_equal_names_are_told_apart_by_as_little_of_their_paths_as_does(tmp_path: Path) -> None:
    names = ("1.txt", "p.jsonl")
    _write(tmp_path, "x/in/1.txt", "x/in/2.txt", "x/in/p.jsonl", "y/in/1.txt", "y/in/p.jsonl", "z/1.txt")
    places = ("x/in", "y/in")
    between = {f"{place}/{name}": f"{place}/{name.removesuffix('.txt')}" for place in places for name in names}
    assert _callings(tmp_path, "x/in", "y/in") == _callings(tmp_path, "y/in", "x/in") == between
    assert _callings(tmp_path, "x/in", "z") == {"x/in/1.txt": "in/1", "z/1.txt": "z/1"}
    assert _callings(tmp_path, "x/in/1.txt", "z/*") == {"x/in/1.txt": "in/1", "z/1.txt": "z/1"}
    assert _callings(tmp_path, "x", "z") == _callings(tmp_path, "*/in", "z/1.txt") == {}
    _write(tmp_path, "z/in/1.txt")
    assert _callings(tmp_path, "x/in", "z") == {"x/in/1.txt": "x/in/1", "z/1.txt": "z/1", "z/in/1.txt": "z/in/1"}


def test_files_get_distinct_names_where_others_have_theirs(tmp_path: Path) -> None:
    _write(tmp_path, "x/1.txt", "y/1.txt", "y/2.txt", "y/1.txt.gz")
    files = storage.expand([str(tmp_path / "x"), str(tmp_path / "y")], SUFFIXES)
    named = inputs.with_distinct_names(files)
    assert [file._replace(name="") for file in named] == [file._replace(name="") for file in files]
    assert [file.name for file in named] == ["x/1.txt", "y/1.txt", "1.txt.gz", "2.txt"]


def test_what_becomes_no_document_needs_no_name(tmp_path: Path) -> None:
    _write(tmp_path, "x/1.txt")
    _write(tmp_path, "y/1.txt", text="")
    assert _callings(tmp_path, "x", "y", "z/1.txt") == {}


def test_names_that_differ_in_their_suffixes_keep_these(tmp_path: Path) -> None:
    _write(tmp_path, "a.txt", "a.txt.gz", "b.txt", "c/b.txt.gz")
    assert _callings(tmp_path, ".") == {"a.txt": "a.txt", "a.txt.gz": "a.txt.gz"}
    assert _callings(tmp_path, "b.txt", "c/b.txt.gz") == {"b.txt": f"{tmp_path.name}/b", "c/b.txt.gz": "c/b"}
    _write(tmp_path, "a.txt.txt")
    with pytest.raises(InputError, match=r"/a\.txt and /.*/a\.txt\.txt would give their documents the same ids"):
        _callings(tmp_path, ".")


# --- the job -----------------------------------------------------------------------------------------------


def _main(capfd: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, dict[str, Any], str]:
    """(exit code, the JSON object, stderr)."""
    capfd.readouterr()
    code = prepare.main([str(word) for word in argv])
    captured = capfd.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) <= 1
    return code, json.loads(lines[0]) if lines else {}, captured.err


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Documents with faults and repeated ids, over several files."""
    directory = tmp_path / "books"
    (directory / "sub").mkdir(parents=True)
    (directory / "a.txt").write_bytes(HARD.encode())
    (directory / "b.jsonl").write_text('{"text": "bee", "id": "a"}\n{"text": "bumblebee", "id": "b"}\nnope\n')
    (directory / "c.jsonl").write_text('{"text": "sea", "id": "b"}\n{"text": "seaside", "id": "c"}\n')
    (directory / "sub" / "a.txt").write_bytes(b"another a")
    (directory / "sub" / "bad.txt").write_bytes(b"\xff")
    (directory / "z.jsonl").write_text('{"text": "late", "id": "c"}\n')
    (directory / "notes.md").write_text("not a book")
    return directory


KEPT = {"a": HARD.encode(), "b": b"bumblebee", "c": b"seaside", "sub/a": b"another a"}
ERRORS = [
    ("b.jsonl", None, 3, "not_json"),
    ("b.jsonl", "a", None, "duplicate_id"),
    ("c.jsonl", "b", None, "duplicate_id"),
    ("bad.txt", "sub/bad", None, "not_utf8"),
    ("z.jsonl", "c", None, "duplicate_id"),
]


def test_a_directory_becomes_a_store_and_the_same_again_does_nothing(
    local_ray: None, books: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "UNIT_FILES", 1)
    output = tmp_path / "out"
    argv = ["--input", books, "--output", output, "--tokenizer", "bytes", "--segment-len", "4"]
    code, result, stderr = _main(capfd, *argv)
    opened = SegmentStore(str(output))
    assert code == 0
    assert _texts(opened) == KEPT
    assert _errors(output) == ERRORS
    assert "ignored 1 files" in stderr
    assert "duplicate_id 3, not_json 1, not_utf8 1" in stderr
    assert result["output"] == str(output)
    assert (result["num_documents"], result["num_errors"]) == (4, 5)
    assert result["num_segments"] == sum(entry.num_segments for entry in opened.manifest)
    assert result["num_tokens"] == sum(map(len, KEPT.values()))
    assert opened.tokenizer_fingerprint == ByteTokenizer().fingerprint
    files = sorted(path.name for path in output.iterdir())
    assert not [name for name in files if "tmp" in name or "partial" in name]
    assert {entry.file for entry in opened.manifest} == {name for name in files if name.startswith("segments-")}

    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()}
    os.utime(books / "a.txt")
    code, again, stderr = _main(capfd, *argv)
    assert (code, again) == (0, result)
    assert "nothing to do" in stderr
    code, again, stderr = _main(capfd, *argv, "--strict")
    assert (code, again) == (2, result)
    assert "5 errors" in stderr
    (tmp_path / "more.txt").write_bytes(b"more")
    for more, reason in (
        (["--segment-len", "5"], "segment_len 4 there, 5 asked for"),
        (["--input", tmp_path / "more.txt"], "other input (added more.txt)"),
    ):
        code, refused, stderr = _main(capfd, *argv, *more)
        assert (code, refused) == (2, {})
        assert reason in stderr
    for name, data, reason in (
        (store.INPUTS, b"[", f"{output}/inputs.json is damaged (Expecting value: "),
        (store.INPUTS, b'[{"name": "a.txt"}]', f"{output}/inputs.json is damaged ("),
        (store.INPUTS, None, f"{output}/inputs.json is missing; copy the store again, or delete it"),
        (store.STORE, b'{"format": 1}', f"{output}/store.json is damaged: it does not say segment_len, "),
    ):
        (output / name).unlink()
        if data is not None:
            (output / name).write_bytes(data)
        code, refused, stderr = _main(capfd, *argv)
        assert (code, refused) == (2, {})
        assert f"prepare: error: {reason}" in stderr
        modified, content = before[output / name]
        (output / name).write_bytes(content)
        os.utime(output / name, ns=(modified, modified))
    (books / "a.txt").write_bytes(b"changed")
    code, _, stderr = _main(capfd, *argv)
    assert code == 2
    assert "changed a.txt" in stderr
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()} == before


def test_files_of_one_name_from_two_inputs_are_both_read(
    local_ray: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ids that are given stay as they are, and so does what is said of the files."""
    for name in ("one", "two"):
        _write(tmp_path, f"{name}/1.txt", f"{name}/only-{name}.txt", text=f"text of {name}")
        rows = [{"text": f"row of {name}"}, {"text": "given", "id": "g"}]
        _write(tmp_path, f"{name}/p.jsonl", text="\n".join(map(json.dumps, rows)))
    argv = ["--input", tmp_path / "one", tmp_path / "two", "--output", tmp_path / "out"]
    code, _, stderr = _main(capfd, *argv)
    assert code == 0
    assert "4 files have names that others have too" in stderr
    ids = ["one/1", "only-one", "one/p.jsonl:1", "g", "two/1", "only-two", "two/p.jsonl:1"]
    assert list(_texts(SegmentStore(str(tmp_path / "out")))) == ids
    assert _errors(tmp_path / "out") == [("p.jsonl", "g", 2, "duplicate_id")]
    read = storage.read_json(str(tmp_path / "out" / store.INPUTS))
    assert [file["name"] for file in read] == ["1.txt", "only-one.txt", "p.jsonl", "1.txt", "only-two.txt", "p.jsonl"]
    code, _, stderr = _main(capfd, *argv)
    assert code == 0
    assert "nothing to do" in stderr


def test_units_and_order_of_arrival_do_not_change_the_documents(
    local_ray: None, books: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare._map
    monkeypatch.setattr(prepare, "_map", lambda function, items: reversed(list(run(function, items))))
    monkeypatch.setattr(inputs, "UNIT_FILES", 2)
    assert _main(capfd, "--input", books, "--output", tmp_path / "out", "--segment-len", "4")[0] == 0
    opened = SegmentStore(str(tmp_path / "out"))
    assert _texts(opened) == KEPT
    assert [entry.document_id for entry in opened.manifest] == ["a", "b", "c", "sub/a"]
    assert len(_errors(tmp_path / "out")) == len(ERRORS)


def test_an_input_without_any_document_still_ends_with_a_store(
    local_ray: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    argv = ["--input", tmp_path / "a.txt", tmp_path / "gone.txt", "--output", tmp_path / "out"]
    code, result, _ = _main(capfd, *argv)
    assert (code, result["num_documents"], result["num_errors"]) == (0, 0, 2)
    assert SegmentStore(str(tmp_path / "out")).manifest == []
    code, again, stderr = _main(capfd, *argv, "--strict")
    assert (code, again) == (2, result)
    assert "nothing to do" in stderr


def test_two_at_once_do_not_work_on_one_output(
    local_ray: None, books: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "BEAT_S", 0.05)
    output = tmp_path / "out"
    argv = ["--input", books, "--output", output, "--segment-len", "4"]
    with claim.claimed(str(output), "prepare"):
        code, result, stderr = _main(capfd, *argv)
        assert (code, result) == (2, {})
        assert f"another prepare is at work on {output}" in stderr
        assert [path.name for path in output.iterdir() if not path.name.startswith(".")] == [claim.CLAIM]
    assert _main(capfd, *argv)[0] == 0
    assert not (output / claim.CLAIM).exists()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = {"driver": "other", "machine": claim._machine(), "pid": dead.pid, "beat": 3}
    storage.write_json(str(output / claim.CLAIM), left)
    assert _main(capfd, *argv)[0] == 0
    assert not (output / claim.CLAIM).exists()


def test_a_store_that_another_has_made_meanwhile_is_found_made(
    local_ray: None, books: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--input", books, "--output", tmp_path / "out", "--segment-len", "4"]
    claimed = claim.claimed

    @contextlib.contextmanager
    def late(output: str, job: str) -> Iterator[None]:
        monkeypatch.setattr(prepare, "claimed", claimed)
        assert _main(capfd, *argv)[0] == 0
        with claimed(output, job):
            yield

    monkeypatch.setattr(prepare, "claimed", late)
    code, result, stderr = _main(capfd, *argv)
    assert (code, result["num_documents"]) == (0, len(KEPT))
    assert "nothing to do" in stderr
    assert not (tmp_path / "out" / claim.CLAIM).exists()


@pytest.mark.long
def test_a_unit_spread_over_workers_becomes_the_same(
    local_ray: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long documents, short ones and faulty ones in one unit of several batches."""
    letters = np.random.default_rng(0).choice(list("etaoin shrdlu \u00e9"), 2_500_000)
    directory = tmp_path / "in"
    directory.mkdir()
    (directory / "a.txt").write_text("".join(letters))
    (directory / "b.txt").write_bytes("".join(letters[::-1]).encode() + b"\xff")
    (directory / "c.jsonl").write_text('{"text": "short"}\nnope\n' * 100)
    argv = ["--input", directory, "--segment-len", "100"]
    assert _main(capfd, *argv, "--output", tmp_path / "one")[0] == 0
    monkeypatch.setattr(prepare, "BATCH_CHARS", 1)  # what is long enough to be spread
    unit = Unit(0, storage.expand([str(directory)], SUFFIXES), "", 1, "")
    assert [prepare._in_flight(unit, 1, num_cpus) for num_cpus in (1, 2)] == [0, 4]
    assert _main(capfd, *argv, "--output", tmp_path / "spread")[0] == 0
    assert _files(tmp_path / "spread") == _files(tmp_path / "one")
    assert _errors(tmp_path / "one")[:2] == [("b.txt", "b", None, "not_utf8"), ("c.jsonl", None, 2, "not_json")]


def test_an_idle_pool_gets_more_work_than_it_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows with the work that waits; nodes that are there are all that there is elsewhere."""
    monkeypatch.setattr(prepare.ray, "cluster_resources", lambda: {"CPU": 2.0})
    assert prepare._num_cpus() == 2
    monkeypatch.setenv("RMT_POOLS", "train,data")
    assert prepare._num_cpus() == 32
    long = Unit(0, [FileEntry("a.txt", "a.txt", 2**40, 0)], "", 1, "")
    assert prepare._in_flight(long, 1, prepare._num_cpus()) == prepare._MAX_IN_FLIGHT
    monkeypatch.setattr(prepare.ray, "cluster_resources", lambda: {})  # nobody yet
    assert prepare._num_cpus() == 32


def _files(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir()}


def _stopped(function: str, at_call: int = 1) -> Any:
    """A patch under which the job stops at a call of a function, as at Ctrl-C."""
    calls = []

    def stop(*_: object) -> None:
        calls.append(1)
        if len(calls) >= at_call:
            raise KeyboardInterrupt

    patch = pytest.MonkeyPatch()
    patch.setattr(function, stop)
    return patch


@pytest.mark.parametrize(
    ("function", "at_call"),
    [
        ("pipelines.data.store.write_manifest", 1),
        ("pipelines.data.store.write_errors", 1),
        ("pipelines.data.progress.clear", 1),  # behind the last file
    ],
)
def test_an_interrupted_run_is_gone_on_with(
    function: str,
    at_call: int,
    local_ray: None,
    books: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever it left; finished units are not made again, and the store is that of a run that was not interrupted."""
    monkeypatch.setattr(inputs, "UNIT_FILES", 1)
    output, whole = tmp_path / "out", tmp_path / "whole"
    argv = ["--input", books, "--segment-len", "4"]
    assert _main(capfd, *argv, "--output", whole)[0] == 0
    patch = _stopped(function, at_call)
    try:
        assert _main(capfd, *argv, "--output", output)[0] == 130
    finally:
        patch.undo()
    made = {path: path.stat().st_mtime_ns for path in output.glob("segments-*")}
    assert len(made) == 4
    (output / store.part_name(77)).write_bytes(b"of nothing")
    (output / f".{store.part_name(3)}.0123abcd.tmp").write_bytes(b"half")
    code, result, stderr = _main(capfd, *argv, "--output", output)
    assert code == 0
    assert result["num_documents"] == len(KEPT)
    if function.endswith("clear"):
        assert "nothing to do" in stderr
        (output / store.part_name(77)).unlink()
    else:
        assert "going on, 6 of 6 units are done" in stderr
    assert {path: path.stat().st_mtime_ns for path in output.glob("segments-*")} == made
    assert _files(output) == _files(whole)


@pytest.mark.long
def test_units_that_are_not_as_they_were_are_made_again(
    local_ray: None, books: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "UNIT_FILES", 1)
    output, whole = tmp_path / "out", tmp_path / "whole"
    argv = ["--input", books, "--segment-len", "4"]
    assert _main(capfd, *argv, "--output", whole)[0] == 0
    patch = _stopped("pipelines.data.store.write_manifest")
    try:
        assert _main(capfd, *argv, "--output", output)[0] == 130
    finally:
        patch.undo()
    (output / store.part_name(0)).write_bytes(b"damaged")
    (output / progress.unit_name(1)).unlink()
    assert _main(capfd, *argv, "--output", output)[0] == 0
    assert _files(output) == _files(whole)


def test_an_interrupted_run_with_other_settings_is_begun_anew(
    local_ray: None, books: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output, whole = tmp_path / "out", tmp_path / "whole"
    patch = _stopped("pipelines.data.store.write_manifest")
    try:
        assert _main(capfd, "--input", books, "--segment-len", "5", "--output", output)[0] == 130
    finally:
        patch.undo()
    argv = ["--input", books, "--segment-len", "4"]
    code, _, stderr = _main(capfd, *argv, "--output", output)
    assert code == 0
    assert "other settings or input: beginning anew" in stderr
    assert _main(capfd, *argv, "--output", whole)[0] == 0
    assert _files(output) == _files(whole)


def test_a_directory_that_is_no_store_is_left_alone(
    books: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("tokenizer.json", "model.safetensors"):
        output = tmp_path / name.partition(".")[0]
        output.mkdir()
        (output / name).write_bytes(b"precious")
        code, _, stderr = _main(capfd, "--input", books, "--output", output)
        assert code == 2
        assert f"holds {name}" in stderr
        assert [path.read_bytes() for path in output.iterdir()] == [b"precious"]
    code, _, stderr = _main(capfd, "--input", books, "--output", books / "a.txt")
    assert code == 2
    assert "is a file" in stderr


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--input", "{}/nowhere", "--output", "{}/out"], "does not exist"),
        (["--input", "{}/books/notes.md", "--output", "{}/out"], "unsupported suffix"),
        (["--input", "{}/books/*.zip", "--output", "{}/out"], "no input found"),
        (["--input", "{}/books"], "--output is required"),
        (["--input", "{}/books", "--output", "s3://"], "s3://: needs a bucket"),
        (["--input", "{}/books", "--output", "{}/out", "--tokenizer", "{}/none"], "does not exist"),
        (["--input", "{}/books", "--output", "{}/out", "--segment-len", "0"], "--segment-len 0"),
    ],
)
def test_wrong_input_is_refused_in_one_line(
    argv: list[str], reason: str, books: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, result, stderr = _main(capfd, *(word.format(tmp_path) for word in argv))
    assert (code, result) == (2, {})
    message = [line for line in stderr.splitlines() if line.startswith("prepare: error: ")]
    assert len(message) == 1
    assert reason in message[0]
    assert "Traceback" not in stderr
    assert not (tmp_path / "out").exists()


def _start(*argv: str | Path, **environment: str) -> "subprocess.Popen[str]":
    """The command as a user runs it, away from the repository."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "pipelines" / "prepare.py"), *map(str, argv)],
        cwd="/",
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.s3
@pytest.mark.long
def test_from_s3_to_s3_as_a_command(s3_bucket: str) -> None:
    for name, data in (("in/a.txt", HARD.encode()), ("in/sub/b.jsonl", b'{"text": "b"}\n'), ("in/c.txt", b"\xff")):
        storage.write_bytes(f"{s3_bucket}/prepare/{name}", data)
    output = f"{s3_bucket}/prepare/out"
    process = _start(
        "--input", f"{s3_bucket}/prepare/in", f"{s3_bucket}/prepare/gone.txt", "--output", output, "--segment-len", "4",
        "--num-cpus", "1",
    )  # fmt: skip
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["num_errors"] == 2
    assert stdout.count("\n") == 1
    assert _texts(SegmentStore(output)) == {"a": HARD.encode(), "sub/b.jsonl:1": b"b"}
    assert _errors(output) == [("c.txt", "c", None, "not_utf8"), ("gone.txt", None, None, "unreadable")]


@pytest.mark.long
def test_ctrl_c_leaves_no_store(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": "some words " * 20}) + "\n" for _ in range(200_000))
    (tmp_path / "a.jsonl").write_text(lines)
    output = tmp_path / "out"
    process = _start("--input", tmp_path / "a.jsonl", "--output", output, "--num-cpus", "1")
    deadline = time.monotonic() + 120
    while not list(output.glob(".segments-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert not (output / store.STORE).exists()
    assert (output / store.PARTIAL).exists()
