"""Between the routes and the engine: requests are run with a time limit, and end when their client is gone."""

import asyncio
import contextlib
import hashlib
import logging
import random
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple, TypeVar

from fastapi import Request as HttpRequest

import rmt_core
from pipelines.data.tokenise import Tokenizer

from .chat import ChatFormat
from .errors import ApiError, closed, of_request
from .metrics import Metrics
from .openai_schema import DEFAULT_TOKENS, Writing
from .requests import ClosedError, Done, Event, Failed, OverloadedError, Request, RequestError, Usage, Written
from .serve_config import ServeConfig
from .service import Service, Stream

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")
PING_S = 10.0  # without an event for so long, a stream shows that it lives
_SWEEP_S = 60.0  # between looks for expired sessions, about: replicas that began together do not all look at once


class Ping(NamedTuple):
    """Nothing has happened for a while."""


class Finished(NamedTuple):
    """A request that went well."""

    text: str
    done: Done


class Front:
    """One replica's service with what the routes need beside it."""

    def __init__(self, service: Service, tokenizer: Tokenizer, config: ServeConfig, chat: ChatFormat) -> None:
        self.service = service
        self.tokenizer = tokenizer
        self.config = config
        self.chat = chat
        self.metrics = Metrics(service)
        self.ready = False  # once a warm step has been made, until the service leaves
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.service.start()
        self._sweeper = asyncio.create_task(self._sweep())
        self.ready = True

    async def drain(self) -> None:
        """End the work that is there, as far as time allows; no more is taken."""
        self.ready = False
        if not await self.service.drain(self.config.drain_timeout_s):
            log.warning("requests are cancelled: they did not end within %g s", self.config.drain_timeout_s)

    async def close(self) -> None:
        """Stop, whatever is at work."""
        self.ready = False
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self.service.close()

    async def call(self, function: Callable[..., _Result], *args: object) -> _Result:
        """A blocking method of the sessions or their store. Raises ApiError."""
        try:
            return await self.service.call(function, *args)
        except RequestError as error:
            raise of_request(error) from None

    async def encode(self, text: str) -> list[int]:
        """Tokens of a text, at most as many as are allowed."""
        tokens = await asyncio.to_thread(self.tokenizer.encode, text)
        self.check_num_tokens(len(tokens))
        return tokens.tolist()

    def check_num_tokens(self, num_tokens: int) -> None:
        limit = self.config.max_prompt_tokens
        if num_tokens > limit:
            raise ApiError(400, "too_many_tokens", f"the text has {num_tokens} tokens; at most {limit} at a time")

    def max_tokens(self, asked: int | None, default: int = DEFAULT_TOKENS, name: str = "max_tokens") -> int:
        """How many tokens to write, at most; where the request does not say, as many as it may of the default."""
        limit = self.config.max_new_tokens
        if asked is None:
            return min(default, limit)
        if asked > limit:
            raise ApiError(400, "invalid_request", f"{name} is {asked}; it must be at most {limit}", name)
        return asked

    def stop_tokens(self, writing: Writing) -> tuple[int, ...]:
        """The token that ends a text, where there is one and the request does not ignore it."""
        eos = self.tokenizer.eos_id
        return () if eos is None or writing.ignore_eos else (eos,)

    async def begin(self, request: Request, http: HttpRequest) -> "Running":
        """Run a request; it has begun well when this returns. Raises ApiError."""
        begun = time.monotonic()
        try:
            stream = self.service.submit(request)
        except RequestError as error:
            raise of_request(error) from None
        except ClosedError:
            raise closed() from None
        except OverloadedError as error:
            raise ApiError(429, "overloaded", f"{error}; try again later") from None
        running = Running(self, stream, http, begun)
        try:
            await running.look()
        except BaseException:
            running.end()
            raise
        return running

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S * random.uniform(0.5, 1.5))
            try:
                await self.service.call(self.service.sessions.sweep)
            except Exception as error:  # a store raises what its library likes; the next look may go well
                log.warning("expired sessions could not be looked for: %s", type(error).__name__)


class Running:
    """A request at work. Iterate `events`, or await `result`; whatever happens, it is cancelled when that is left."""

    def __init__(self, front: Front, stream: Stream, http: HttpRequest, begun: float) -> None:
        self._front = front
        self._stream = stream
        self._begun = self._last_written = begun
        self._num_written = 0
        self._first: Event | None = None
        self._watch = asyncio.create_task(self._cancel_when_gone(http))

    async def look(self) -> None:
        """Wait for the first event, which tells whether the request can be served at all."""
        first = await self._next(self._left_s())
        assert not isinstance(first, Ping)
        self._first = first

    async def events(self) -> AsyncGenerator[Event | Ping, None]:
        """All events up to `Done`, with pings in long silences. Raises ApiError."""
        assert self._first is not None
        event: Event | Ping = self._first
        try:
            while True:
                yield event
                if isinstance(event, Done):
                    return
                event = await self._next(min(PING_S, self._left_s()))
        finally:
            self.end()

    async def result(self) -> Finished:
        """All that was written. Raises ApiError."""
        parts: list[str] = []
        async with contextlib.aclosing(self.events()) as events:
            async for event in events:
                if isinstance(event, Written):
                    parts.append(event.text)
                elif isinstance(event, Done):
                    return Finished("".join(parts), event)
        raise AssertionError("the events end with Done or an error")

    def end(self) -> None:
        self._watch.cancel()
        self._stream.cancel()

    async def _next(self, patience_s: float) -> Event | Ping:
        try:
            async with asyncio.timeout(patience_s):
                event = await anext(self._stream)
        except TimeoutError:
            if self._left_s() > 0:
                return Ping()
            limit = self._front.config.request_timeout_s
            raise ApiError(504, "timeout", f"the request took longer than the {limit:g} s that are allowed") from None
        except StopAsyncIteration:  # cancelled: by us when the client went, or as the server closes
            raise ApiError(503, "cancelled", "the request was cancelled; try again") from None
        if isinstance(event, Failed):
            raise of_request(RequestError(event.code, event.message))
        self._count(event)
        return event

    def _left_s(self) -> float:
        return max(0.0, self._begun + self._front.config.request_timeout_s - time.monotonic())

    def _count(self, event: Event) -> None:
        metrics, now = self._front.metrics, time.monotonic()
        if isinstance(event, Written) and event.tokens:
            seen = metrics.token_gap if self._num_written else metrics.first_token
            seen.observe(now - self._last_written)
            self._last_written = now
            self._num_written += len(event.tokens)
        elif isinstance(event, Done):
            metrics.done(event.usage)

    async def _cancel_when_gone(self, http: HttpRequest) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self._stream.cancel()


def sampling_of(writing: Writing, *, temperature: float) -> rmt_core.Sampling:
    """How to draw tokens; `temperature` where the request says none."""
    chosen = temperature if writing.temperature is None else writing.temperature
    return rmt_core.Sampling(chosen, 1.0 if writing.top_p is None else writing.top_p)


def seed_of(seed: int | None, request_id: str | None) -> int:
    """The seed; without one it is drawn, and equal for a request that is sent again."""
    if seed is not None:
        return seed
    if request_id is None:
        return secrets.randbits(63)
    return int.from_bytes(hashlib.sha256(request_id.encode("utf-8", "surrogatepass")).digest()[:8]) >> 1


def usage_of(usage: Usage) -> dict[str, object]:
    """As OpenAI's clients read it."""
    return {
        "prompt_tokens": usage.num_prompt,
        "completion_tokens": usage.num_written,
        "total_tokens": usage.num_prompt + usage.num_written,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached},
    }
