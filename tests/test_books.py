"""The embedded books are the ones their manifest describes, byte for byte."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

BOOKS = Path(__file__).resolve().parents[1] / "pipelines" / "books"
ENTRIES: list[dict[str, Any]] = json.loads((BOOKS / "manifest.json").read_text(encoding="utf-8"))["books"]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["file"])
def test_a_book_is_what_its_manifest_says(entry: dict[str, Any]) -> None:
    data = (BOOKS / entry["file"]).read_bytes()
    assert len(data) == entry["num_bytes"]
    assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    assert entry["split"] == Path(entry["file"]).parent.name
    for field in ("title", "author", "year", "source", "source_url", "licence"):
        assert entry[field], field


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["file"])
def test_a_book_is_clean_text(entry: dict[str, Any]) -> None:
    text = (BOOKS / entry["file"]).read_bytes().decode("utf-8")
    assert "\r" not in text
    assert "\ufeff" not in text
    assert "gutenberg" not in text.lower(), "the distributor's header and footer are not the book"
    assert entry["title"].lower() in text[:100].lower()
    assert text.endswith("\n")


def test_every_text_file_is_in_the_manifest() -> None:
    on_disk = {path.relative_to(BOOKS).as_posix() for path in BOOKS.rglob("*.txt")}
    assert on_disk == {entry["file"] for entry in ENTRIES}


def test_notes_that_are_not_the_authors_are_all_named() -> None:
    for entry in ENTRIES:
        lines = (BOOKS / entry["file"]).read_text(encoding="utf-8").splitlines()
        bracketed = [number for number, line in enumerate(lines, 1) if line.lstrip().startswith("[")]
        named = [int(note.split(":")[0].removeprefix("line ")) for note in entry["notes_in_text"]]
        letter_heading = [number for number in bracketed if lines[number - 1].strip() == "[To Mrs. Weston.]"]
        assert sorted(named + letter_heading) == bracketed, entry["file"]


def test_there_is_enough_to_train_on_and_something_held_out() -> None:
    splits = [entry["split"] for entry in ENTRIES]
    assert splits.count("train") >= 3
    assert splits.count("heldout") >= 1
    assert 3_000_000 <= sum(entry["num_bytes"] for entry in ENTRIES) <= 6_000_000
