"""The books that come with the project, as text and as a segment store in memory."""

import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from pipelines.config import fingerprint
from pipelines.data.plan import Share
from pipelines.data.store import DocumentEntry
from pipelines.data.tokenise import ByteTokenizer


def embedded_books(split: str) -> dict[str, str]:
    """File name without suffix -> text, of the books for `train` or `heldout`."""
    folder = resources.files("pipelines") / "books"
    entries: list[dict[str, Any]] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["books"]
    files = [entry["file"] for entry in entries if entry["split"] == split]
    return {file.rpartition("/")[2].removesuffix(".txt"): folder.joinpath(file).read_bytes().decode() for file in files}


class BookStore:
    """The books of a split in segments of bytes, as a store made by `prepare` would hold them."""

    shares: Sequence[Share] = ()

    def __init__(self, segment_len: int, split: str = "train") -> None:
        self.segment_len = segment_len
        self._tokenizer = ByteTokenizer()
        self._texts = {name: self._tokenizer.encode(text) for name, text in embedded_books(split).items()}
        self.manifest = [self._entry(name, tokens) for name, tokens in self._texts.items()]
        self.tokenizer_fingerprint = self._tokenizer.fingerprint
        self.fingerprint = fingerprint([[entry.sha256 for entry in self.manifest], segment_len])

    def _entry(self, name: str, tokens: np.ndarray) -> DocumentEntry:
        digest = hashlib.sha256(tokens.astype(np.uint8).tobytes()).hexdigest()
        return DocumentEntry(
            document_id=name,
            source=f"embedded:{name}",
            num_bytes=len(tokens),
            num_tokens=len(tokens),
            num_segments=-(-len(tokens) // self.segment_len),
            file="",
            row_offset=0,
            sha256=digest,
        )

    def load_tokenizer(self) -> ByteTokenizer:
        return self._tokenizer

    def read(self, document: DocumentEntry, start: int, stop: int) -> np.ndarray:
        """The tokens of segments start .. stop-1 of a document, joined: (T,) int32."""
        return self._texts[document.document_id][start * self.segment_len : stop * self.segment_len]
