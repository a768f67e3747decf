"""A worker of the summaries: holds the model, reads parts of files, gives rows of the result.

Memory: the model; for each document being read a state of constant size and a piece of its text (1 MiB of it and its
tokens), for one that is a JSONL line or a Parquet row all of its text.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

import rmt_core
from pipelines import storage
from pipelines.config import InputError
from pipelines.data.parts import FilePart, read_part
from pipelines.data.read import Fault, UnreadableError
from pipelines.data.tokenise import LossyTextError, Tokenizer, encode_chunks, load_tokenizer
from pipelines.serving.batch import BatchEngine, Document, DocumentError, Summary, Writing, describe

SCHEMA = pa.schema(
    [
        ("doc_id", pa.string()),
        ("summary", pa.string()),  # null in an error row
        ("num_tokens", pa.int64()),
        ("num_segments", pa.int64()),
        ("model", pa.string()),  # the model's fingerprint
        ("status", pa.string()),  # ok or error
        ("error", pa.string()),  # null in a good row
    ]
)


class Settings(NamedTuple):
    """What a worker needs to know."""

    model: str  # URI of the model's directory
    fingerprint: str  # of the model that is expected there
    prompt: str
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    batch_size: int  # documents read side by side
    device: str


class Loaded(NamedTuple):
    """A model and its tokenizer."""

    model: rmt_core.RecurrentModel
    tokenizer: Tokenizer
    fingerprint: str


def load(uri: str, device: str = "cpu") -> Loaded:
    """The model in a directory on disk or S3, with its tokenizer; InputError where they are not there or do not fit."""
    with storage.local_directory(uri) as directory:
        try:
            model = rmt_core.load(directory, device)
        except Exception as error:  # a damaged file raises whatever its library likes
            raise InputError(f"model {uri} cannot be loaded: {error}") from error
        try:
            tokenizer = load_tokenizer(str(directory))
        except InputError as error:
            raise InputError(f"model {uri} needs its tokenizer beside it: {error}") from error
    vocab_size = model.backbone.lm.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"model {uri} has {vocab_size} token embeddings, its tokenizer {tokenizer.vocab_size} tokens; save the "
            "model with the tokenizer that it was trained with"
        )
    return Loaded(model, tokenizer, rmt_core.fingerprint(model))


class Summariser:
    """Parts of files in, tables of summaries out, in order."""

    def __init__(self, settings: Settings) -> None:
        model, self.tokenizer, self.fingerprint = load(settings.model, settings.device)
        if self.fingerprint != settings.fingerprint:
            raise RuntimeError(
                f"the model in {settings.model} is {self.fingerprint[:16]} here, but {settings.fingerprint[:16]} where "
                "the job was started; give a directory that all machines share"
            )
        writing = Writing(
            prompt=self.tokenizer.encode(settings.prompt).tolist(),
            max_new_tokens=settings.max_new_tokens,
            sampling=rmt_core.Sampling(settings.temperature, settings.top_p),
            seed=settings.seed,
        )
        self.engine = BatchEngine(model, self.tokenizer, writing, settings.batch_size)

    def summarise(self, parts: Iterable[FilePart]) -> Iterator[pa.Table]:
        """Tables of `SCHEMA`, of as many rows as the engine reads side by side; the last may have fewer."""
        rows: list[dict[str, Any]] = []
        for summary in self.engine.summarise(documents(parts, self.tokenizer)):
            rows.append(row(summary, self.fingerprint))
            if len(rows) == self.engine.num_rows:
                yield pa.Table.from_pylist(rows, SCHEMA)
                rows = []
        yield pa.Table.from_pylist(rows, SCHEMA)


def row(summary: Summary, fingerprint: str) -> dict[str, Any]:
    """A summary as a row of `SCHEMA`."""
    return {
        "doc_id": summary.doc_id,
        "summary": None if summary.error else summary.text,
        "num_tokens": summary.num_tokens,
        "num_segments": summary.num_segments,
        "model": fingerprint,
        "status": "error" if summary.error else "ok",
        "error": summary.error or None,
    }


def documents(parts: Iterable[FilePart], tokenizer: Tokenizer) -> Iterator[Document]:
    """What the parts hold, for the engine: a fault becomes a document that fails with the fault's reason."""
    for part in parts:
        try:
            for found in read_part(part):
                if isinstance(found, Fault):
                    place = part.name if found.line is None else f"{part.name}:{found.line}"
                    yield _failing(found.document_id or place, found.reason)
                else:
                    yield Document(found.document_id, _tokens(tokenizer, found.chunks))
        except Exception as error:  # a file on which its parser breaks must not take the other files with it
            yield _failing(part.name, f"cannot be read: {describe(error)}")


def _tokens(tokenizer: Tokenizer, chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
    try:
        yield from encode_chunks(tokenizer, chunks)
    except (UnreadableError, LossyTextError) as error:
        raise DocumentError(str(error)) from error


def _failing(doc_id: str, reason: str) -> Document:
    def tokens() -> Iterator[np.ndarray]:
        raise DocumentError(reason)
        yield  # makes this a generator

    return Document(doc_id, tokens())


def concatenate(tables: Sequence[pa.Table]) -> pa.Table:
    """One table of `SCHEMA`, also of none."""
    return pa.concat_tables([SCHEMA.empty_table(), *tables])
