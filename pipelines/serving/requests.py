"""What is asked of the engine, and what it answers: a stream of events for each request."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from rmt_core import Sampling

FinishReason = Literal["stop", "length"]
GREEDY = Sampling()
Code = Literal[
    "invalid_request",
    "session_not_found",
    "session_exists",
    "version_conflict",
    "model_mismatch",
    "store_full",
    "store_unavailable",
    "failed",
]


class RequestError(ValueError):
    """A request that cannot be served; the message holds no text of the request and may be shown to the user."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


class OverloadedError(RuntimeError):
    """There is no room for a further request now; try again later."""


class ClosedError(OverloadedError):
    """Nothing more is served here; try again, elsewhere."""


@dataclass(frozen=True)
class Request:
    """Read `tokens`, then write up to `max_new_tokens`: 0 only reads.

    Without a session each request is a document of its own. With one it goes on where the session's last request
    ended, and the session moves on when all of it is done: a request that fails or is cancelled leaves it as it was.
    """

    tokens: Sequence[int]
    max_new_tokens: int = 0
    session: str | None = None  # its id, as the user knows it
    tenant: str = ""  # whose sessions and whose prefixes
    sampling: Sampling = GREEDY
    seed: int = 0
    stop_tokens: Sequence[int] = ()
    stop_strings: Sequence[str] = ()  # the text ends before the first of them
    request_id: str | None = None  # of a session's request: sent again, it gives the first one's result
    expected_version: int | None = None  # of the session; another one is a conflict


class Progress(NamedTuple):
    """So much of the request's tokens has been read, in closed segments of the document."""

    num_segments: int  # of the document, all requests of the session together
    num_tokens: int  # of the document


class Written(NamedTuple):
    """Further tokens. The texts joined are the whole text: whole characters, nothing of a stop string."""

    tokens: tuple[int, ...]  # none where only held-back text comes
    text: str  # may be empty: the rest of a character, or what may begin a stop string, is held back


class Usage(NamedTuple):
    """Tokens of one request."""

    num_prompt: int
    num_written: int
    num_cached: int  # of the prompt, those whose segments were found in the prefix cache


class Done(NamedTuple):
    """The last event of a request that went well."""

    finish_reason: FinishReason  # "stop": a stop token or string; "length": max_new_tokens were written
    usage: Usage
    num_tokens: int  # of the document now
    num_segments: int  # of it that are closed
    version: int | None = None  # of the session now


class Failed(NamedTuple):
    """The last event of a request that did not."""

    code: Code
    message: str  # one line without any text of the request


Event: TypeAlias = Progress | Written | Done | Failed
