"""The segment store reads back what was written, from any place, through row groups of bounded size."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.config import InputError
from pipelines.data import store
from pipelines.data.store import DocumentEntry, PartWriter, SegmentStore
from pipelines.data.tokenise import ByteTokenizer

SEGMENT_LEN = 7
NAME = store.part_name(0)


def _write(directory: Path, documents: dict[str, np.ndarray]) -> list[DocumentEntry]:
    entries = []
    with PartWriter(directory / NAME) as writer:
        for document_id, tokens in documents.items():
            offset = writer.num_rows
            for start in range(0, len(tokens), SEGMENT_LEN):
                writer.add(document_id, start // SEGMENT_LEN, tokens[start : start + SEGMENT_LEN])
            num_segments = writer.num_rows - offset
            entries.append(DocumentEntry(document_id, "x", 0, len(tokens), num_segments, NAME, offset, "0"))
    return entries


def _finish(directory: Path, entries: list[DocumentEntry]) -> SegmentStore:
    store.write_manifest(str(directory), entries)
    ByteTokenizer().save_pretrained(directory)
    content = dict.fromkeys(store._IDENTITY, 0) | {"format": store.FORMAT, "segment_len": SEGMENT_LEN}
    content["tokenizer_fingerprint"] = ByteTokenizer().fingerprint
    storage.write_json(str(directory / store.STORE), content)
    return SegmentStore(str(directory))


@pytest.fixture
def documents(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Of lengths around a segment's and a row group's."""
    monkeypatch.setattr(store, "ROW_GROUP_TOKENS", 50)
    random = np.random.default_rng(0)
    return {f"d{n}": random.integers(0, 257, n).astype(np.int32) for n in (1, 6, 7, 8, 14, 49, 56, 300, 3)}


def _check(opened: SegmentStore, documents: dict[str, np.ndarray]) -> None:
    for entry in opened.manifest:
        tokens = documents[entry.document_id]
        for start in range(entry.num_segments + 1):
            for stop in range(start, entry.num_segments + 1):
                read = opened.read(entry, start, stop)
                assert read.dtype == np.int32
                assert np.array_equal(read, tokens[start * SEGMENT_LEN : stop * SEGMENT_LEN])


def test_any_span_of_segments_is_read_back(tmp_path: Path, documents: dict[str, np.ndarray]) -> None:
    opened = _finish(tmp_path, _write(tmp_path, documents))
    assert [entry.document_id for entry in opened.manifest] == list(documents)
    _check(opened, documents)
    assert opened.load_tokenizer().fingerprint == opened.tokenizer_fingerprint


def test_row_groups_are_bounded_and_columns_are_as_agreed(tmp_path: Path, documents: dict[str, np.ndarray]) -> None:
    _write(tmp_path, documents)
    file = pq.ParquetFile(tmp_path / NAME)
    assert file.schema_arrow.equals(store.SEGMENTS_SCHEMA)
    sizes = [file.read_row_group(group)["tokens"].combine_chunks() for group in range(file.num_row_groups)]
    assert max(len(tokens.flatten()) for tokens in sizes) < 50 + SEGMENT_LEN
    table = pq.read_table(tmp_path / NAME)
    numbers = {document_id: [] for document_id in documents}
    for document_id, number in zip(table["document_id"].to_pylist(), table["segment"].to_pylist(), strict=True):
        numbers[document_id].append(number)
    assert list(dict.fromkeys(table["document_id"].to_pylist())) == list(documents)
    assert all(found == list(range(len(found))) for found in numbers.values())


def test_what_is_read_may_be_changed(tmp_path: Path, documents: dict[str, np.ndarray]) -> None:
    opened = _finish(tmp_path, _write(tmp_path, documents))
    entry = opened.manifest[3]
    opened.read(entry, 0, 1)[:] = -1
    assert np.array_equal(opened.read(entry, 0, 1), documents[entry.document_id][:SEGMENT_LEN])


def test_documents_can_be_taken_out(tmp_path: Path, documents: dict[str, np.ndarray]) -> None:
    entries = _write(tmp_path, documents)
    drop = {"d1", "d49", "d300"}
    kept = store.without_documents(str(tmp_path / NAME), entries, drop)
    assert [entry.document_id for entry in kept] == [name for name in documents if name not in drop]
    _check(_finish(tmp_path, kept), documents)
    assert store.without_documents(str(tmp_path / NAME), kept, set(documents)) == []
    assert not (tmp_path / NAME).exists()


def test_segments_that_do_not_exist_are_refused(tmp_path: Path, documents: dict[str, np.ndarray]) -> None:
    opened = _finish(tmp_path, _write(tmp_path, documents))
    for start, stop in ((-1, 1), (0, 9), (2, 1)):
        with pytest.raises(IndexError):
            opened.read(opened.manifest[3], start, stop)


def test_many_files_need_few_open_ones(
    tmp_path: Path, documents: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_OPEN_FILES", 1)
    entries = _write(tmp_path, documents)
    (tmp_path / "segments-00001.parquet").write_bytes((tmp_path / NAME).read_bytes())
    others = [entry._replace(file="segments-00001.parquet") for entry in entries]
    opened = _finish(tmp_path, entries + others)
    for one, other in zip(entries, others, strict=True):
        assert np.array_equal(opened.read(one, 0, 1), opened.read(other, 0, 1))
    assert len(opened._parts) == 1


def _by_turns(opened: SegmentStore) -> dict[str, list[np.ndarray]]:
    """Each document's segments, where the documents are read a segment each at a time."""
    found: dict[str, list[np.ndarray]] = {entry.document_id: [] for entry in opened.manifest}
    for n in range(max(entry.num_segments for entry in opened.manifest)):
        for entry in opened.manifest:
            if n < entry.num_segments:
                found[entry.document_id].append(opened.read(entry, n, n + 1))
    return found


@pytest.mark.parametrize("kept_bytes", [2**27, 500, 1])
def test_row_groups_are_read_once_by_many_that_read_by_turns(
    kept_bytes: int, tmp_path: Path, documents: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as they may be kept."""
    monkeypatch.setattr(store, "_KEPT_BYTES", kept_bytes)
    opened = _finish(tmp_path, _write(tmp_path, documents))
    numbers, most = [], 0

    def counted(file: pq.ParquetFile, number: int, read: Any = pq.ParquetFile.read_row_group, **options: Any) -> Any:
        nonlocal most
        numbers.append(number)
        most = max(most, opened._groups.num_bytes)
        return read(file, number, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    found = _by_turns(opened)
    assert all(np.array_equal(np.concatenate(found[name]), tokens) for name, tokens in documents.items())
    num_groups = pq.ParquetFile(tmp_path / NAME).num_row_groups
    assert num_groups > 5
    if kept_bytes > 500:
        assert sorted(numbers) == list(range(num_groups))
    else:
        assert len(numbers) > num_groups
        assert most <= max(kept_bytes, 4 * (50 + SEGMENT_LEN + 20))


def test_only_a_finished_store_opens(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a finished segment store"):
        SegmentStore(str(tmp_path))
    storage.write_json(str(tmp_path / store.STORE), {"format": 99})
    with pytest.raises(InputError, match="format 99"):
        SegmentStore(str(tmp_path))
    (tmp_path / store.STORE).write_text("{")
    with pytest.raises(InputError, match=r"store\.json"):
        SegmentStore(str(tmp_path))


def _refused(directory: Path) -> str:
    """Why the store does not open, below its directory's name."""
    with pytest.raises(InputError) as caught:
        SegmentStore(str(directory))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(directory))
    assert message.endswith("; copy the store again, or delete it and prepare it again")
    return message.removeprefix(str(directory))


def test_a_store_with_a_damaged_or_missing_file_does_not_open(tmp_path: Path, documents: dict[str, np.ndarray]) -> None:
    entries = _write(tmp_path, documents)
    others = [entry._replace(file=store.part_name(n)) for n, entry in enumerate(entries)]
    for other in others:
        (tmp_path / other.file).write_bytes((tmp_path / NAME).read_bytes())
    _finish(tmp_path, others)
    (tmp_path / others[3].file).write_bytes(b"")
    assert _refused(tmp_path).startswith(" is incomplete: segments-00003.parquet should be there, and not empty")
    (tmp_path / others[5].file).unlink()
    assert _refused(tmp_path).startswith(" is incomplete: segments-00003.parquet and 1 more should be there")

    manifest = tmp_path / store.MANIFEST
    content = manifest.read_bytes()
    manifest.write_bytes(content[: len(content) // 2])
    assert _refused(tmp_path).startswith("/manifest.parquet is damaged (")
    pq.write_table(pq.read_table(tmp_path / NAME), manifest)
    assert _refused(tmp_path).startswith("/manifest.parquet is damaged (")
    manifest.unlink()
    assert _refused(tmp_path).startswith("/manifest.parquet is missing; ")
    storage.write_json(str(tmp_path / store.STORE), {"format": store.FORMAT, "num_tokens": 1})
    assert _refused(tmp_path).startswith("/store.json is damaged: it does not say segment_len, tokenizer_fingerprint, ")


@pytest.mark.parametrize("damage", ["cut", "gone", "short"])
def test_a_damaged_segment_file_is_named_when_it_is_read(
    damage: str, tmp_path: Path, documents: dict[str, np.ndarray]
) -> None:
    opened = _finish(tmp_path, _write(tmp_path, documents))
    content = (tmp_path / NAME).read_bytes()
    if damage == "cut":
        (tmp_path / NAME).write_bytes(content[:-100])
    elif damage == "gone":
        (tmp_path / NAME).unlink()
    else:
        _write(tmp_path, {"d1": documents["d1"]})
    says = {"cut": "is damaged", "gone": "is missing", "short": "is of another store: it holds 1 segments"}[damage]
    with pytest.raises(storage.DamagedError, match=rf"^{tmp_path}/{NAME} {says}.*; copy the store again, or delete"):
        opened.read(opened.manifest[-1], 0, 1)


def test_altered_bytes_are_found_when_they_are_read(tmp_path: Path) -> None:
    """A bit of the tokens' column is turned, here and there: an error, or a bit that says nothing of the tokens."""
    entries = _write(tmp_path, {"a": np.arange(60, dtype=np.int32)})
    opened = _finish(tmp_path, entries)
    good = opened.read(entries[0], 0, entries[0].num_segments)
    assert np.array_equal(good, np.arange(60))
    column = pq.ParquetFile(tmp_path / NAME).metadata.row_group(0).column(2)
    start, size = column.dictionary_page_offset or column.data_page_offset, column.total_compressed_size
    content = (tmp_path / NAME).read_bytes()
    for place in range(start, start + size, 16):
        (tmp_path / NAME).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            read = SegmentStore(str(tmp_path)).read(entries[0], 0, entries[0].num_segments)
        except storage.DamagedError:  # of the checksum, or of a header that makes no sense any more
            continue
        assert np.array_equal(read, good), f"byte {place}"
