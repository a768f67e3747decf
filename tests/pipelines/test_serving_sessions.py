"""Sessions in every kind of store: one suite for all."""

import contextlib
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import InputError
from pipelines.serving import records
from pipelines.serving.readers import Position
from pipelines.serving.records import Record, Result, digest_of, hashed
from pipelines.serving.requests import Done, Request, RequestError, Usage
from pipelines.serving.sessions import Limits, Sessions
from pipelines.serving.store import ConflictError, Entry, Store, UnavailableError, open_store
from pipelines.serving.store_memory import MemoryStore
from tests.rmt_core.tiny import same_states

KINDS = ("memory", "directory", "s3", "redis")
MANY = 8


@contextlib.contextmanager
def serving_redis(directory: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A Redis server of this run's own, on loopback: its URI and its process."""
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("redis-server is not installed; Debian has it in the package of this name")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"redis://127.0.0.1:{port}/0", process
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="session")
def redis_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_redis(tmp_path_factory.mktemp("redis")) as (uri, _):
        yield uri


@pytest.fixture(params=KINDS)
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store that is empty."""
    if request.param == "memory":
        return "memory:"
    if request.param == "directory":
        return str(tmp_path / "sessions")
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"
    import redis

    found: str = request.getfixturevalue("redis_uri")
    redis.Redis.from_url(found).flushall()
    return found


@pytest.fixture
def store(uri: str) -> Store:
    return open_store(uri)


class Clock:
    """Real time, moved on by hand."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


def position(seed: int = 0, num_tokens: int = 0) -> Position:
    generator = torch.Generator().manual_seed(seed)
    state = {"memory": torch.randn(1, 3, 4, generator=generator), "count": torch.tensor([seed])}
    open_tokens = tuple(range(num_tokens % 5))
    hidden = torch.randn(1, 4, generator=generator) if num_tokens and not open_tokens else None
    return Position(state, open_tokens, hidden, num_tokens, num_tokens // 5, bytes(range(32)) if num_tokens else None)


def same(a: Position, b: Position) -> bool:
    return (
        a[1:2] + a[3:] == b[1:2] + b[3:]
        and same_states(a.state, b.state)
        and (a.hidden is None) == (b.hidden is None)
        and (a.hidden is None or b.hidden is None or torch.equal(a.hidden, b.hidden))
    )


def sessions_of(store: Store, **limits: Any) -> Sessions:
    limits = {"kept_versions": 4, **limits}
    return Sessions(store, position(), fingerprint="model", limits=Limits(**limits), clock=Clock())


def refused(code: str, function: Callable[..., object], *args: object) -> str:
    with pytest.raises(RequestError) as caught:
        function(*args)
    assert caught.value.code == code
    return str(caught.value)


# Stores


def test_a_name_is_replaced_only_by_who_knows_its_content(store: Store) -> None:
    assert store.get("aa/head") is None
    first = store.put("aa/head", b"1", None)
    with pytest.raises(ConflictError):
        store.put("aa/head", b"2", None)
    second = store.put("aa/head", b"2", first)
    with pytest.raises(ConflictError):
        store.put("aa/head", b"3", first)
    blob = store.get("aa/head")
    assert blob == (b"2", second)
    assert store.delete("aa/head")
    with pytest.raises(ConflictError):
        store.put("aa/head", b"3", second)
    assert store.get("aa/head") is None


def test_names_are_listed_by_group_and_deleted_once(store: Store) -> None:
    before = time.time()
    data = bytes(range(256)) * 40
    for name in ("aa/head", "aa/00000001", "ab/head", "cc/head"):
        store.put(name, data, None)
    entries = list(store.entries())
    assert sorted(entry.name for entry in entries) == ["aa/00000001", "aa/head", "ab/head", "cc/head"]
    assert {entry.num_bytes for entry in entries} == {len(data)}
    assert all(before - 2 <= entry.modified_s <= time.time() + 2 for entry in entries)
    assert sorted(entry.name for entry in store.entries("aa")) == ["aa/00000001", "aa/head"]
    assert store.delete("aa/head")
    assert not store.delete("aa/head")
    assert sorted(entry.name for entry in store.entries("aa")) == ["aa/00000001"]
    blob = store.get("ab/head")
    assert blob is not None
    assert blob.data == data


def test_of_many_who_replace_at_once_one_succeeds(uri: str, store: Store) -> None:
    tag = store.put("aa/head", b"0", None)
    stores = [store] * MANY if uri == "memory:" else [open_store(uri) for _ in range(MANY)]
    barrier = threading.Barrier(MANY)
    won: list[int] = []

    def replace(i: int) -> None:
        barrier.wait()
        try:
            stores[i].put("aa/head", f"{i + 1}".encode(), tag)
        except ConflictError:
            return
        won.append(i)

    threads = [threading.Thread(target=replace, args=(i,)) for i in range(MANY)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    blob = store.get("aa/head")
    assert blob is not None
    assert blob.data == f"{won[0] + 1}".encode()


# Sessions


def test_a_session_is_what_was_committed(store: Store, uri: str) -> None:
    sessions = sessions_of(store)
    assert sessions.create("tenant", "a").version == 0
    loaded = sessions.load("tenant", "a")
    assert same(loaded.record.position, position())
    info = sessions.commit(loaded, position(1, 12))
    assert info[:3] == (1, 12, 2)
    again = sessions_of(store if uri == "memory:" else open_store(uri)).load("tenant", "a")
    assert same(again.record.position, position(1, 12))
    assert again.record.version == 1


def test_of_two_commits_on_one_version_the_second_changes_nothing(store: Store) -> None:
    sessions = sessions_of(store)
    sessions.create("tenant", "a")
    first, second = (sessions.load("tenant", "a") for _ in range(2))
    sessions.commit(first, position(1, 5))
    refused("version_conflict", sessions.commit, second, position(2, 6))
    assert same(sessions.load("tenant", "a").record.position, position(1, 5))
    refused("version_conflict", sessions.commit, second, position(2, 6))
    sessions.commit(sessions.load("tenant", "a"), position(3, 7))
    assert sessions.info("tenant", "a").version == 2


def test_a_session_is_nobody_elses(store: Store) -> None:
    sessions = sessions_of(store)
    sessions.create("tenant", "a")
    unknown = refused("session_not_found", sessions.load, "tenant", "b")
    for tenant, session in (("other", "a"), ("tenan", "t a"), ("", "tenant a"), ("tenant a", "")):
        assert refused("session_not_found", sessions.load, tenant, session) == unknown
        assert refused("session_not_found", sessions.delete, tenant, session) == unknown
        assert refused("session_not_found", sessions.fork, tenant, session, "c") == unknown
    refused("session_exists", sessions.create, "tenant", "a")


@pytest.mark.parametrize("session", ["../../etc/passwd", "a/b", "\0", "\ud800", "x" * 10_000, "", ".", "%2e", "*", "é"])
def test_any_id_names_a_session_and_none_becomes_a_path(store: Store, session: str) -> None:
    sessions = sessions_of(store)
    sessions.create("../t", session)
    sessions.commit(sessions.load("../t", session), position(1, 5))
    names = [entry.name for entry in store.entries()]
    assert len(names) == 2
    assert all(set(name) <= set("0123456789abcdef/head") for name in names)
    sessions.delete("../t", session)
    assert list(store.entries()) == []


def grown(sessions: Sessions, num_versions: int) -> None:
    sessions.create("tenant", "a")
    for i in range(1, num_versions + 1):
        sessions.commit(sessions.load("tenant", "a"), position(i, 3 * i))


def test_a_session_returns_to_any_kept_version_and_back(store: Store) -> None:
    sessions = sessions_of(store, kept_versions=3)
    grown(sessions, 5)
    assert [tuple(kept) for kept in sessions.info("tenant", "a").kept] == [(2, 6, 1), (3, 9, 1), (4, 12, 2)]
    assert len(list(store.entries())) == 4
    assert "those that are: [2, 3, 4]" in refused("invalid_request", sessions.rewind, "tenant", "a", 1)
    refused("version_conflict", sessions.rewind, "tenant", "a", 2, 4)
    assert sessions.rewind("tenant", "a", 2, 5).version == 6
    assert same(sessions.load("tenant", "a").record.position, position(2, 6))
    assert sessions.rewind("tenant", "a", 5).version == 7
    assert same(sessions.load("tenant", "a").record.position, position(5, 15))


def test_without_kept_versions_there_is_one_record(store: Store) -> None:
    sessions = sessions_of(store, kept_versions=0)
    grown(sessions, 3)
    assert sessions.info("tenant", "a").kept == ()
    assert len(list(store.entries())) == 1


def test_a_fork_goes_its_own_way(store: Store) -> None:
    sessions = sessions_of(store)
    grown(sessions, 2)
    sessions.fork("tenant", "a", "b")
    sessions.fork("tenant", "a", "c", 1)
    refused("session_exists", sessions.fork, "tenant", "a", "b")
    sessions.commit(sessions.load("tenant", "b"), position(9, 20))
    assert same(sessions.load("tenant", "a").record.position, position(2, 6))
    assert same(sessions.load("tenant", "b").record.position, position(9, 20))
    assert same(sessions.load("tenant", "c").record.position, position(1, 3))
    sessions.delete("tenant", "a")
    assert same(sessions.load("tenant", "c").record.position, position(1, 3))


def test_an_exported_session_goes_on_elsewhere(store: Store) -> None:
    sessions = sessions_of(store)
    grown(sessions, 2)
    data = sessions.export("tenant", "a")
    assert sessions.load("tenant", "a").record.session.encode() not in data
    elsewhere = sessions_of(open_store("memory:"))
    assert elsewhere.adopt("other", "x", data)[:2] == (0, 6)
    moved = elsewhere.load("other", "x").record.position
    assert same(moved, position(2, 6)._replace(chain=None))  # another's prefixes are not to be found by it
    refused("session_exists", elsewhere.adopt, "other", "x", data)
    assert elsewhere.adopt("other", "y", sessions.export("tenant", "a", 1)).num_tokens == 3


def test_what_cannot_be_imported_is_refused(store: Store) -> None:
    sessions = sessions_of(store)
    grown(sessions, 1)
    data = sessions.export("tenant", "a")
    foreign = Sessions(open_store("memory:"), position(), fingerprint="another")
    assert "belongs to model" in refused("invalid_request", foreign.adopt, "t", "x", data)
    for at in range(0, len(data), max(1, len(data) // 50)):
        altered = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        refused("invalid_request", sessions.adopt, "t", "x", altered)
    for part in (b"", data[:-1], data[:100], b"\xff" * 100):
        refused("invalid_request", sessions.adopt, "t", "x", part)
    other = Sessions(open_store("memory:"), position()._replace(state=torch.zeros(1, 2)), fingerprint="model")
    assert "another shape" in refused("invalid_request", other.adopt, "t", "x", data)
    refused("session_not_found", sessions.load, "t", "x")


def test_a_damaged_or_swapped_record_is_never_served(store: Store) -> None:
    sessions = sessions_of(store, kept_versions=0)
    sessions.create("tenant", "a")
    sessions.create("tenant", "b")
    first, second = (sessions.load("tenant", session) for session in "ab")
    store.put(f"{first.record.session}/head", second.blob.data, first.blob.tag)
    assert "another session's" in refused("failed", sessions.load, "tenant", "a")
    store.put(f"{second.record.session}/head", second.blob.data[:-1] + b"!", second.blob.tag)
    assert "altered" in refused("failed", sessions.load, "tenant", "b")


def test_another_models_session_is_refused_expires_and_can_be_deleted(store: Store) -> None:
    grown(sessions_of(store), 1)
    clock = Clock()
    later = Sessions(store, position(), fingerprint="another", limits=Limits(ttl_s=100), clock=clock)
    for function in (later.load, later.info, later.export):
        assert "delete it" in refused("model_mismatch", function, "tenant", "a")
    refused("model_mismatch", later.fork, "tenant", "a", "b")
    later.delete("tenant", "a")
    assert list(store.entries()) == []
    grown(sessions_of(store), 1)
    clock.ahead_s = 150
    refused("session_not_found", later.load, "tenant", "a")
    assert list(store.entries()) == []


def test_a_damaged_session_can_be_deleted(store: Store) -> None:
    sessions = sessions_of(store)
    sessions.create("tenant", "a")
    loaded = sessions.load("tenant", "a")
    store.put(f"{loaded.record.session}/head", b"damaged", loaded.blob.tag)
    refused("failed", sessions.load, "tenant", "a")
    sessions.delete("tenant", "a")
    assert list(store.entries()) == []


def test_sessions_expire(store: Store) -> None:
    sessions = sessions_of(store, ttl_s=100)
    clock: Any = sessions.clock
    grown(sessions, 2)
    sessions.create("tenant", "b")
    clock.ahead_s = 90
    sessions.commit(sessions.load("tenant", "b"), position(1, 5))
    assert sessions.sweep() == 0
    clock.ahead_s = 150
    refused("session_not_found", sessions.load, "tenant", "a")
    assert sessions.info("tenant", "b").version == 1
    sessions.create("tenant", "a")
    clock.ahead_s = 500
    assert sessions.sweep() == 2
    assert list(store.entries()) == []


def test_an_id_is_free_again_when_its_session_has_expired(store: Store) -> None:
    sessions = sessions_of(store, ttl_s=100)
    sessions.create("tenant", "a")
    refused("session_exists", sessions.create, "tenant", "a")
    clock: Any = sessions.clock
    clock.ahead_s = 150
    assert sessions.create("tenant", "a").version == 0
    refused("session_exists", sessions.create, "tenant", "a")


def test_what_a_killed_process_left_is_swept(store: Store) -> None:
    sessions = sessions_of(store)
    clock: Any = sessions.clock
    grown(sessions, 1)
    key = sessions.load("tenant", "a").record.session
    store.put(f"{'f' * 64}/00000001", b"a version whose session was deleted meanwhile", None)
    store.put(f"{key}/00000001", b"a version that was kept, before the commit was killed", None)
    assert sessions.sweep() == 0
    assert len(list(store.entries())) == 4
    clock.ahead_s = 10_000
    assert sessions.sweep() == 0
    assert len(list(store.entries())) == 3
    sessions.commit(sessions.load("tenant", "a"), position(2, 6))
    assert sessions.rewind("tenant", "a", 1).version == 3
    assert same(sessions.load("tenant", "a").record.position, position(1, 3))


@pytest.mark.parametrize("uri", ["directory", "s3"], indirect=True)
def test_what_lies_beside_the_sessions_is_neither_swept_nor_counted(store: Store, uri: str) -> None:
    key = "a" * 64
    names = ["gpt2/config.json", "checkpoints/step-8/head", "ab/head", f"{key}/notes", f"{key}/0000001", f"x{key}/head"]
    if uri.startswith("s3://"):
        import boto3

        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        for name in names:
            boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=b"a model")
    else:
        for name in names:  # where entries would find them
            path = Path(uri) / name[:2] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"a model")
    sessions = sessions_of(store, max_sessions=1, ttl_s=100)
    clock: Any = sessions.clock
    sessions.create("tenant", "a")
    clock.ahead_s = 10_000
    assert sessions.sweep() == 1
    assert {name for name in names if store.get(name) == (b"a model", getattr(store.get(name), "tag", ""))} == set(
        names
    )
    sessions.create("tenant", "b")  # there is room for it


def test_a_full_store_takes_no_session_until_there_is_room(store: Store) -> None:
    sessions = sessions_of(store, max_sessions=2, ttl_s=1000)
    clock: Any = sessions.clock
    sessions.create("tenant", "a")
    sessions.fork("tenant", "a", "b")
    assert "no room for a further session" in refused("store_full", sessions.create, "tenant", "c")
    refused("store_full", sessions.fork, "tenant", "a", "c")
    sessions.commit(sessions.load("tenant", "a"), position(1, 5))  # those that there are go on
    sessions.delete("tenant", "b")
    sessions.create("tenant", "c")
    refused("store_full", sessions.create, "tenant", "d")
    clock.ahead_s = 2000
    sessions.create("tenant", "d")  # the others have expired
    assert len(list(store.entries())) == 1


def test_of_many_that_are_made_at_once_as_many_succeed_as_there_is_room_for() -> None:
    sessions = sessions_of(open_store("memory:"), max_sessions=3)
    barrier = threading.Barrier(MANY)
    made: list[int] = []

    def make(i: int) -> None:
        barrier.wait()
        for n in range(20):
            with contextlib.suppress(RequestError):  # the store is full
                sessions.create("tenant", f"{i} {n}")
                made.append(i)
                assert sum(entry.name.endswith("/head") for entry in sessions.store.entries()) <= 3
                sessions.delete("tenant", f"{i} {n}")

    with ThreadPoolExecutor(MANY) as threads:
        list(threads.map(make, range(MANY)))
    assert made
    clock: Any = sessions.clock
    clock.ahead_s = 60  # what was uncertain is counted again
    for n in range(3):
        sessions.create("tenant", f"{n}")
    refused("store_full", sessions.create, "tenant", "3")


def test_the_store_is_not_counted_again_for_each_change() -> None:
    class Counting(MemoryStore):
        num_scans = 0

        def entries(self, group: str | None = None) -> Iterator[Entry]:
            self.num_scans += group is None
            return super().entries(group)

    store = Counting()
    sessions = sessions_of(store, max_sessions=1)
    for _ in range(5):
        sessions.create("tenant", "a")
        refused("store_full", sessions.create, "tenant", "b")
        sessions.delete("tenant", "a")
    assert store.num_scans == 3  # one, and when there was no room a sweep and another


def test_bytes_are_limited_too(store: Store) -> None:
    sessions = sessions_of(store)
    sessions.create("tenant", "a")
    size = sessions.info("tenant", "a").num_bytes
    limited = sessions_of(store, max_bytes=size + size // 2)  # records differ by digits of their times
    limited.create("tenant", "b")
    refused("store_full", limited.create, "tenant", "c")


# Results and records


def result_of(request: Request, tokens: tuple[int, ...]) -> Result:
    assert request.request_id is not None
    done = Done("stop", Usage(len(request.tokens), len(tokens), 3), 20, 4, 1)
    return Result(hashed(request.request_id), digest_of(request), tokens, done)


def test_the_last_results_are_found_by_their_request(store: Store) -> None:
    sessions = sessions_of(store)
    sessions.create("tenant", "a")
    requests = [Request([i], 5, request_id=f"id {i}") for i in range(3)]
    results = [result_of(request, tuple(range(i))) for i, request in enumerate(requests)]
    for result in results:
        sessions.commit(sessions.load("tenant", "a"), position(1, 5), result)
    sessions.commit(sessions.load("tenant", "a"), position(1, 5))  # of a request without an id
    record = sessions.load("tenant", "a").record
    assert [record.result_of(request) for request in requests] == [None, *results[1:]]
    assert record.result_of(Request([1], 5)) is None
    assert record.result_of(Request([1], 5, request_id="new")) is None
    with pytest.raises(RequestError, match="was used for another request"):
        record.result_of(Request([1], 6, request_id="id 1"))


def test_a_records_overhead_is_small() -> None:
    """At most 5 % beside the state, its open tokens and results: 16 memory tokens of width 576."""
    state = torch.randn(1, 16, 576)
    results = tuple(
        Result("a" * 32, "b" * 32, tuple(range(64)), Done("stop", Usage(1, 64, 0), 9, 9, 9)) for _ in range(2)
    )
    at = Position(state, tuple(range(255)), None, 10**6 + 255, 10**6 // 256, bytes(32))
    kept = tuple(records.Boundary(i, 10**6, 10**4) for i in range(4))
    data = records.to_bytes(Record("c" * 64, 7, at, 1.7e9, results, kept), "d" * 64)
    assert len(data) - state.nbytes - 4 * 255 <= 0.05 * state.nbytes


@pytest.mark.s3
def test_an_s3_that_knows_no_conditions_is_refused(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    client = boto3.client

    def careless(*arguments: Any, **settings: Any) -> Any:
        made = client(*arguments, **settings)
        put = made.put_object
        made.put_object = lambda IfNoneMatch="", **rest: put(**rest)
        return made

    monkeypatch.setattr(boto3, "client", careless)
    with pytest.raises(InputError, match="knows no conditional writes"):
        open_store(f"{s3_bucket}/{uuid.uuid4().hex}")


@pytest.mark.s3
def test_an_s3_bucket_that_is_not_there_is_one_line(s3_bucket: str) -> None:
    with pytest.raises(InputError, match="cannot be written to: .*there is no bucket no-such-bucket-anywhere"):
        open_store("s3://no-such-bucket-anywhere/x")


@pytest.mark.parametrize("wrong", ["file:///tmp/x", "http://host/x", "s3://"])
def test_a_store_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(InputError, match="session store"):
        open_store(wrong)


def test_a_redis_that_is_not_there_is_one_line_without_its_password() -> None:
    with pytest.raises(InputError, match="cannot be reached") as caught:
        open_store("redis://:secret@127.0.0.1:1/0")
    assert "secret" not in str(caught.value)


def test_a_session_that_is_used_while_it_is_swept_stays() -> None:
    store = MemoryStore()
    sessions = sessions_of(store, ttl_s=100.0)
    sessions.create("t", "a")
    sessions.create("t", "b")
    sessions.clock.ahead_s = 101.0  # type: ignore[attr-defined]
    entries, name = store.entries, next(entry.name for entry in store.entries())

    def used(group: str | None = None) -> Iterator[Entry]:
        found = list(entries(group))
        if group is not None and name.startswith(group):
            found = [entry._replace(modified_s=entry.modified_s + 50) for entry in found]
        return iter(found)

    store.entries = used  # type: ignore[method-assign]
    assert sessions.sweep() == 1
    assert [entry.name for entry in entries()] == [name]


def test_a_commit_is_made_though_an_earlier_version_cannot_be_deleted(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    sessions = sessions_of(store, kept_versions=1)
    sessions.create("t", "a")
    sessions.commit(sessions.load("t", "a"), position(1, 3))

    def down(name: str) -> bool:
        raise UnavailableError("it is down")

    store.delete = down  # type: ignore[method-assign]
    assert sessions.commit(sessions.load("t", "a"), position(2, 6)).version == 2
    assert sessions.info("t", "a").version == 2
    assert "could not be deleted: it is down" in caplog.text


def test_without_kept_versions_nothing_is_deleted() -> None:
    store = MemoryStore()
    sessions = sessions_of(store, kept_versions=0)
    sessions.create("t", "a")
    store.delete = lambda name: pytest.fail(name)  # type: ignore[method-assign]
    assert sessions.commit(sessions.load("t", "a"), position(1, 3)).version == 1
