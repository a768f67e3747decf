"""A spot machine's end is told to Ray once the metadata service tells it, and by a command that Ray has."""

import contextlib
import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

SCRIPT = Path(__file__).resolve().parents[1] / "clusters" / "spot_notice.py"
AWS_PATH, GCP_PATH = "/latest/meta-data/spot/instance-action", "/computeMetadata/v1/instance/preempted"


class Metadata(http.server.BaseHTTPRequestHandler):
    """What both clouds answer; `announced` says whether the machine is about to go."""

    announced = False
    num_asked = 0
    fails = 0  # how many questions are still answered with an error

    def do_PUT(self) -> None:
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200 if self.path == "/latest/api/token" else 404, "session-token")

    def do_GET(self) -> None:
        kind = type(self)
        kind.num_asked += 1
        if kind.fails:
            kind.fails -= 1
            self._answer(503, "")
        elif self.path == AWS_PATH and self.headers["X-aws-ec2-metadata-token"] == "session-token":
            at = (datetime.now(UTC) + timedelta(seconds=100)).strftime("%Y-%m-%dT%H:%M:%SZ")
            self._answer(*((200, f'{{"action": "terminate", "time": "{at}"}}') if kind.announced else (404, "")))
        elif self.path == GCP_PATH and self.headers["Metadata-Flavor"] == "Google":
            self._answer(200, "TRUE" if kind.announced else "FALSE")
        else:
            self._answer(401, "")

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[tuple[str, type[Metadata]]]:
    kind = type("Metadata", (Metadata,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", kind
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def watching(cloud: str, url: str, folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """The script, with a `ray` that refuses the first time and notes how it was called."""
    ray = folder / "ray"
    ray.write_text(f'#!/bin/sh\necho "$RAY_ADDRESS $*" >> {folder}/called\ntest $(wc -l < {folder}/called) -ge 2\n')
    ray.chmod(0o755)
    words = [sys.executable, str(SCRIPT), cloud, "10.0.0.1:6379", "--metadata", url, "--every-s", "0.05"]
    with (folder / "told").open("w") as told:
        process = subprocess.Popen(words, env={"PATH": f"{folder}:/usr/bin:/bin"}, stderr=told, cwd=folder)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until_asked(kind: type[Metadata], num: int) -> None:
    end = time.monotonic() + 60
    while kind.num_asked < num:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(("cloud", "at_least", "at_most"), [("aws", 60, 100), ("gcp", 30, 30)])
def test_a_notice_is_told_to_ray_until_ray_takes_it(
    cloud: str, at_least: int, at_most: int, metadata: tuple[str, type[Metadata]], tmp_path: Path
) -> None:
    url, kind = metadata
    kind.fails = 2
    with watching(cloud, url, tmp_path) as process:
        wait_until_asked(kind, 5)
        assert not (tmp_path / "called").exists()
        kind.announced = True
        assert process.wait(timeout=60) == 0
    told = (tmp_path / "told").read_text().splitlines()
    assert "does not answer (HTTP Error 503" in told[0]
    assert len(told) == 3  # the failure once, the notice each time
    refused, taken = (tmp_path / "called").read_text().splitlines()
    begins = "10.0.0.1:6379 drain-node --address 10.0.0.1:6379 --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "
    for line in (refused, taken):
        assert line.startswith(begins)
        assert at_least <= int(line.rpartition("--deadline-remaining-seconds ")[2]) <= at_most


def test_ray_has_the_command_with_these_options() -> None:
    """It is a hidden one: a later Ray may not have it, or want other words."""
    from ray.scripts.scripts import cli

    said = CliRunner().invoke(cli, ["drain-node", "--help"]).output
    for option in ("--address", "--reason", "--reason-message", "--deadline-remaining-seconds"):
        assert option in said
    assert "DRAIN_NODE_REASON_PREEMPTION" in said
