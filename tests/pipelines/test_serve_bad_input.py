"""Whatever is sent, the answer is a 4xx with one clear line, and memory stays flat."""

import contextlib
import gc
import json
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil
import pydantic
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import one_of

from pipelines.serving.openai_schema import ChatRequest, CompletionRequest
from tests.pipelines.serving_http import NAME, Running, running, until

COMPLETION = {"model": NAME, "prompt": "a", "max_tokens": 1}
JSON = {"content-type": "application/json"}
NUM_EXAMPLES = 12  # of each operation


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_body_bytes=2**20, max_append_bytes=2**21, max_prompt_tokens=2**16, body_timeout_s=1.0) as server:
        server.http.post("/v1/sessions", json={"id": "s"}).raise_for_status()
        yield server


def refused(server: Running, path: str, statuses: tuple[int, ...] = (400,), **request: Any) -> dict[str, Any]:
    answer = server.http.post(path, **request)
    assert answer.status_code in statuses, (answer.status_code, answer.text[:500])
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert error["message"]
    assert "\n" not in error["message"]
    return error


BODIES = {
    "no JSON": b"{",
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"1",
    "invalid UTF-8": b'{"model": "tiny", "prompt": "\xff\xfe"}',
    "a lone surrogate": b'{"model": "tiny", "prompt": "\\ud800"}',
    "a lone surrogate in a name": b'{"model": "tiny", "prompt": "a", "\\udfff": 1}',
    "NUL": b'{"model": "tiny", "prompt": "a\\u0000b"}',
    "NaN": b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
    "infinity": b'{"model": "tiny", "prompt": "a", "temperature": Infinity}',
    "a huge number": b'{"model": "tiny", "prompt": "a", "max_tokens": 1' + b"0" * 400 + b"}",
    "a longer number than Python reads": b'{"model": "tiny", "prompt": "a", "seed": 1' + b"0" * 5000 + b"}",
    "a huge exponent": b'{"model": "tiny", "prompt": "a", "top_p": 1e999}',
    "deep lists": b'{"model": "tiny", "prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "an empty prompt": b'{"model": "tiny", "prompt": ""}',
    "an empty list": b'{"model": "tiny", "prompt": []}',
    "several prompts": b'{"model": "tiny", "prompt": ["a", "b"]}',
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_makes_no_sense_is_refused(server: Running, name: str) -> None:
    refused(server, "/v1/completions", content=BODIES[name], headers=JSON)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": 1},
        {"prompt": {"a": 1}},
        {"prompt": ["a", 1]},
        {"prompt": [1.5]},
        {"prompt": [-1]},
        {"prompt": [257]},
        {"prompt": [2**70]},
        {"model": None},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": "5"},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"max_tokens": 2**63},
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": 1.1},
        {"seed": -(2**63) - 1},
        {"seed": 2**63},
        {"stop": ""},
        {"stop": [""]},
        {"stop": ["a"] * 17},
        {"stop": "\ud800"},
        {"stream": "yes"},
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"other": 1}},
        {"session_id": "../../etc/passwd"},
        {"session_id": "a" * 129},
        {"unknown": 1},
    ],
    ids=lambda wrong: json.dumps(wrong)[:40],
)
def test_a_wrong_parameter_is_refused_by_name(server: Running, wrong: dict[str, Any]) -> None:
    error = refused(server, "/v1/completions", content=json.dumps({**COMPLETION, **wrong}).encode(), headers=JSON)
    assert any(name in f"{error['param']} {error['message']}" for name in wrong)


@pytest.mark.parametrize(
    ("route", "field"),
    [("completions", {"prompt": [""] * 2000}), ("chat/completions", {"messages": [1] * 2000})],
)
def test_of_a_long_list_one_fault_is_told(server: Running, route: str, field: dict[str, Any]) -> None:
    kind = {"completions": CompletionRequest, "chat/completions": ChatRequest}[route]
    with pytest.raises(pydantic.ValidationError) as caught:
        kind(model=NAME, **field)
    assert caught.value.error_count() <= 3
    error = refused(server, f"/v1/{route}", json={"model": NAME, **field})
    assert "needs to be list should" not in error["message"]


@pytest.mark.parametrize("temperature", [1e-310, 5e-324])
def test_the_smallest_temperatures_take_the_likeliest(server: Running, temperature: float) -> None:
    bodies = ({**COMPLETION, "max_tokens": 5, "temperature": each} for each in (0, temperature))
    answers = [server.http.post("/v1/completions", json=body) for body in bodies]
    texts = {answer.json()["choices"][0]["text"] for answer in answers}
    assert len(texts) == 1


def test_bodies_and_tokens_have_limits(server: Running) -> None:
    word = "a" * 10_000_000
    refused(server, "/v1/completions", (413,), json={**COMPLETION, "prompt": word})
    refused(server, "/v1/sessions/s/append", (413,), content=word, headers={"content-type": "text/plain"})
    chunks = (b"a" * 2**16 for _ in range(2**8))  # of no declared length
    refused(server, "/v1/sessions/s/append", (413,), content=chunks, headers={"content-type": "text/plain"})
    error = refused(server, "/v1/completions", json={**COMPLETION, "prompt": "a" * 100_000})
    assert error["code"] == "too_many_tokens"
    assert "65536" in error["message"]


@pytest.mark.parametrize("data", [b"\xff", b"caf\xc3", b"\xed\xa0\x80", b"a\0b", b"\xf0\x9f\x99"])
def test_a_streamed_text_that_is_no_text_is_refused(server: Running, data: bytes) -> None:
    error = refused(server, "/v1/sessions/s/append", content=iter([data]), headers={"content-type": "text/plain"})
    assert error["code"] == "invalid_text"
    assert server.http.get("/v1/sessions/s").json()["version"] == 0


def test_other_kinds_of_content_are_refused(server: Running) -> None:
    refused(server, "/v1/sessions/s/append", (415,), content=b"a", headers={"content-type": "image/png"})
    refused(server, "/v1/sessions/s/append", (415,), content=b"a")
    refused(server, "/v1/completions", content=json.dumps(COMPLETION).encode(), headers={"content-type": "text/plain"})


def test_nothing_is_served_at_other_places(server: Running) -> None:
    for method, path, status in (
        ("GET", "/v1/other", 404),
        ("PUT", "/v1/models", 405),
        ("GET", "/v1/completions", 405),
    ):
        answer = server.http.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "code", "param"}
    for name in ("a/../../etc", "%2e%2e%2f", "\N{PILE OF POO}", "a" * 5000, "%00"):
        assert server.http.get(f"/v1/sessions/{name}").status_code in (400, 404)


def test_a_body_that_stops_coming_is_given_up(server: Running) -> None:
    port = int(server.url.rpartition(":")[2])
    for path in ("/v1/completions", "/v1/sessions/s/append"):
        kind = "text/plain" if path.endswith("append") else "application/json"
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: 99\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(f"{head}{{".encode())
            assert b" 408 " in connection.recv(4096).split(b"\r\n")[0]


def test_a_body_that_trickles_has_an_end(server: Running) -> None:
    kind = b"Content-Type: application/json\r\nContent-Length: 999"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n" + kind + b"\r\n\r\n"
    with running(body_timeout_s=5.0, request_timeout_s=1.0) as slow:
        with socket.create_connection(("127.0.0.1", int(slow.url.rpartition(":")[2])), timeout=0.1) as connection:
            connection.sendall(head)
            answer = b""
            for _ in range(200):  # never a long pause
                connection.sendall(b" ")
                with contextlib.suppress(TimeoutError):
                    answer = connection.recv(4096)
                if answer:
                    break
        assert b" 408 " in answer.split(b"\r\n")[0]
        assert b"within 1 s" in answer


@pytest.mark.parametrize("num", [800, pytest.param(10_000, marks=pytest.mark.long)])
def test_memory_stays_flat_after_many_bad_requests(server: Running, num: int) -> None:
    process = psutil.Process()
    bodies = [*BODIES.values(), b'{"model": "tiny", "prompt": "\\ud800' + b"a" * 100_000 + b'"}']

    def send(num: int) -> int:
        for i in range(num):
            assert server.http.post("/v1/completions", content=bodies[i % len(bodies)], headers=JSON).status_code == 400
        gc.collect()
        return process.memory_info().rss

    send(num // 4)
    before = send(num // 4)
    after = send(num // 2)
    assert after - before < 16 * 2**20, f"{before} bytes before, {after} after"


def test_connections_cut_at_any_point_leave_nothing(server: Running) -> None:
    port = int(server.url.rpartition(":")[2])
    body = json.dumps({**COMPLETION, "max_tokens": 500, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    data = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    for cut in range(1, len(data) + 1, 9):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
            connection.sendall(data[:cut])
    until(lambda: server.front.service.load().num_requests == 0, "the end of all requests")
    until(lambda: not server.front.service.engine.slots.holders, "the end of summaries that were begun")


@pytest.mark.long
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_requests_made_of_the_schema_never_break_the_server(server: Running, mode: schemathesis.GenerationMode) -> None:
    """schemathesis makes values that fit the schema, and values that do not."""
    statuses: Counter[int] = Counter()
    cases = [
        operation.ok().as_strategy(generation_mode=mode)
        for operation in schemathesis.openapi.from_dict(server.app.openapi()).get_all_operations()
        if mode == schemathesis.GenerationMode.POSITIVE or operation.ok().method == "post"
    ]
    assert len(cases) >= 7

    @settings(
        max_examples=NUM_EXAMPLES * len(cases), deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @seed(0)
    @given(case=one_of(cases))
    def send(case: schemathesis.Case) -> None:
        answer = case.call(base_url=server.url, timeout=60)
        statuses[answer.status_code] += 1
        assert answer.status_code < 500
        if answer.status_code >= 400:
            assert set(json.loads(answer.content)["error"]) == {"message", "type", "code", "param"}

    send()
    assert statuses[400] or mode == schemathesis.GenerationMode.POSITIVE
    until(lambda: not server.front.service.engine.slots.holders, "the end of summaries that were begun")
