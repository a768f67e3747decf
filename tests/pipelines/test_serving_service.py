"""Sessions of many users at once: turns, retries, conflicts, cancellation, the end."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

import rmt_core
from pipelines.data.tokenise import ByteTokenizer
from pipelines.serving.engine import Engine, Settings
from pipelines.serving.requests import Done, Failed, OverloadedError, Progress, Request, RequestError, Written
from pipelines.serving.service import Service
from pipelines.serving.sessions import Limits, Sessions
from pipelines.serving.store import Store
from pipelines.serving.store_memory import MemoryStore
from tests.rmt_core.tiny import RMT, tiny_model

T = 5
MODEL = tiny_model(RMT, segment_len=T, vocab_size=257)
TEXT = list(b"a book that is longer than a few segments of five tokens")
WAIT_S = 60.0


@asynccontextmanager
async def serving(store: Store | None = None, *, max_requests: int = 64, **limits: Any) -> AsyncIterator[Service]:
    settings = Settings(server_key=b"key", num_slots=4, exact=False)  # in float64 rounding decides nothing
    engine = Engine(MODEL, settings, fingerprint="f", tokenizer=ByteTokenizer())
    sessions = Sessions(
        store if store is not None else MemoryStore(), engine.start(), fingerprint="f", limits=Limits(**limits)
    )
    service = Service(engine, sessions, max_requests=max_requests)
    await service.start()
    try:
        yield service
    finally:
        await service.close()
    assert not engine.busy
    assert not engine.slots.holders


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, WAIT_S))


def generated(prompt: list[int], num_new: int) -> list[int]:
    return rmt_core.generate(MODEL, [prompt], num_new).tokens[0]


def test_a_request_may_begin_where_a_session_stands_and_leaves_it() -> None:
    async def test() -> None:
        async with serving() as service:
            service.sessions.create("", "a")
            await service.submit(Request(TEXT, session="a")).result()
            before = service.sessions.load("", "a")
            info = service.sessions.info("", "a")
            tokens, _, _ = await service.submit(Request([10], 7), before.record.position).result()
            assert tokens == generated([*TEXT, 10], 7)
            assert service.sessions.info("", "a") == info

    run(test())


def test_what_was_accepted_before_the_engine_failed_is_told() -> None:
    async def test() -> None:
        async with serving() as service:
            stream = service.submit(Request(TEXT, 7))
            service.healthy = False
            _, _, last = await stream.result()
            assert last == Failed("failed", "the engine failed; try again")
            service.healthy = True

    run(test())


def test_events_come_in_order_and_end_with_the_usage() -> None:
    async def test() -> None:
        async with serving() as service:
            events = [event async for event in service.submit(Request(TEXT, 7))]
            num_read = len(TEXT) // T
            assert events[:num_read] == [Progress(i + 1, (i + 1) * T) for i in range(num_read)]
            written = [event for event in events if isinstance(event, Written)]
            assert [token for event in written for token in event.tokens] == generated(TEXT, 7)
            assert "".join(event.text for event in written) == ByteTokenizer().decode(generated(TEXT, 7))
            total = len(TEXT) + 7
            assert events[-1] == Done("length", (len(TEXT), 7, 0), total, total // T)

    run(test())


def test_a_session_goes_on_from_request_to_request_and_engine_to_engine() -> None:
    async def test() -> None:
        store, text = MemoryStore(), list(TEXT)
        async with serving(store) as service:
            await service.call(service.sessions.create, "t", "s")
            _, _, done = await service.submit(Request(TEXT, session="s", tenant="t")).result()
            assert isinstance(done, Done)
            assert (done.version, done.num_tokens) == (1, len(TEXT))
            tokens, _, _ = await service.submit(Request([], 3, session="s", tenant="t")).result()
            text += tokens
        async with serving(store) as service:
            more, _, done = await service.submit(Request([1, 2], 9, session="s", tenant="t")).result()
            assert isinstance(done, Done)
            assert done.version == 3
        assert tokens == generated(TEXT, 3)
        assert more == generated([*text, 1, 2], 9)

    run(test())


def test_requests_of_one_session_run_in_their_order_and_never_two_at_once() -> None:
    async def test() -> None:
        async with serving() as service:
            await service.call(service.sessions.create, "t", "s")
            streams = [service.submit(Request([65 + i] * 3, 2, session="s", tenant="t")) for i in range(8)]
            others = [service.submit(Request(TEXT, 5)) for _ in range(4)]
            most = 0
            ended = asyncio.gather(*(stream.result() for stream in streams + others))
            while not ended.done():
                most = max(most, sum(reader.request.session == "s" for reader in list(service.engine.readers.values())))
                await asyncio.sleep(0.001)
            assert most == 1
            text: list[int] = []
            for i, (tokens, _, done) in enumerate((await ended)[:8]):
                text += [65 + i] * 3
                assert tokens == generated(text, 2)
                text += tokens
                assert isinstance(done, Done)
                assert done.version == i + 1
            assert not service._turns

    run(test())


def test_a_request_repeated_by_its_id_is_answered_once_and_alike() -> None:
    async def test() -> None:
        store = MemoryStore()
        request = Request(TEXT, 6, session="s", tenant="t", request_id="r", expected_version=0, stop_strings=["\0\0"])
        async with serving(store) as service:
            await service.call(service.sessions.create, "t", "s")
            first, second = await asyncio.gather(*(service.submit(request).result() for _ in range(2)))
            assert first == second
        async with serving(store) as service:
            assert await service.submit(request).result() == first
            info = await service.call(service.sessions.info, "t", "s")
            assert (info.version, info.num_tokens) == (1, len(TEXT) + 6)
            other = Request(TEXT, 5, session="s", tenant="t", request_id="r")
            _, _, failed = await service.submit(other).result()
            assert isinstance(failed, Failed)
            assert failed.code == "invalid_request"

    run(test())


def test_what_is_wrong_with_a_session_comes_as_the_first_event() -> None:
    async def test() -> None:
        async with serving() as service:
            await service.call(service.sessions.create, "t", "s")
            for request, code in (
                (Request([1], 1, session="none", tenant="t"), "session_not_found"),
                (Request([1], 1, session="s", tenant="other"), "session_not_found"),
                (Request([1], 1, session="s", tenant="t", expected_version=3), "version_conflict"),
                (Request([], 1, session="s", tenant="t"), "invalid_request"),
            ):
                events = [event async for event in service.submit(request)]
                assert [event.code for event in events if isinstance(event, Failed)] == [code]
                assert len(events) == 1
            with pytest.raises(RequestError, match="max_new_tokens"):
                service.submit(Request([1], -1))

    run(test())


def test_a_session_changed_elsewhere_meanwhile_is_a_conflict() -> None:
    async def test() -> None:
        store = MemoryStore()
        async with serving(store) as service, serving(store) as other:
            await service.call(service.sessions.create, "t", "s")
            stream = service.submit(Request(TEXT, 30, session="s", tenant="t"))
            await anext(stream)
            _, _, done = await other.submit(Request([7], session="s", tenant="t")).result()
            assert isinstance(done, Done)
            _, _, failed = await stream.result()
            assert isinstance(failed, Failed)
            assert failed.code == "version_conflict"
            info = await service.call(service.sessions.info, "t", "s")
            assert (info.version, info.num_tokens) == (1, 1)

    run(test())


def test_a_cancelled_request_leaves_its_session_as_it_was_and_lets_the_next_one_in() -> None:
    async def test() -> None:
        async with serving() as service:
            await service.call(service.sessions.create, "t", "s")
            first = service.submit(Request(TEXT, 100_000, session="s", tenant="t"))
            second = service.submit(Request(TEXT, 3, session="s", tenant="t"))
            third = service.submit(Request([5], 3, session="s", tenant="t"))
            async for event in first:
                if isinstance(event, Written):
                    break
            third.cancel()
            first.cancel()
            tokens, _, done = await second.result()
            assert tokens == generated(TEXT, 3)
            assert isinstance(done, Done)
            assert done.version == 1
            for stream in (first, third):
                rest = [event async for event in stream]
                assert not any(isinstance(event, Done | Failed) for event in rest)
            assert not service.engine.busy

    run(test())


def test_a_commit_that_has_begun_is_ended_though_its_request_is_cancelled() -> None:
    class SlowStore(MemoryStore):
        def __init__(self) -> None:
            super().__init__()
            self.reached, self.go_on = threading.Event(), threading.Event()

        def put(self, name: str, data: bytes, tag: str | None) -> str:
            if tag is not None:
                self.reached.set()
                self.go_on.wait(WAIT_S)
            return super().put(name, data, tag)

    async def test() -> None:
        store = SlowStore()
        async with serving(store) as service:
            await service.call(service.sessions.create, "t", "s")
            request = Request([1, 2], 3, session="s", tenant="t", request_id="r")
            first = service.submit(request)
            await service.call(store.reached.wait, WAIT_S)
            first.cancel()
            again = service.submit(request)
            store.go_on.set()
            tokens, _, done = await again.result()
            assert tokens == generated([1, 2], 3)
            assert isinstance(done, Done)
            assert done.version == 1
            assert (await service.call(service.sessions.info, "t", "s")).num_tokens == 5

    run(test())


def test_too_many_requests_are_refused_until_some_have_ended() -> None:
    async def test() -> None:
        async with serving(max_requests=2) as service:
            streams = [service.submit(Request(TEXT, 2)) for _ in range(2)]
            with pytest.raises(OverloadedError, match="2 requests are being served"):
                service.submit(Request(TEXT, 2))
            assert service.load().num_requests == 2
            await asyncio.gather(*(stream.result() for stream in streams))
            await service.submit(Request(TEXT, 2)).result()
            assert service.load()[:4] == (0, 0, 0, 0)

    run(test())


def test_draining_ends_what_was_begun_and_takes_nothing_new() -> None:
    async def test() -> None:
        async with serving() as service:
            stream = service.submit(Request(TEXT, 20))
            drained = asyncio.create_task(service.drain())
            await asyncio.sleep(0)
            with pytest.raises(OverloadedError, match="closing"):
                service.submit(Request(TEXT, 1))
            tokens, _, _ = await stream.result()
            assert tokens == generated(TEXT, 20)
            assert await drained
        async with serving() as service:
            endless = service.submit(Request(TEXT, 100_000))
            assert not await service.drain(0.01)
            await service.close()
            assert not any(isinstance(event, Done | Failed) for event in [event async for event in endless])

    run(test())


def test_when_a_step_fails_as_a_whole_all_requests_fail_and_the_service_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        async with serving() as service:

            def fail() -> None:
                service.engine._waiting.clear()
                raise RuntimeError("the device is gone")

            monkeypatch.setattr(service.engine, "step", fail)
            _, _, failed = await service.submit(Request(TEXT, 2)).result()
            assert isinstance(failed, Failed)
            assert failed.code == "failed"
            assert not service.healthy
            with pytest.raises(OverloadedError):
                service.submit(Request(TEXT, 2))

    run(test())


def test_a_store_that_fails_fails_the_request_without_saying_how(caplog: pytest.LogCaptureFixture) -> None:
    secret = "redis://:pass" + "word@host"

    class BrokenStore(MemoryStore):
        def put(self, name: str, data: bytes, tag: str | None) -> str:
            if tag is not None:
                raise OSError(secret)
            return super().put(name, data, tag)

    async def test() -> None:
        async with serving(BrokenStore()) as service:
            await service.call(service.sessions.create, "t", "s")
            _, _, failed = await service.submit(Request(TEXT, 2, session="s", tenant="t")).result()
            assert failed == Failed("failed", "the session could not be read or kept (OSError)")

    run(test())
    assert secret not in caplog.text
    assert torch.is_grad_enabled()


def test_a_request_that_another_replica_has_served_meanwhile_is_no_conflict() -> None:
    async def test() -> None:
        store = MemoryStore()
        async with serving(store) as one, serving(store) as other:
            one.sessions.create("", "a")
            request = Request(TEXT, 3, session="a", request_id="once")
            commit = one.sessions.commit

            def late(*args: Any) -> Any:
                return commit(*args) if other_is_done.wait(WAIT_S) else None

            other_is_done = threading.Event()
            one.sessions.commit = late  # type: ignore[method-assign]
            stream = one.submit(request)
            expected = await other.submit(request).result()
            other_is_done.set()
            assert await stream.result() == expected
            assert one.sessions.info("", "a").version == 1
            other_is_done.clear()
            stream = one.submit(Request(TEXT, 3, session="a", request_id="another"))
            await other.submit(Request([1], session="a")).result()
            other_is_done.set()
            assert (await stream.result())[2].code == "version_conflict"  # type: ignore[union-attr]

    run(test())


def test_what_waits_for_a_slot_is_counted() -> None:
    engine = Engine(MODEL, Settings(server_key=b"key", num_slots=1, exact=False), fingerprint="f")
    service = Service(engine, Sessions(MemoryStore(), engine.start(), fingerprint="f"))
    for _ in range(3):
        engine.add(Request(TEXT[: T + 2], 4))
    engine.step()  # reads the full segment of each
    assert service.load().num_waiting_segments == 3
    engine.step()
    assert service.load().num_waiting_segments == 2
    while engine.busy:
        engine.step()
    assert service.load().num_waiting_segments == 0
