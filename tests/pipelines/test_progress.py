"""What is kept of an interrupted preparation is used if it is as it was left, and only then."""

from pathlib import Path

import numpy as np
import pytest

from pipelines import storage
from pipelines.data import progress, store
from pipelines.data.batches import batches, pieces_of
from pipelines.data.pieces import Difference, Encoded, Piece, encode
from pipelines.data.segment import Unit, write_unit
from pipelines.data.tokenise import ByteTokenizer


@pytest.fixture
def unit(tmp_path: Path) -> Unit:
    """Of two documents, one fault and one file that is not there, made and said to be finished."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("some text")
    (tmp_path / "in" / "b.jsonl").write_text('{"text": "more", "id": 5}\nno JSON\n')
    files = storage.expand([str(tmp_path / "in")], (".txt", ".jsonl"))
    output, tokenizer = tmp_path / "out", ByteTokenizer()
    tokenizer.save_pretrained(output)
    unit = Unit(3, [*files, storage.FileEntry("gone.txt", "gone.txt", -1, 0)], str(output), 4, tokenizer.fingerprint)
    progress.save_unit(unit, write_unit(unit))
    return unit


def test_a_finished_unit_is_found_as_it_was(unit: Unit) -> None:
    assert progress.load_unit(unit) == write_unit(unit)
    assert progress.units_in(storage.list_names(unit.output)) == {3}


def test_a_unit_of_other_settings_or_files_is_not_finished(unit: Unit) -> None:
    for other in (
        unit._replace(number=4),
        unit._replace(segment_len=5),
        unit._replace(tokenizer_fingerprint="x"),
        unit._replace(files=unit.files[:1]),
        unit._replace(files=[unit.files[0]._replace(mtime_ns=1), *unit.files[1:]]),
    ):
        assert progress.load_unit(other) is None


@pytest.mark.parametrize("name", [store.part_name(3), progress.unit_name(3)])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_file_means_that_the_unit_is_not_finished(unit: Unit, name: str, damage: str) -> None:
    path = Path(unit.output) / name
    data = path.read_bytes()
    middle = len(data) // 2
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:middle] if damage == "cut" else data[:middle] + b"~~~" + data[middle + 3 :])
    assert progress.load_unit(unit) is None


def test_a_unit_without_documents_needs_no_segment_file(tmp_path: Path) -> None:
    ByteTokenizer().save_pretrained(tmp_path)
    unit = Unit(0, [storage.FileEntry("gone.txt", "gone.txt", -1, 0)], str(tmp_path), 4, ByteTokenizer().fingerprint)
    result = write_unit(unit)
    progress.save_unit(unit, result)
    assert progress.load_unit(unit) == result
    assert not (tmp_path / store.part_name(0)).exists()


def test_tokens_are_kept_by_their_texts_and_refused_where_damaged(unit: Unit, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    (batch,) = batches(tokenizer, unit.files)
    pieces = pieces_of(batch)
    name = progress.tokens_name(unit, pieces)
    encoded = progress.encode_and_save(unit, pieces, name)
    uri = storage.join(unit.output, name)
    found = progress.load_tokens(uri)
    assert found is not None
    for one, same, wanted in zip(found, encoded, encode(tokenizer, pieces), strict=True):
        assert one.ids.dtype == np.int32
        assert one.ids.tolist() == same.ids.tolist() == wanted.ids.tolist()
        assert one[1:] == (True, True, None)
    others = [[pieces[0]._replace(text="some texT"), *pieces[1:]], [pieces[0]._replace(context="x"), *pieces[1:]]]
    names = {progress.tokens_name(unit, other) for other in others}
    names.add(progress.tokens_name(unit._replace(tokenizer_fingerprint="x"), pieces))
    assert len(names | {name}) == 4
    for data in (storage.read_bytes(uri)[:-1], b"", bytes(200)):
        storage.write_bytes(uri, data)
        assert progress.load_tokens(uri) is None


def test_tokens_that_do_not_fit_are_not_kept(tmp_path: Path) -> None:
    ids = np.arange(3, dtype=np.int32)
    for n, one in enumerate(
        (
            Encoded(ids, False, True, None),
            Encoded(ids, True, False, None),
            Encoded(ids, True, True, Difference(0, "a", "b")),
        )
    ):
        progress.save_tokens(str(tmp_path / str(n)), [Encoded(ids, True, True, None), one])
    assert not list(tmp_path.iterdir())


def test_batches_hold_all_of_a_document_in_order_and_about_as_much_text_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.data.batches.BATCH_CHARS", 1000)
    monkeypatch.setattr("pipelines.data.pieces.PIECE_CHARS", 700)
    text = "words of a long document, " * 400
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "short.jsonl").write_text('{"text": "short"}\n' * 500)
    found = list(batches(ByteTokenizer(), storage.expand([str(tmp_path)], (".txt", ".jsonl"))))
    sizes = [sum(len(piece.text) for piece in pieces_of(batch)) for batch in found]
    assert all(1000 <= size < 1000 + 700 + 512 for size in sizes[:-1])
    pieces = [event for batch in found for event in batch if isinstance(event, Piece)]
    assert "".join(piece.text for piece in pieces) == text + "short" * 500


def test_checksums_beside_a_store_are_its_own(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / store.PARTIAL), {"identity": "x"})
    storage.seal(tmp_path)
    assert progress.stale(str(tmp_path), "x", 1) == ["SHA256SUMS"]
