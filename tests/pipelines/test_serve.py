"""The server on Ray Serve: OpenAI's client, a replica that dies, back-pressure, draining, the command line."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import ray

import rmt_core
from pipelines import serve
from pipelines.cluster import SERVE_ENVIRONMENT
from pipelines.config import InputError, build
from pipelines.serving.auth import new_key
from pipelines.serving.deployment import WaitingSegments
from pipelines.serving.serve_config import ServeConfig
from tests.pipelines.serving_http import BYTES, MODEL, make_app, make_config, until, written

ROOT = Path(__file__).resolve().parents[2]
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune"
ENDLESS = {"model": "tiny", "prompt": TEXT, "max_tokens": 100_000, "temperature": 0, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("served") / "tiny"
    rmt_core.save(directory, MODEL, tokenizer=BYTES)
    return str(directory)


def test_it_is_ready_only_after_a_warm_step() -> None:
    from starlette.testclient import TestClient

    app, _ = make_app(make_config())
    client = TestClient(app, base_url="http://localhost")  # does not start it
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 503
    with TestClient(app, base_url="http://localhost") as client:
        assert client.get("/readyz").status_code == 200
        assert "rmt_engine_num_waiting_segments 0.0" in client.get("/metrics").text


def test_replicas_follow_the_segments_that_wait() -> None:
    policy = WaitingSegments(segments_per_replica=10)
    for waiting, wanted in (([0, 0], 1), ([9, 0], 1), ([10, 15], 3), ([500, 500], 8)):
        context = SimpleNamespace(
            aggregated_metrics={"num_waiting_segments": dict(enumerate(waiting))},
            capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=8,
        )
        assert policy(context) == (wanted, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--host", "0.0.0.0"], "--api-keys"),
        (["--store", "memory:", "--max-replicas", "2"], "one replica"),
        (["--store", "ftp://a/b"], "session store"),
        (["--api-keys", "/nowhere/keys"], "cannot be read"),
        (["--min-replicas", "3"], "--max-replicas"),
        (["--model", "/nowhere/model"], "no such directory"),
    ],
)
def test_settings_that_cannot_work_are_one_line(
    model: str, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(["--model", model, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("serve: error: ")
    assert reason in error


def test_replicas_that_the_machine_can_never_hold_are_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    for settings, reason in (({"device": "cuda"}, "needs 1 GPUs"), ({"replica_cpus": 3}, "exceeds the 2 cores")):
        with pytest.raises(InputError, match=reason):
            serve._check_room(build(ServeConfig, {"model": model, **settings}))


def test_while_it_starts_a_signal_ends_it_and_later_the_second() -> None:
    told = serve._Told()
    with pytest.raises(KeyboardInterrupt):
        told()
    waiting = threading.Thread(target=told.wait)
    waiting.start()
    while not told._serving:
        time.sleep(0.01)
    told()
    waiting.join()
    with pytest.raises(KeyboardInterrupt):
        told()


def test_a_dry_run_prints_the_settings(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--model", model, "--dry-run"]) == 0
    assert json.loads(capfd.readouterr().out)["max_requests"] == 256


def test_a_dry_run_prints_no_password(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--model", model, "--store", "redis://me:secret@host:1/0", "--dry-run"]) == 0
    assert json.loads(capfd.readouterr().out)["store"] == "redis://***@host:1/0"


def test_a_rayservice_needs_keys_as_its_proxy_is_reached_from_outside(model: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--api-keys"):
        serve.build({"model": model, "store": str(tmp_path)})


# --- on Ray -----------------------------------------------------------------------------------------


def deploy(model: str, store: Path, **settings: Any) -> None:
    """Two replicas with a store of files."""
    from ray import serve as ray_serve

    common = {"model": model, "host": "127.0.0.1", "store": str(store), "min_replicas": 2, "max_replicas": 2}
    limits = {"num_slots": 4, "max_requests": 4, "max_new_tokens": 100_000, "replica_cpus": 0.4}
    application = serve.build({**common, **limits, **settings})
    ray_serve.run(application, name="rmt-test", route_prefix="/")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="module")
def url(model: str, local_ray: None, store: Path) -> Iterator[str]:
    from ray import serve as ray_serve

    port = serve._free_port(make_config(port=0))
    options = {"runtime_env": {"env_vars": SERVE_ENVIRONMENT}}
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port}, controller_options=options)
    deploy(model, store)
    yield f"http://127.0.0.1:{port}"
    ray_serve.shutdown()


@pytest.mark.slow
def test_the_official_client_works_unchanged(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        whole = client.completions.create(model="tiny", prompt=TEXT, max_tokens=9, temperature=0)
        assert whole.choices[0].text == written(TEXT.encode(), 9)
        chunks = list(client.completions.create(model="tiny", prompt=TEXT, max_tokens=9, temperature=0, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    ready = httpx.get(f"{url}/readyz", headers={"x-request-id": "mine"})
    assert (ready.status_code, ready.headers.get_list("x-request-id")) == (200, ["mine"])


@pytest.mark.slow
def test_serves_own_proxy_tells_of_its_health_and_nothing_else(url: str) -> None:
    assert httpx.get(f"{url}/-/healthz").text == "success"
    for path in ("/-/routes", "/-/routes/", "/-/routes?verbose=1", "/-/%72outes"):
        answer = httpx.get(f"{url}{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path


@pytest.mark.slow
def test_the_command_leaves_a_serve_that_runs_already_as_it_is(
    url: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(["--model", model, "--port", "0", "--store", "memory:"]) == 2
    assert "deploy pipelines.serve:build there" in capsys.readouterr().err
    assert httpx.get(f"{url}/readyz").status_code == 200


@pytest.mark.slow
def test_a_stream_comes_as_it_is_written_and_ends_with_its_client(url: str) -> None:
    headers = {"x-session-id": "streamed"}
    with httpx.stream("POST", f"{url}/v1/completions", json=ENDLESS, headers=headers, timeout=60) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["object"] == "text_completion"
    until(lambda: "rmt_engine_num_requests 0.0" in httpx.get(f"{url}/metrics", headers=headers).text, "its end")


@pytest.mark.slow
def test_requests_beyond_the_limit_get_429_and_when_to_come_again(url: str) -> None:
    headers = {"x-session-id": "hot"}
    held = []
    refused = None
    try:
        while refused is None and len(held) < 10:
            request = httpx.Client(timeout=60)
            answer = request.send(
                request.build_request("POST", f"{url}/v1/completions", json=ENDLESS, headers=headers), stream=True
            )
            held.append((request, answer))
            if answer.status_code != 200:
                refused = answer
        assert refused is not None
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert len(held) == 5  # one replica has them all: its limit is 4
    finally:
        for request, answer in held:
            answer.close()
            request.close()
    until(lambda: "rmt_engine_num_requests 0.0" in httpx.get(f"{url}/metrics", headers=headers).text, "their end")


@pytest.mark.slow
def test_a_session_goes_on_after_its_replica_was_killed_in_the_middle_of_a_request(url: str) -> None:
    headers = {"x-session-id": "killed"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        client.post("/v1/sessions", json={"id": "killed"}).raise_for_status()
        client.post("/v1/sessions/killed/append", json={"text": TEXT}).raise_for_status()
        body = {"prompt": " and", "max_tokens": 100_000, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/sessions/killed/generate", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            pid = int(re.search(r"rmt_process_id (\d+)", client.get("/metrics").text)[1])  # type: ignore[index]
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(httpx.HTTPError):
                list(lines)

    found: dict[str, Any] = {}

    def goes_on() -> bool:
        answer = httpx.post(
            f"{url}/v1/sessions/killed/generate",
            json={"max_tokens": 9, "request_id": "again"},
            headers=headers,
            timeout=60,
        )
        found.update(answer.json() if answer.status_code == 200 else {})
        return answer.status_code == 200

    until(goes_on, "the next answer", 60)
    assert found["text"] == written(TEXT.encode(), 9)
    assert found["version"] == 2


@pytest.mark.long
def test_a_redeploy_lets_what_is_being_written_end(url: str, model: str, store: Path) -> None:
    body = {"model": "tiny", "prompt": TEXT, "max_tokens": 1500, "temperature": 0, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        deployed = threading.Thread(target=deploy, args=(model, store), kwargs={"max_requests": 5})
        deployed.start()
        *_, last = (line for line in lines if line)
    deployed.join(120)
    assert last == "data: [DONE]"
    assert httpx.get(f"{url}/readyz").status_code == 200


@pytest.mark.scenario
def test_a_replica_comes_as_segments_queue_and_goes_again_and_no_stream_breaks(
    url: str, model: str, store: Path
) -> None:
    """Ray's autoscaler as it is: it hears of the queue every ten seconds."""
    from ray import serve as ray_serve

    def running() -> int:
        return ray_serve.status().applications["rmt-test"].deployments["rmt"].replica_states.get("RUNNING", 0)

    def write(name: str) -> bool:
        """Whether the answer still came after the replica was told to go."""
        headers = {"x-session-id": name}
        with httpx.stream("POST", f"{url}/v1/completions", json=ENDLESS, headers=headers, timeout=60) as answer:
            for line in answer.iter_lines():
                if goes.is_set() and '"text":' in line:
                    return True
        return False

    deploy(
        model,
        store,
        min_replicas=1,
        max_replicas=2,
        max_requests=16,
        segments_per_replica=50,
        scale_up_after_s=1,
        scale_down_after_s=2,
    )
    until(lambda: running() == 1, "one replica", 90)
    goes = threading.Event()
    book = {"prompt": TEXT * 500, "max_tokens": 1, "model": "tiny"}
    with ThreadPoolExecutor(9) as pool:
        reading = pool.submit(httpx.post, f"{url}/v1/completions", json=book, timeout=240)
        until(lambda: running() == 2, "a second replica", 90)
        assert reading.result().status_code == 200
        writing = [pool.submit(write, f"writer-{number}") for number in range(8)]
        until(lambda: running() == 1, "one replica again", 120)
        goes.set()
        assert all(writer.result() for writer in writing)


@pytest.mark.long
def test_the_command_serves_until_it_is_told_and_ends_what_it_serves(model: str, tmp_path: Path) -> None:
    words = [
        sys.executable,
        str(ROOT / "pipelines" / "serve.py"),
        "--model",
        model,
        "--port",
        "0",
        "--store",
        "memory:",
        "--api-keys",
        str(tmp_path / "keys"),
    ]
    key, line = new_key("alice")
    (tmp_path / "keys").write_text(line)
    headers = {"authorization": f"Bearer {key}"}
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines: list[str] = []
            reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
            reader.start()
            until(
                lambda: process.poll() is not None or any(line.startswith("http://") for line in lines),
                "its address",
                240,
            )
            address = next((line.strip() for line in lines if line.startswith("http://")), None)
            assert address is not None, "".join(lines)
            body = {"model": "tiny", "prompt": TEXT, "max_tokens": 9, "temperature": 0}
            assert httpx.get(f"{address}/-/routes").status_code == 401  # Serve's own, which it would answer
            answer = httpx.post(f"{address}/v1/completions", json=body, timeout=180, headers=headers)
            assert answer.json()["choices"][0]["text"] == written(TEXT.encode(), 9)
            process.send_signal(signal.SIGTERM)
            assert process.wait(180) == 0
            assert process.stdout is not None
            assert json.loads(process.stdout.read()) == {"model": "tiny", "url": address}
            reader.join()
        finally:
            process.terminate()  # whatever failed: leaving the block waits for its end
