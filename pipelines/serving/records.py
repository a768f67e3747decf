"""A session as bytes: where its document stands, its version, and what its last requests were answered.

A record is a sealed safetensors file (`rmt_core.state.to_bytes`) of the state and the few tensors beside it; everything
else is JSON in its header, under the same SHA-256. It names the model that it belongs to. Nothing in it is pickled.

Axes: D width.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rmt_core import state as states

from .readers import Position
from .requests import Done, Request, RequestError, Usage

KEPT_RESULTS = 2  # a client that waits for an answer repeats its last request only


class Result(NamedTuple):
    """What a request that had an id was answered."""

    request_id: str  # hashed
    digest: str  # of what was asked, so that an id used twice is noticed
    tokens: tuple[int, ...]  # that were written
    done: Done


class Boundary(NamedTuple):
    """A version of a session."""

    version: int
    num_tokens: int  # of the document
    num_segments: int  # of it that are closed


class Record(NamedTuple):
    """One version of a session."""

    session: str  # the hash that it is stored under
    version: int  # 0 for a new session; one more at each change
    position: Position
    saved_s: float  # seconds since 1970
    results: tuple[Result, ...] = ()  # of the last requests, the latest at the end
    kept: tuple[Boundary, ...] = ()  # earlier versions that can be returned to, the oldest first

    @property
    def boundary(self) -> Boundary:
        return Boundary(self.version, self.position.num_tokens, self.position.num_segments)

    def result_of(self, request: Request) -> Result | None:
        """What the request was answered before, if it was. RequestError where its id was another request's."""
        if request.request_id is None:
            return None
        name = hashed(request.request_id)
        found = next((result for result in self.results if result.request_id == name), None)
        if found is not None and found.digest != digest_of(request):
            raise RequestError("invalid_request", "the request id was used for another request; give each its own")
        return found


def hashed(name: str) -> str:
    """What stands for an id that is not to be seen."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def digest_of(request: Request) -> str:
    """Equal for requests that ask for the same."""
    tokens = hashlib.sha256(np.asarray(request.tokens, dtype="<i8").tobytes()).hexdigest()
    asked: list[Any] = [tokens, request.max_new_tokens, request.seed]
    asked += [request.sampling.temperature, request.sampling.top_p]
    asked += [list(request.stop_tokens), list(request.stop_strings)]
    return hashed(json.dumps(asked))


def to_bytes(record: Record, fingerprint: str) -> bytes:
    position = record.position
    hidden = torch.zeros(1, 0) if position.hidden is None else position.hidden
    tree = {
        "state": position.state,
        "hidden": hidden,
        "open": _row(position.open_tokens),
        "written": _row([token for result in record.results for token in result.tokens]),
    }
    notes = {
        "session": record.session,
        "version": record.version,
        "segments": position.num_segments,
        "tokens": position.num_tokens,
        "saved_s": record.saved_s,
        "chain": None if position.chain is None else position.chain.hex(),
        "results": [_about(result) for result in record.results],
        "kept": record.kept,
    }
    return states.to_bytes(tree, fingerprint, notes)


class ForeignRecordError(ValueError):
    """A whole record, but another model's."""

    def __init__(self, message: str, saved_s: float) -> None:
        super().__init__(message)
        self.saved_s = saved_s  # seconds since 1970


def from_bytes(data: bytes, fingerprint: str) -> Record:
    """The record written by `to_bytes`; a ValueError when a byte is altered, ForeignRecordError for another model's."""
    try:
        tree, notes = states.with_notes_from_bytes(data, fingerprint)
    except states.ForeignStateError as error:
        if not isinstance(error.notes, dict) or "saved_s" not in error.notes:
            raise
        raise ForeignRecordError(str(error), error.notes["saved_s"]) from error
    try:
        hidden: Tensor = tree["hidden"]
        position = Position(
            tree["state"],
            tuple(tree["open"][0].tolist()),
            hidden if hidden.shape[1] else None,
            notes["tokens"],
            notes["segments"],
            None if notes["chain"] is None else bytes.fromhex(notes["chain"]),
        )
        return Record(
            session=notes["session"],
            version=notes["version"],
            position=position,
            saved_s=notes["saved_s"],
            results=_results(notes["results"], tree["written"][0].tolist()),
            kept=tuple(Boundary(*boundary) for boundary in notes["kept"]),
        )
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"not a session's record: {len(data)} bytes that hold some other state") from error


def _row(tokens: Sequence[int]) -> Tensor:
    return torch.tensor([list(tokens)], dtype=torch.int32).reshape(1, len(tokens))


def _about(result: Result) -> list[Any]:
    done = result.done
    return [result.request_id, result.digest, len(result.tokens), *done._replace(usage=list(done.usage))]  # type: ignore[arg-type]


def _results(about: Sequence[Sequence[Any]], tokens: Sequence[int]) -> tuple[Result, ...]:
    results, start = [], 0
    for request_id, digest, count, *done in about:
        reason, usage, *rest = done
        written = tuple(tokens[start : start + count])
        results.append(Result(request_id, digest, written, Done(reason, Usage(*usage), *rest)))
        start += count
    return tuple(results)
