"""The engine for many users at once: requests go in, streams of events come out, sessions live in a store.

    service = Service(engine, Sessions(store, engine.start(), fingerprint=engine.fingerprint))
    await service.start()
    stream = service.submit(Request(tokens=[...], max_new_tokens=20, session="a", tenant="b"))
    async for event in stream:
        ...
    await service.drain()
    await service.close()

All steps run in one thread of their own, all of the store's work in a few others, so the event loop stays free. The
requests of a session are served one after the other, in the order in which they were submitted.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from traceback import format_tb
from typing import NamedTuple, TypeVar

from .engine import Engine
from .readers import Position, Reader
from .records import Result, digest_of, hashed
from .requests import ClosedError, Done, Event, Failed, OverloadedError, Request, RequestError, Written
from .sessions import Loaded, Sessions, check_version
from .store import UnavailableError
from .text import TextStream

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_STORE_THREADS = 8
_BROKEN = "the engine failed; try again"


class Load(NamedTuple):
    """What a service has to do now."""

    num_requests: int  # accepted and not ended
    num_reading: int  # of them, in the engine
    num_writing: int  # of these, with a slot
    num_waiting_segments: int  # still to be read, with those that are written as soon as there is a slot
    prefix_bytes: int
    num_steps: int  # since the start


class Stream(AsyncIterator[Event]):
    """The events of one request, as they come. The last one is `Done` or `Failed`; a cancelled request has none."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Event:
        event = await self._events.get()
        if event is None:
            self._events.put_nowait(None)  # for whoever asks again
            raise StopAsyncIteration
        return event

    def cancel(self) -> None:
        """Stop the request; it leaves the engine at the next step. Of an ended one: nothing."""
        if self._task is not None:
            self._task.cancel()

    async def result(self) -> tuple[list[int], str, Done | Failed]:
        """All that was written, (tokens, text, last event). Raises CancelledError where the request was cancelled."""
        tokens: list[int] = []
        text: list[str] = []
        last: Done | Failed | None = None
        async for event in self:
            if isinstance(event, Written):
                tokens += event.tokens
                text.append(event.text)
            elif isinstance(event, Done | Failed):
                last = event
        if last is None:
            raise asyncio.CancelledError
        return tokens, "".join(text), last


class Service:
    """See the module's description."""

    def __init__(self, engine: Engine, sessions: Sessions, *, max_requests: int = 256) -> None:
        self.engine = engine
        self.sessions = sessions
        self.max_requests = max_requests  # accepted and not ended; a further one is refused
        self.healthy = True  # false once a step has failed as a whole: the process should be replaced
        self._streams: set[Stream] = set()
        self._inboxes: dict[int, asyncio.Queue[Event]] = {}
        self._turns: dict[tuple[str, str], _Turn] = {}
        self._closing = False  # nothing more is accepted
        self._stopping = False  # the driver ends when nothing is left to do
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        self._steps = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._io = ThreadPoolExecutor(_STORE_THREADS, thread_name_prefix="store")

    async def start(self) -> None:
        """Warm the engine up, then serve."""
        await asyncio.get_running_loop().run_in_executor(self._steps, self.engine.warm_up)
        self._driver = asyncio.create_task(self._drive())

    def submit(self, request: Request, position: Position | None = None) -> Stream:
        """Serve a request. Returns at once; what is wrong with a session comes as the stream's first event, `Failed`.

        A request without a session may begin at a `position`, where a session stands: that one is left as it is.

        Raises RequestError where the request makes no sense in itself, and OverloadedError where there is no room for
        it or the service is closing. Call it in the event loop's thread.
        """
        self.engine.check(request)
        if not self.is_open:
            raise ClosedError("the service is closing")
        if self.is_full:
            raise OverloadedError(f"{self.max_requests} requests are being served already")
        stream = Stream()
        self._streams.add(stream)
        self._idle.clear()
        stream._task = asyncio.create_task(self._serve(request, stream._events, position))
        stream._task.add_done_callback(lambda _: self._end(stream))
        return stream

    @property
    def is_open(self) -> bool:
        """Whether requests are accepted, as far as there is room."""
        return self.healthy and not self._closing

    @property
    def is_full(self) -> bool:
        """Whether a further request would be refused for want of room."""
        return len(self._streams) >= self.max_requests

    def load(self) -> Load:
        """How busy the service is: what autoscaling and metrics look at."""
        readers = list(self.engine.readers.values())
        return Load(
            len(self._streams),
            len(readers),
            len(self.engine.slots.holders),
            sum(_num_waiting(reader) for reader in readers),
            self.engine.prefixes.num_bytes,
            self.engine.num_steps,
        )

    async def call(self, function: Callable[..., _Result], *args: object) -> _Result:
        """Run a blocking method of `sessions` or their store in threads of their own. Raises what it raises, and
        RequestError where the store does not answer."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._io, function, *args)
        except UnavailableError as error:
            log.error("the session store does not answer: %s", error)
            raise RequestError("store_unavailable", "the session store does not answer; try again later") from error

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Accept nothing more and wait until all requests have ended; whether they have within the time."""
        self._closing = True
        if not self._streams:
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Cancel what is left and stop."""
        self._closing = True
        for stream in list(self._streams):
            stream.cancel()
        if self._streams:
            await self._idle.wait()
        self._stopping = True
        self._work.set()
        if self._driver is not None:
            await self._driver
        self._steps.shutdown()
        self._io.shutdown()

    def _end(self, stream: Stream) -> None:
        stream._events.put_nowait(None)
        self._streams.discard(stream)
        if not self._streams:
            self._idle.set()

    # --- one request --------------------------------------------------------------------------------

    async def _serve(self, request: Request, out: "asyncio.Queue[Event | None]", position: Position | None) -> None:
        try:
            if request.session is None:
                async for _, event in self._run(request, position):
                    out.put_nowait(event)
                return
            async with self._turn(request.tenant, request.session):
                await self._serve_session(request, request.session, out)
        except RequestError as error:
            out.put_nowait(Failed(error.code, str(error)))
        except Exception as error:  # the border of a request: a store raises what its library likes
            log.error("a request failed: %s\n%s", type(error).__name__, "".join(format_tb(error.__traceback__)))
            out.put_nowait(Failed("failed", f"the session could not be read or kept ({type(error).__name__})"))

    @contextlib.asynccontextmanager
    async def _turn(self, tenant: str, session: str) -> AsyncIterator[None]:
        """The session's requests one after the other: asyncio's locks let them in as they came."""
        turn = self._turns.setdefault((tenant, session), _Turn())
        turn.num_waiting += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.num_waiting -= 1
            if not turn.num_waiting:
                del self._turns[tenant, session]

    async def _serve_session(self, request: Request, session: str, out: "asyncio.Queue[Event | None]") -> None:
        loaded = await self.call(self.sessions.load, request.tenant, session)
        if (result := loaded.record.result_of(request)) is not None:
            for event in self._again(request, result):
                out.put_nowait(event)
            return
        check_version(loaded.record, request.expected_version)
        async for reader, event in self._run(request, loaded.record.position):
            if isinstance(event, Done):
                event = event._replace(version=loaded.record.version + 1)
                try:
                    await self._commit(loaded, reader, event)
                except RequestError as error:
                    if error.code != "version_conflict" or not await self._is_kept(request, session, reader):
                        raise
            out.put_nowait(event)

    async def _commit(self, loaded: Loaded, reader: Reader, done: Done) -> None:
        """Keep the session's next version. Begun, it is ended: who repeats a cancelled request must find its result."""
        request, result = reader.request, None
        if request.request_id is not None:
            result = Result(hashed(request.request_id), digest_of(request), tuple(reader.written), done)
        commit = asyncio.ensure_future(self.call(self.sessions.commit, loaded, reader.position(), result))
        try:
            await asyncio.shield(commit)
        except asyncio.CancelledError:
            await commit
            raise

    async def _is_kept(self, request: Request, session: str, reader: Reader) -> bool:
        """Whether the same request, sent to another replica meanwhile, has moved the session on by the same result."""
        there = (await self.call(self.sessions.load, request.tenant, session)).record.result_of(request)
        return there is not None and there.tokens == tuple(reader.written)

    def _again(self, request: Request, result: Result) -> Iterator[Event]:
        """The events of a request that was served before."""
        text = None if self.engine.tokenizer is None else TextStream(self.engine.tokenizer, request.stop_strings)
        for token in result.tokens:
            yield Written((token,), "" if text is None else text.add(token))
        if text is not None and (rest := text.finish()):
            yield Written((), rest)
        yield result.done

    # --- the engine ---------------------------------------------------------------------------------

    async def _run(self, request: Request, position: Position | None) -> AsyncIterator[tuple[Reader, Event]]:
        """A request through the engine; when this is left early, so is the engine."""
        if not self.healthy:  # since it was accepted
            raise RequestError("failed", _BROKEN)
        reader = self.engine.add(request, position)
        inbox = self._inboxes[reader.number] = asyncio.Queue()
        self._work.set()
        try:
            while True:
                event = await inbox.get()
                yield reader, event
                if isinstance(event, Done | Failed):
                    return
        finally:
            del self._inboxes[reader.number]
            if not reader.left:
                self.engine.cancel(reader)
                self._work.set()

    async def _drive(self) -> None:
        """Run steps while there is something to do."""
        loop = asyncio.get_running_loop()
        while True:
            self._work.clear()
            while self.engine.busy:
                try:
                    events = await loop.run_in_executor(self._steps, self.engine.step)
                except Exception as error:  # a fault of the engine itself, or of the device: nothing more can be served
                    self._break(error)
                    return
                for reader, event in events:
                    if (inbox := self._inboxes.get(reader.number)) is not None:
                        inbox.put_nowait(event)
            if self._stopping:
                return
            await self._work.wait()

    def _break(self, error: Exception) -> None:
        log.error("the engine failed: %s\n%s", type(error).__name__, "".join(format_tb(error.__traceback__)))
        self.healthy = False
        for inbox in self._inboxes.values():
            inbox.put_nowait(Failed("failed", _BROKEN))


def _num_waiting(reader: Reader) -> int:
    """Segments of a request that wait; the last one, which need not be full, does so while it has no slot."""
    full, rest = divmod(reader.num_open, reader.segment_len)
    return full + (rest > 0 and reader.slot is None and reader.writes)


class _Turn:
    """Who may work on a session."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.num_waiting = 0
