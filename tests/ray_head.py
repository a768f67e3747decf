"""A Ray of its own, started as people start one: `ray start --head`, with a token, on free ports, in its own folder."""

import contextlib
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Head(NamedTuple):
    """A running head node."""

    address: str  # host:port, for RAY_ADDRESS
    dashboard: str  # URL, for RAY_API_SERVER_ADDRESS
    token: dict[str, str]  # variables of whoever may use it


@contextlib.contextmanager
def ray_head(environment: Mapping[str, str], *, num_cpus: int = 2) -> Iterator[Head]:
    """A head on loopback; of the project it knows what is sent to it. It is ended, with all it started, by its pid."""
    port, dashboard, client, agent = free_ports(4)
    folder = Path(tempfile.mkdtemp(prefix="rmt-"))  # short: paths of sockets are limited
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    words = [
        *["ray", "start", "--head", "--block", f"--num-cpus={num_cpus}", "--node-ip-address=127.0.0.1"],
        *[f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"],
        *[f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"],
        *["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={200 * 1024**2}"],
        f"--temp-dir={folder}",
    ]
    asks = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    own = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    own |= {**asks, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "RAY_JOB_STOP_WAIT_TIME_S": "120"}
    try:
        with running(words, own, folder) as head:
            url = f"http://127.0.0.1:{dashboard}"
            wait_for(f"{url}/api/version", head, folder / "output", token.read_text())
            yield Head(f"127.0.0.1:{port}", url, asks)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running(
    words: Sequence[str], environment: Mapping[str, str], folder: Path, output: str = "output"
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that is told to end when the block ends; what it prints goes to a file in `folder`."""
    with (folder / output).open("w") as file:
        process = subprocess.Popen(
            words, env=dict(environment), cwd=folder, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def free_ports(num: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def wait_for(url: str, process: "subprocess.Popen[bytes]", output: Path, token: str) -> None:
    """Returns when the dashboard answers; AssertionError with what was printed where it does not."""
    end = time.monotonic() + 120
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"the cluster did not come up:\n{output.read_text()[-3000:]}")
