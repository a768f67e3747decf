"""Sessions and summaries over HTTP: texts in any chunks, forks, retries, disconnects."""

import asyncio
import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ray.exceptions import TaskCancelledError
from starlette.requests import ClientDisconnect
from starlette.types import Message

from pipelines.serving.store_memory import MemoryStore
from tests.pipelines.serving_http import NAME, SEGMENT_LEN, Running, make_app, make_config, running, until, written

TEXT = "Zürich — „Grüße“ 日本語, a text whose characters take from one byte to four: 🙂."
LONG_TEXT = "".join(f"{i} " for i in range(100_000))  # tens of thousands of segments, none of them like another


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


def new_session(server: Running) -> str:
    answer = server.http.post("/v1/sessions")
    assert answer.status_code == 201
    return answer.json()["id"]


def generated(server: Running, session: str, num_new: int = 9, **more: Any) -> dict[str, Any]:
    answer = server.http.post(f"/v1/sessions/{session}/generate", json={"max_tokens": num_new, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_text_may_come_in_chunks_cut_anywhere(server: Running, size: int) -> None:
    data, session = TEXT.encode(), new_session(server)
    chunks = (data[i : i + size] for i in range(0, len(data), size))
    answer = server.http.post(
        f"/v1/sessions/{session}/append", content=chunks, headers={"content-type": "text/plain; charset=utf-8"}
    )
    assert answer.json()["num_tokens"] == len(data)
    assert answer.json()["num_segments"] == len(data) // SEGMENT_LEN
    assert generated(server, session)["text"] == written(data, 9)


def test_appending_piece_by_piece_reads_the_same_text(server: Running) -> None:
    session = new_session(server)
    for part in (TEXT[:10], TEXT[10:11], TEXT[11:]):
        server.http.post(f"/v1/sessions/{session}/append", json={"text": part}).raise_for_status()
    first = generated(server, session, 4)
    second = generated(server, session, 5)
    assert first["text"] + second["text"] == written(TEXT.encode(), 9)
    assert second["version"] == 5
    assert second["finish_reason"] == "length"


def test_progress_streams_while_a_text_is_read(server: Running) -> None:
    session, text = new_session(server), f"No one has read this before: {TEXT}"
    answer = server.http.post(f"/v1/sessions/{session}/append", json={"text": text, "stream": True})
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n")[:-2]]
    assert [event["num_segments"] for event in events[:-1]] == list(range(1, len(text.encode()) // SEGMENT_LEN + 1))
    assert events[-1]["object"] == "session.append"
    assert events[-1]["version"] == 1
    streamed = server.http.post(f"/v1/sessions/{session}/generate", json={"max_tokens": 9, "stream": True})
    events = [json.loads(line.removeprefix("data: ")) for line in streamed.text.split("\n\n")[:-2]]
    told = "".join(event["text"] for event in events if event["object"] == "session.text")
    assert told == written(text.encode(), 9)


def test_a_fork_goes_its_own_way(server: Running) -> None:
    session = new_session(server)
    server.http.post(f"/v1/sessions/{session}/append", json={"text": TEXT}).raise_for_status()
    fork = server.http.post(f"/v1/sessions/{session}/fork", json={"id": "a-fork"})
    assert fork.status_code == 201
    assert generated(server, "a-fork", prompt="!")["text"] == written(f"{TEXT}!".encode(), 9)
    assert generated(server, session)["text"] == written(TEXT.encode(), 9)
    assert server.http.post(f"/v1/sessions/{session}/fork", json={"id": "a-fork"}).status_code == 409
    assert server.http.post(f"/v1/sessions/{session}/fork", json={"version": 1}).status_code == 400  # not kept


def test_a_fork_may_begin_at_a_version_that_is_kept() -> None:
    with running(kept_versions=1) as server:
        session = new_session(server)
        for _ in range(2):
            server.http.post(f"/v1/sessions/{session}/append", json={"text": TEXT}).raise_for_status()
        assert server.http.get(f"/v1/sessions/{session}").json()["kept_versions"] == [1]
        fork = server.http.post(f"/v1/sessions/{session}/fork", json={"id": "earlier", "version": 1}).json()
        assert (fork["num_tokens"], fork["version"]) == (len(TEXT.encode()), 0)
        assert generated(server, "earlier")["text"] == written(TEXT.encode(), 9)


def test_a_request_sent_again_has_its_first_result_also_without_a_seed(server: Running) -> None:
    session = new_session(server)
    body = {"prompt": TEXT, "max_tokens": 9, "temperature": 1.5, "request_id": "once"}
    first, second = (generated(server, session, **body) for _ in range(2))
    assert first == second
    assert server.http.get(f"/v1/sessions/{session}").json()["version"] == 1


def test_who_says_no_number_of_tokens_gets_what_the_server_allows() -> None:
    with running(max_new_tokens=5) as server:
        session, more = new_session(server), {"ignore_eos": True}
        chat = {"model": NAME, "messages": [{"role": "user", "content": "a"}]}
        answers = [
            server.http.post(f"/v1/sessions/{session}/generate", json={"prompt": TEXT, **more}),
            server.http.post("/v1/completions", json={"model": NAME, "prompt": TEXT, **more}),
            server.http.post("/v1/chat/completions", json={**chat, **more}),
        ]
        assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [5, 5, 5]
        job = server.http.post("/v1/summaries", json={"text": TEXT})
        assert finished(server, job.json()["id"])["progress"]["num_written"] <= 5


def test_another_version_than_expected_is_a_conflict(server: Running) -> None:
    session = new_session(server)
    path = f"/v1/sessions/{session}/append"
    assert server.http.post(path, json={"text": "a", "expected_version": 0}).status_code == 200
    answer = server.http.post(path, json={"text": "a", "expected_version": 0})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "version_conflict")
    raw = server.http.post(f"{path}?expected_version=0", content=b"a", headers={"content-type": "text/plain"})
    assert raw.status_code == 409


def test_a_deleted_session_is_gone(server: Running) -> None:
    session = new_session(server)
    assert server.http.delete(f"/v1/sessions/{session}").json()["deleted"] is True
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/generate"), ("POST", "/fork")):
        answer = server.http.request(method, f"/v1/sessions/{session}{path}", json={} if method == "POST" else None)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "session_not_found")


def test_a_client_that_goes_stops_its_request_and_leaves_its_session_as_it_was() -> None:
    with running(max_new_tokens=1_000_000) as server:
        session = new_session(server)
        body = {"prompt": "a", "max_tokens": 1_000_000, "temperature": 0, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}/v1/sessions/{session}/generate", json=body, timeout=60) as held:
            next(held.iter_lines())
        until(lambda: server.front.service.load().num_requests == 0, "the end of the streamed request")
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/sessions/{session}/generate", json={**body, "stream": False}, timeout=0.5)
        until(lambda: server.front.service.load().num_requests == 0, "the end of the plain request")
        until(lambda: not server.front.service.engine.slots.holders, "the slot's return")
        assert server.http.get(f"/v1/sessions/{session}").json()["version"] == 0


def test_a_half_sent_text_changes_nothing(server: Running) -> None:
    session = new_session(server)
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(
            f"POST /v1/sessions/{session}/append HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: text/plain\r\n"
            "Content-Length: 1000\r\n\r\nhalf of".encode()
        )
    until(lambda: server.front.service.load().num_requests == 0, "the end of the request")
    assert server.http.get(f"/v1/sessions/{session}").json()["version"] == 0


def test_a_session_survives_its_server() -> None:
    store = MemoryStore()
    with running(store=store) as server:
        server.http.post("/v1/sessions", json={"id": "kept"}).raise_for_status()
        server.http.post("/v1/sessions/kept/append", json={"text": TEXT}).raise_for_status()
    with running(store=store) as server:
        assert generated(server, "kept")["text"] == written(TEXT.encode(), 9)


def test_a_session_of_an_earlier_model_says_so_and_can_be_deleted() -> None:
    store = MemoryStore()
    with running(store=store, fingerprint="e" * 64) as server:
        server.http.post("/v1/sessions", json={"id": "old"}).raise_for_status()
    with running(store=store) as server:
        answers = [
            server.http.get("/v1/sessions/old"),
            server.http.post("/v1/sessions/old/append", json={"text": TEXT}),
            server.http.post("/v1/sessions/old/generate", json={"prompt": TEXT, "max_tokens": 1}),
            server.http.post("/v1/sessions/old/fork"),
            server.http.post("/v1/summaries", json={"session_id": "old"}),
        ]
        message = "the session belongs to another model; delete it"
        told = [(answer.status_code, *map(answer.json()["error"].get, ("code", "message"))) for answer in answers]
        assert told == [(409, "model_mismatch", message)] * len(answers)
        assert server.http.delete("/v1/sessions/old").status_code == 200
        assert server.http.get("/v1/sessions/old").status_code == 404


# --- summaries --------------------------------------------------------------------------------------


def finished(server: Running, job: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def ended() -> bool:
        found.update(server.http.get(f"/v1/summaries/{job}").json())
        return found["status"] != "running"

    until(ended, "the end of the summary")
    return found


def test_a_summary_is_what_the_model_writes_after_text_and_prompt(server: Running) -> None:
    begun = server.http.post("/v1/summaries", json={"text": TEXT, "prompt": " So: ", "max_tokens": 12})
    assert begun.status_code == 202
    assert begun.json()["status"] == "running"
    job = finished(server, begun.json()["id"])
    assert (job["status"], job["summary"]) == ("succeeded", written(f"{TEXT} So: ".encode(), 12))
    assert job["progress"] == {
        "num_tokens": len(TEXT.encode()) + 5,
        "num_read": len(TEXT.encode()) + 5,
        "num_written": 12,
    }
    assert server.http.delete(f"/v1/summaries/{job['id']}").status_code == 200
    assert server.http.get(f"/v1/summaries/{job['id']}").status_code == 404


def test_a_session_is_summarised_and_stays_as_it_is(server: Running) -> None:
    session = new_session(server)
    server.http.post(f"/v1/sessions/{session}/append", json={"text": TEXT}).raise_for_status()
    before = server.http.get(f"/v1/sessions/{session}").json()
    begun = server.http.post("/v1/summaries", json={"session_id": session, "prompt": " So: ", "max_tokens": 12}).json()
    assert finished(server, begun["id"])["summary"] == written(f"{TEXT} So: ".encode(), 12)
    assert server.http.get(f"/v1/sessions/{session}").json() == before
    names = [entry.name for entry in server.front.service.sessions.store.entries() if entry.name.endswith("/head")]
    assert len(names) == len(set(names))


def test_a_summary_is_cancelled_from_here_and_from_another_replica() -> None:
    store = MemoryStore()
    with running(store=store) as server, running(store=store) as other:
        for replica in (server, other):
            body = {"text": LONG_TEXT, "max_tokens": 1}
            job = server.http.post("/v1/summaries", json=body).json()["id"]
            assert replica.http.post(f"/v1/summaries/{job}/cancel").json()["status"] == "cancelled"
            until(lambda: server.front.service.load().num_requests == 0, "the end of the work")
            assert server.http.get(f"/v1/summaries/{job}").json()["status"] == "cancelled"


@pytest.mark.long
def test_a_server_that_leaves_ends_what_it_can_and_says_so() -> None:
    store, short = MemoryStore(), LONG_TEXT[:4000]
    with running(store=store, drain_timeout_s=60) as server:
        ended = server.http.post("/v1/summaries", json={"text": short, "prompt": "", "max_tokens": 3}).json()["id"]
    with running(store=store, drain_timeout_s=0.1) as server:
        late = server.http.post("/v1/summaries", json={"text": LONG_TEXT, "max_tokens": 1}).json()["id"]
    with running(store=store) as server:
        job = server.http.get(f"/v1/summaries/{ended}").json()
        assert (job["status"], job["summary"]) == ("succeeded", written(short.encode(), 3))
        job = server.http.get(f"/v1/summaries/{late}").json()
        assert (job["status"], job["error"]) == ("failed", "the server closed; send it again")


def test_many_clients_at_once_get_what_each_gets_alone(server: Running) -> None:
    texts = [f"{TEXT} {i * 'x'}" for i in range(24)]
    found: dict[str, str] = {}

    def ask(text: str) -> None:
        body = {"model": NAME, "prompt": text, "max_tokens": 9, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        found[text] = answer.json()["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {text: written(text.encode(), 9) for text in texts}


@pytest.mark.parametrize("gone", [ClientDisconnect(), TaskCancelledError()], ids=["starlette", "ray"])
def test_a_client_that_goes_before_its_body_has_come_is_no_failure(
    gone: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    app, front = make_app(make_config())
    sent = []

    async def receive() -> Message:
        raise gone

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"text/plain")]
    path = "/v1/sessions/s/append"
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert sent == []
    assert "failed" not in caplog.text
    assert re.findall(r'rmt_answers_total{.*/append",status="(\d+)"}', front.metrics.text().decode()) == ["0"]


def test_what_the_address_says_holds_for_json_too(server: Running) -> None:
    server.http.post("/v1/sessions", json={"id": "addressed"}).raise_for_status()
    asked = "/v1/sessions/addressed/append?request_id=one&expected_version=0"
    first = server.http.post(asked, json={"text": "abc"})
    assert first.status_code == 200
    assert server.http.post(asked, json={"text": "abc"}).json() == first.json()  # the first result, not a conflict
    assert server.http.get("/v1/sessions/addressed").json()["num_tokens"] == 3
    answer = server.http.post("/v1/sessions/addressed/append?expected_version=7", json={"text": "abc"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "version_conflict")
    body = {"text": "abc", "stream": None, "expected_version": 1}
    assert server.http.post("/v1/sessions/addressed/append?expected_version=7", json=body).status_code == 200


@pytest.mark.parametrize("name", [".", ".."])
def test_no_session_has_a_name_that_is_no_part_of_a_path(server: Running, name: str) -> None:
    answer = server.http.post("/v1/sessions", json={"id": name})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "id")


def test_a_server_that_leaves_or_is_full_says_so_at_once() -> None:
    with running(max_requests=1) as busy:
        stream = {"model": "tiny", "prompt": "a", "max_tokens": 4096, "ignore_eos": True, "stream": True}
        with busy.http.stream("POST", "/v1/completions", json=stream) as answer:
            lines = answer.iter_lines()
            next(lines)
            answers = [
                busy.http.post("/v1/summaries", json={"text": "a"}),
                busy.http.post("/v1/completions", json=stream),
            ]
            assert [each.status_code for each in answers] == [429, 429]
        busy.front.service.healthy = False
        for path, body in (("/v1/completions", stream), ("/v1/summaries", {"text": "a"})):
            answer = busy.http.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "closed"), path
            assert int(answer.headers["retry-after"]) > 0
        busy.front.service.healthy = True
