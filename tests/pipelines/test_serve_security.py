"""Who is let in, what they see, and that nothing they write is seen elsewhere."""

import base64
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from pipelines.config import InputError
from pipelines.serving import auth
from pipelines.serving.auth import Key, Keys, given_key, new_key, read_keys
from pipelines.serving.guard import OPEN_PATHS
from pipelines.serving.serve_config import ServeConfig
from tests.pipelines.serving_http import NAME, Running, running

(ALICE, ALICE_LINE), (BOB, BOB_LINE) = new_key("alice"), new_key("bob")
KEYS = [Key(*line.split(":")) for line in (ALICE_LINE, BOB_LINE)]
CANARY = "canary7f3a"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(keys=KEYS, key=ALICE) as server:
        yield server


def routes(routers: Any) -> Iterator[tuple[str, str]]:
    """(method, path) of every route there is, also of those in routers."""
    for route in routers:
        if isinstance(route, APIRoute) or (hasattr(route, "path") and getattr(route, "methods", None)):
            for method in route.methods:
                yield method, route.path
        else:
            inner = getattr(route, "original_router", None) or getattr(route, "router", None)
            yield from routes(getattr(inner, "routes", []))


def test_every_route_but_health_asks_for_a_key(server: Running) -> None:
    paths = {(method.upper(), path) for path, methods in server.app.openapi()["paths"].items() for method in methods}
    paths |= set(routes(server.app.routes)) | {("GET", "/"), ("GET", "/openapi.json"), ("GET", "/nowhere")}
    assert len(paths) > 18
    for method, path in sorted(paths):
        filled = re.sub(r"\{[^}]+\}", "a", path)
        for authorization in (None, "", "Bearer", "Bearer wrong", f"Bearer {ALICE[:-1]}", f"Token {ALICE}", "Basic !"):
            headers = {"authorization": authorization} if authorization is not None else {"authorization": ""}
            answer = server.http.request(method, filled, headers=headers)
            if filled in OPEN_PATHS:
                assert answer.status_code < 300, filled
                continue
            assert answer.status_code == 401, (method, filled, authorization)
            if method != "HEAD":
                assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"].startswith("Basic" if filled == "/" else "Bearer")


def test_a_key_opens_also_as_a_browsers_password(server: Running) -> None:
    basic = base64.b64encode(f"anyone:{ALICE}".encode()).decode()
    assert server.http.get("/", headers={"authorization": f"Basic {basic}"}).status_code == 200
    assert server.http.get("/v1/models").status_code == 200


def test_foreign_sessions_and_summaries_answer_like_unknown_ones(server: Running) -> None:
    server.http.post("/v1/sessions", json={"id": "hers"}).raise_for_status()
    job = server.http.post("/v1/summaries", json={"text": "a", "max_tokens": 1}).json()["id"]
    as_bob = {"authorization": f"Bearer {BOB}"}
    for method, path in (
        *(("GET", f"/v1/sessions/{{}}{end}") for end in ("",)),
        *(("POST", f"/v1/sessions/{{}}/{end}") for end in ("append", "generate", "fork")),
        ("DELETE", "/v1/sessions/{}"),
    ):
        body = {"text": "a"} if path.endswith("append") else {} if method == "POST" else None
        hers, unknown = (
            server.http.request(method, path.format(session), headers=as_bob, json=body) for session in ("hers", "none")
        )
        assert (hers.status_code, hers.json()) == (404, unknown.json()), path
    for method, path in (("GET", ""), ("POST", "/cancel"), ("DELETE", "")):
        hers, unknown = (
            server.http.request(method, f"/v1/summaries/{name}{path}", headers=as_bob) for name in (job, "none")
        )
        assert (hers.status_code, hers.json()) == (404, unknown.json()), path
    assert server.http.post("/v1/sessions", json={"id": "hers"}, headers=as_bob).status_code == 201
    assert server.http.get("/v1/sessions/hers").status_code == 200


def test_all_keys_are_compared_whichever_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def compare(a: str, b: str) -> bool:
        compared.append(a)
        return a == b

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    keys = Keys(KEYS)
    assert [keys.tenant(key) for key in (ALICE, BOB, "other", "\ud800")] == ["alice", "bob", None, None]
    assert compared == [key.sha256 for key in KEYS] * 4


def test_without_keys_only_loopback_is_served() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        assert ServeConfig(model="m", host=host).host == host
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(ValueError, match="--api-keys"):
            ServeConfig(model="m", host=host)
        assert ServeConfig(model="m", host=host, api_keys="file").host == host


def test_without_keys_other_host_names_and_origins_are_refused() -> None:
    with running() as server:
        port = server.url.rpartition(":")[2]
        for host in (f"127.0.0.1:{port}", "localhost", "[::1]:80"):
            assert server.http.get("/v1/models", headers={"host": host}).status_code == 200, host
        for host in ("example.org", f"example.org:{port}", "127.0.0.1.example.org", ""):
            assert server.http.get("/v1/models", headers={"host": host}).status_code in (400, 403), host
        for origin, status in ((server.url, 200), ("https://example.org", 403), ("null", 403), ("http://[", 403)):
            answer = server.http.get("/v1/models", headers={"origin": origin})
            assert answer.status_code == status, origin
            assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_answers_carry_the_headers_that_protect_a_browser(server: Running) -> None:
    for path in ("/", "/v1/models", "/nowhere"):
        headers = server.http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"
    pages = [server.http.get("/") for _ in range(2)]
    policies = [page.headers["content-security-policy"] for page in pages]
    assert policies[0] != policies[1]
    assert "unsafe" not in policies[0]


def test_nothing_that_is_written_is_seen_in_logs_metrics_or_errors(
    server: Running,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    answers = []

    def send(path: str, **request: Any) -> None:
        answers.append(server.http.post(path, **request))

    def complete(**body: Any) -> None:
        send("/v1/completions", json={"model": NAME, "prompt": CANARY, "max_tokens": 1, **body})

    complete()
    for wrong in ({"temperature": CANARY}, {CANARY: 1}, {"stop": [CANARY, 1]}, {"n": CANARY}, {"seed": CANARY}):
        complete(**wrong)
    complete(prompt=f"{CANARY}\0")
    complete(prompt=[CANARY, CANARY])
    complete(model=CANARY)
    send("/v1/completions", content=f'{{"prompt": "{CANARY}'.encode())
    send("/v1/completions", content=f'{{"prompt": "{CANARY}'.encode(), headers={"content-type": "application/json"})
    send("/v1/sessions/none/append", json={"text": CANARY})
    send("/v1/sessions", json={"id": f"{CANARY} {CANARY}"})
    messages = [{"role": CANARY, "content": CANARY}]
    send("/v1/chat/completions", json={"model": NAME, "messages": messages})
    with monkeypatch.context() as broken:  # faults of our own, whose messages hold the text
        broken.setattr(server.front.tokenizer, "encode", lambda text: (_ for _ in ()).throw(KeyError(text)))
        complete()
        assert answers[-1].status_code == 500
    with monkeypatch.context() as broken:
        broken.setattr(server.front.service.engine.model, "step", lambda *_: (_ for _ in ()).throw(KeyError(CANARY)))
        complete(prompt=CANARY * 3)
        assert answers[-1].status_code == 500
    assert [answer.status_code for answer in answers[1:-2] if answer.status_code < 400] == []
    assert not [
        answer.text
        for answer in answers
        if CANARY in answer.text.replace("no parameter " + CANARY, "").replace(f'"param":"{CANARY}"', "")
    ]
    metrics = server.http.get("/metrics").text
    assert 'rmt_answers_total{method="POST",route="/v1/completions",status="200"}' in metrics
    assert 'route="/v1/sessions/{session}/append"' in metrics
    assert CANARY not in metrics
    assert CANARY not in caplog.text
    assert CANARY not in "".join(capfd.readouterr())


# --- files of keys ----------------------------------------------------------------------------------


def test_a_new_keys_line_lets_it_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert auth.main(["carol"]) == 0
    shown = capsys.readouterr()
    file = tmp_path / "keys.txt"
    file.write_text(f"# ours\n\n{shown.out}{BOB_LINE} # his\n")
    keys = Keys(read_keys(str(file)))
    assert keys.tenant(shown.err.rpartition(" ")[2].strip()) == "carol"
    assert keys.tenant(BOB) == "bob"
    assert auth.main(["not a tenant"]) == 2
    assert auth.main([]) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no key"),
        (b"# only a remark", "no key"),
        (b"alice:secret-in-the-open", "line 1"),
        (BOB_LINE.encode() + b"\n" + ALICE.encode(), "line 2"),
        (f"{BOB_LINE}\nother{BOB_LINE[3:]}".encode(), "twice"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_file_of_keys_that_is_not_one_is_refused_without_showing_it(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    file = tmp_path / "keys.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        read_keys(str(file))
    assert "secret" not in str(caught.value)
    assert ALICE not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(str(tmp_path / "none"))


@pytest.mark.parametrize("value", ["Basic \u00e9", "Basic !", "Basic /w==", "Digest x", ""])
def test_what_is_no_key_is_none(value: str) -> None:
    assert given_key(value) is None
