"""Two hosts on one machine: network namespaces with their own addresses and a cable between, and Ray's own folders.

Needs root and `ip` (iproute2). A host's processes run under `ip netns exec`; the folder for Ray is another disk on each
(a mount namespace), so that nothing is shared but the test's own folder, which stands for NFS.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .ray_head import running

PORT = 6379
PRIVATE_DISK = 'mount --make-rprivate / && mount --bind "$1" "$2" && shift 2 && exec "$@"'


class TwoHosts:
    """Hosts 0 (the head) and 1, with one CPU core each for Ray."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        mark = secrets.token_hex(2)
        self.names = [f"rmt-{mark}-{host}" for host in range(2)]
        self.addresses = ["10.213.71.1", "10.213.71.2"]
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "GLOO_SOCKET_IFNAME": "eth0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            # a lost host is noticed within seconds
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "4",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
        }

    def words(self, host: int, command: list[str]) -> list[str]:
        """A command as one that runs on a host."""
        disk = [str(self.folder / f"disk{host}"), str(self.folder / "ray")]
        return [
            "ip",
            "netns",
            "exec",
            self.names[host],
            "unshare",
            "--mount",
            "sh",
            "-c",
            PRIVATE_DISK,
            "sh",
            *disk,
            *command,
        ]

    def cut_off(self, host: int) -> None:
        """Pulls the cable at a host."""
        _ip("-n", self.names[host], "link", "set", "eth0", "down")

    def ray_start(self, host: int) -> list[str]:
        command = ["ray", "start", "--block", "--num-cpus=1", f"--node-ip-address={self.addresses[host]}"]
        command += ["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={100 * 1024**2}"]
        if host == 0:
            command += ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self.folder / 'ray'}"]
        else:
            command += [f"--address={self.addresses[0]}:{PORT}"]
        return self.words(host, command)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def missing() -> str | None:
    """Why there can be no two hosts here; None where there can."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "needs ip (iproute2) and unshare (util-linux)"
    name = f"rmt-{secrets.token_hex(2)}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode != 0:
        return "network namespaces are not allowed here"
    _ip("netns", "del", name)
    return None


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Two hosts with a Ray that joins them; all is taken down when the block ends."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="rmt-"))  # short: paths of sockets are limited
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for name in ("disk0", "disk1", "ray"):
            (folder / name).mkdir()
        (folder / "token").touch(mode=0o600)
        (folder / "token").write_text(secrets.token_hex(32))
        hosts = TwoHosts(folder)
        for name in hosts.names:
            _ip("netns", "add", name)
            stack.callback(_end_all_in, name)
        ends = [f"{name}v" for name in hosts.names]
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(hosts.names, ends, hosts.addresses, strict=True):
            _ip("link", "set", end, "netns", name, "name", "eth0")
            _ip("-n", name, "address", "add", f"{address}/30", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
        stack.enter_context(running(hosts.ray_start(0), hosts.environment, folder, "head.log"))
        _wait_for_nodes(hosts, 1)
        stack.enter_context(running(hosts.ray_start(1), hosts.environment, folder, "worker.log"))
        _wait_for_nodes(hosts, 2)
        yield hosts


def _wait_for_nodes(hosts: TwoHosts, num: int) -> None:
    script = "import ray; ray.init('auto', log_to_driver=False); print(sum(node['Alive'] for node in ray.nodes()))"
    environment = {**hosts.environment, "RAY_ADDRESS": f"{hosts.addresses[0]}:{PORT}"}
    end, said = time.monotonic() + 120, ""
    while time.monotonic() < end:
        done = subprocess.run(
            hosts.words(0, [sys.executable, "-c", script]), env=environment, capture_output=True, text=True, check=False
        )
        if done.stdout.strip() == str(num):
            return
        said = done.stderr
        time.sleep(1)
    logs = "\n".join(path.read_text()[-2000:] for path in hosts.folder.glob("*.log"))
    raise AssertionError(f"the hosts did not find each other:\n{said[-2000:]}\n{logs}")


def _end_all_in(name: str) -> None:
    """Ends what is left in a namespace, by its pids, and takes the namespace down."""
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
    for pid in listed.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], check=False)
