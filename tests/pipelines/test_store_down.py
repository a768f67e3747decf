"""A store of sessions that is down: requests say so, to be sent again, and go on when it is back."""

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pipelines.serving.store import Blob, Entry, Store, UnavailableError, open_store
from pipelines.serving.store_memory import MemoryStore

from .serving_http import Running, running, until
from .test_serving_sessions import serving_redis

_Result = TypeVar("_Result")
NAME = "a" * 64 + "/head"


class Switched(MemoryStore):
    """A store that can be down, and that can lose its answers."""

    def __init__(self) -> None:
        super().__init__()
        self.down = threading.Event()
        self.losing = threading.Event()  # what is put is there, but nobody is told
        self.num_refused = 0

    def _up(self, action: Callable[[], _Result]) -> _Result:
        if self.down.is_set():
            self.num_refused += 1
            raise UnavailableError("it is down")
        return action()

    def get(self, name: str) -> Blob | None:
        return self._up(lambda: super(Switched, self).get(name))

    def put(self, name: str, data: bytes, tag: str | None) -> str:
        new = self._up(lambda: super(Switched, self).put(name, data, tag))
        if self.losing.is_set():
            self.num_refused += 1
            raise UnavailableError("the answer is lost")
        return new

    def delete(self, name: str) -> bool:
        return self._up(lambda: super(Switched, self).delete(name))

    def entries(self, group: str | None = None) -> Iterator[Entry]:
        return self._up(lambda: super(Switched, self).entries(group))


@pytest.fixture
def store() -> Switched:
    return Switched()


@pytest.fixture
def server(store: Switched) -> Iterator[Running]:
    with running(store=store) as server:
        server.http.post("/v1/sessions", json={"id": "s"}).raise_for_status()
        yield server


ROUTES: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "/v1/sessions", {"id": "new"}),
    ("GET", "/v1/sessions/s", None),
    ("DELETE", "/v1/sessions/s", None),
    ("POST", "/v1/sessions/s/fork", {"id": "forked"}),
    ("POST", "/v1/sessions/s/append", {"text": "a"}),
    ("POST", "/v1/sessions/s/append", {"text": "a", "stream": True}),
    ("POST", "/v1/sessions/s/generate", {"prompt": "a", "max_tokens": 2}),
    ("POST", "/v1/summaries", {"text": "a"}),
    ("GET", "/v1/summaries/one", None),
    ("DELETE", "/v1/summaries/one", None),
]


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_every_route_says_to_try_again(
    server: Running, store: Switched, method: str, path: str, body: dict[str, Any] | None
) -> None:
    store.down.set()
    answer = server.http.request(method, path, json=body)
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "store_unavailable"
    store.down.clear()
    assert server.http.get("/v1/sessions/s").json()["version"] == 0


def test_what_needs_no_session_is_served(server: Running, store: Switched) -> None:
    store.down.set()
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 2}
    assert server.http.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize("fault", ["down", "losing"])
def test_a_request_that_could_not_be_kept_is_sent_again_and_counts_once(
    server: Running, store: Switched, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    body = {"prompt": "a long book " * 20, "max_tokens": 5, "request_id": "once"}
    expected = {**server.http.post("/v1/sessions/s/fork", json={"id": "other"}).json()}
    alone = server.http.post("/v1/sessions/other/generate", json=body).json()
    sessions = server.front.service.sessions
    commit = sessions.commit

    def failing(*args: Any) -> Any:
        getattr(store, fault).set()
        return commit(*args)

    monkeypatch.setattr(sessions, "commit", failing)
    assert server.http.post("/v1/sessions/s/generate", json=body).status_code == 503
    getattr(store, fault).clear()
    monkeypatch.undo()
    again = server.http.post("/v1/sessions/s/generate", json=body).json()
    assert again["text"] == alone["text"]
    assert again["version"] == expected["version"] + 1
    assert server.http.get("/v1/sessions/s").json()["version"] == again["version"]


@pytest.mark.parametrize("fault", ["down", "losing"])
def test_a_summary_goes_on_through_an_outage(server: Running, store: Switched, fault: str) -> None:
    body = {"text": "a long book " * 800, "max_tokens": 4}
    job = server.http.post("/v1/summaries", json=body).json()
    getattr(store, fault).set()
    until(lambda: store.num_refused >= 2, "a renewal of the job's record")
    getattr(store, fault).clear()
    path = f"/v1/summaries/{job['id']}"
    until(lambda: server.http.get(path).json()["status"] != "running", "the end of the summary", 60)
    assert server.http.get(path).json()["status"] == "succeeded"


# --- the real ones ----------------------------------------------------------------------------------


def refuses(store: Store) -> None:
    for action in (
        lambda: store.get(NAME),
        lambda: store.put(NAME, b"1", None),
        lambda: store.delete(NAME),
        lambda: list(store.entries()),
    ):
        with pytest.raises(UnavailableError) as caught:
            action()
        assert "\n" not in str(caught.value)


def test_a_redis_that_is_gone_is_unavailable(tmp_path: Path) -> None:
    with serving_redis(tmp_path) as (uri, process):
        store = open_store(uri)
        tag = store.put(NAME, b"1", None)
        assert store.get(NAME) == (b"1", tag)
        process.kill()
        process.wait()
        refuses(store)


def test_a_redis_that_is_full_is_unavailable(tmp_path: Path) -> None:
    with serving_redis(tmp_path, "--maxmemory", "1mb", "--maxmemory-policy", "noeviction") as (uri, _):
        store = open_store(uri)
        with pytest.raises(UnavailableError, match="Redis: .*memory"):
            _fill(store)


def _fill(store: Store) -> None:
    for n in range(1000):
        store.put(f"{n:064x}/head", bytes(100_000), None)


def test_a_put_that_is_sent_twice_to_redis_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_redis(tmp_path) as (uri, _):
        store: Any = open_store(uri)
        script = store._put

        def twice(**asked: Any) -> Any:  # as the client does where it has no answer
            script(**asked)
            return script(**asked)

        monkeypatch.setattr(store, "_put", twice)
        tag = store.put(NAME, b"1", None)
        assert store.put(NAME, b"2", tag) != tag
        assert store.get(NAME).data == b"2"


def test_a_directory_that_is_gone_is_unavailable(tmp_path: Path) -> None:
    root = tmp_path / "sessions"
    store = open_store(str(root))
    tag = store.put(NAME, b"1", None)
    assert store.get("b" * 64 + "/head") is None
    shutil.rmtree(root)
    refuses(store)
    root.mkdir()  # as an empty place to mount it at
    refuses(store)
    with pytest.raises(UnavailableError, match="the directory of sessions"):
        store.put(NAME, b"2", tag)


def test_a_full_disk_is_unavailable(tmp_path: Path) -> None:
    root = tmp_path / "sessions"
    root.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(root)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root's rights")
    try:
        store = open_store(str(root))
        store.put(NAME, b"1", None)
        with pytest.raises(UnavailableError):
            store.put("b" * 64 + "/head", bytes(200_000), None)
        assert [entry.name for entry in store.entries()] == [NAME]
    finally:
        subprocess.run(["umount", str(root)], check=True)
