"""Several stores read as one: each document from its own store; stores that do not fit together are refused."""

from pathlib import Path

import numpy as np
import pytest

from pipelines import storage
from pipelines.config import InputError
from pipelines.data import store
from pipelines.data.mixture import Mixture
from pipelines.data.store import DocumentEntry, PartWriter, SegmentStore
from pipelines.data.tokenise import ByteTokenizer


def make(directory: Path, texts: dict[str, bytes], segment_len: int = 4, tokenizer: str = "") -> SegmentStore:
    directory.mkdir()
    ByteTokenizer().save_pretrained(directory)
    entries = []
    with PartWriter(directory / store.part_name(0)) as writer:
        for name, text in texts.items():
            offset = writer.num_rows
            tokens = np.frombuffer(text, dtype=np.uint8).astype(np.int32)
            for number, start in enumerate(range(0, len(tokens), segment_len)):
                writer.add(name, number, tokens[start : start + segment_len])
            num_rows = writer.num_rows - offset
            entries.append(DocumentEntry(name, "", len(text), len(text), num_rows, store.part_name(0), offset, ""))
    store.write_manifest(str(directory), entries)
    content = dict.fromkeys(store._IDENTITY, directory.name) | {"format": store.FORMAT, "segment_len": segment_len}
    content["tokenizer_fingerprint"] = tokenizer or ByteTokenizer().fingerprint
    storage.write_json(str(directory / store.STORE), content)
    return SegmentStore(str(directory))


def test_documents_are_read_from_their_own_store(tmp_path: Path) -> None:
    """Also where files and ids have the same names."""
    texts = [{"a": b"one two three", "b": b"x"}, {"a": b"eins zwei"}]
    mixed = Mixture([make(tmp_path / str(n), each) for n, each in enumerate(texts)], None)
    assert [entry.document_id for entry in mixed.manifest] == ["a", "b", "a"]
    read = [bytes(mixed.read(entry, 0, entry.num_segments).astype(np.uint8)) for entry in mixed.manifest]
    assert read == [b"one two three", b"x", b"eins zwei"]
    assert bytes(mixed.read(mixed.manifest[0], 1, 2).astype(np.uint8)) == b"two "
    assert mixed.shares == []
    assert mixed.load_tokenizer().fingerprint == mixed.tokenizer_fingerprint


def test_a_mixture_is_another_for_other_stores_or_another_order(tmp_path: Path) -> None:
    one, two = (make(tmp_path / name, {"a": name.encode()}) for name in ("one", "two"))
    assert len({Mixture(stores, None).fingerprint for stores in ([one, two], [two, one], [one])}) == 3
    weighted = Mixture([one, two], [1, 3])
    assert [(share.documents, share.weight) for share in weighted.shares] == [(range(0, 1), 1), (range(1, 2), 3)]


def test_stores_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    one = make(tmp_path / "one", {"a": b"text"})
    with pytest.raises(InputError, match=r"segments of 4 tokens, .*/long of 8; prepare them with the same"):
        Mixture([one, make(tmp_path / "long", {"a": b"text"}, segment_len=8)], None)
    with pytest.raises(InputError, match=r"/other with 0123456789abcdef; .* --tokenizer"):
        Mixture([one, make(tmp_path / "other", {"a": b"text"}, tokenizer="0123456789abcdef" * 4)], None)
    with pytest.raises(InputError, match=r"/one is given twice; .*dataset\.weights"):
        Mixture([one, SegmentStore(one.uri)], None)
    empty = make(tmp_path / "empty", {})
    assert len(Mixture([one, empty], None).manifest) == 1
    with pytest.raises(InputError, match="/empty has no documents"):
        Mixture([one, empty], [1, 1])


def test_a_store_with_another_tokenizer_in_it_is_refused(tmp_path: Path) -> None:
    opened = make(tmp_path / "other", {"a": b"text"}, tokenizer="0123456789abcdef" * 4)
    with pytest.raises(
        InputError, match=f"made with tokenizer 0123456789abcdef but holds {ByteTokenizer().fingerprint[:16]}"
    ):
        opened.load_tokenizer()
