"""A Ray cluster of several nodes on this machine, whose nodes and workers can be taken away, and a run on it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

ROOT = Path(__file__).resolve().parents[2]

# Faults are noticed in seconds instead of minutes.
QUICK = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "25",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 6,
    "gcs_rpc_server_reconnect_timeout_s": 5,
    "worker_niceness": 0,
}
PATIENCE_S = 300.0  # for anything that is waited for


def wait_until(claim: Callable[[], Any], what: str) -> Any:
    """The first true value of `claim`."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := claim():
            return found
        time.sleep(0.2)
    raise AssertionError(f"waited {PATIENCE_S:.0f} s for {what}")


class Start(NamedTuple):
    """Workers that began, or went on."""

    num_workers: int
    step: int


class Site:
    """A head that runs nothing, worker nodes of one CPU, and the command of one training run."""

    def __init__(self, folder: Path, settings: list[str]) -> None:
        self.folder, self.run = folder, folder / "run"
        self.command = [
            sys.executable,
            str(ROOT / "pipelines" / "train.py"),
            "tiny",
            "--output",
            str(self.run),
            *settings,
        ]
        self.driver: subprocess.Popen[bytes] | None = None
        self._saved = 0
        self.reached = 0  # the last step that was seen done before the latest start
        self.open()

    # --- nodes

    def open(self) -> None:
        """A new cluster with a head and no worker nodes."""
        head = {"num_cpus": 0, "object_store_memory": 100 * 2**20, "include_dashboard": False, "_system_config": HEALTH}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)

    def add_node(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)

    def remove_node(self, node: Any) -> None:
        """As when its machine is switched off."""
        self.cluster.remove_node(node, allow_graceful=False)

    def announce(self, node: Any, seconds: float) -> None:
        """What a cloud says before it takes a spot machine back."""
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        client = ray._raylet.GcsClient(address=self.cluster.address)
        accepted, why = client.drain_node(node.node_id, reason, "taken back", int((time.time() + seconds) * 1000))
        assert accepted, why

    def worker_processes(self, node: Any) -> list[psutil.Process]:
        """The training processes of a node."""
        (raylet,) = node.all_processes["raylet"]
        children = psutil.Process(raylet.process.pid).children(recursive=True)
        return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]

    def close(self) -> None:
        """Ends the driver and every node."""
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()
        self.cluster.shutdown()

    def lose_head(self) -> None:
        """As when its machine is switched off: the driver ends by itself, and the other nodes."""
        self.cluster.remove_node(self.cluster.head_node, allow_graceful=False)
        self.exit_code()
        self.cluster.shutdown()

    # --- the run

    def start(self) -> None:
        """Gives the command; what it says is added to `log`."""
        environment = {**os.environ, **QUICK, "RAY_ADDRESS": self.cluster.address}
        with (self.folder / "log").open("ab") as log:
            self.driver = subprocess.Popen(self.command, env=environment, stdout=log, stderr=log, cwd=self.folder)

    def kill_driver(self) -> None:
        assert self.driver is not None
        self.driver.send_signal(signal.SIGKILL)
        self.driver.wait()

    def exit_code(self) -> int:
        assert self.driver is not None
        return self.driver.wait(timeout=PATIENCE_S)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    @property
    def starts(self) -> list[Start]:
        found = re.findall(r"training with (\d+) workers? from step (\d+)", self.log)
        return [Start(int(workers), int(step)) for workers, step in found]

    @property
    def announcements(self) -> list[int]:
        """Steps of the checkpoints that were made because a node was about to go."""
        return [
            int(step) for step in re.findall(r"about to be taken away: there is a checkpoint of step (\d+)", self.log)
        ]

    @property
    def steps(self) -> list[int]:
        """Steps that metrics.jsonl has a line of."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    @property
    def saved(self) -> int:
        """The step of the last checkpoint that counts; 0 where there is none."""
        registry = self.run / "checkpoint_manager_snapshot.json"
        text = registry.read_text() if registry.exists() else ""
        with contextlib.suppress(json.JSONDecodeError):  # Ray is writing it: then what was read last
            latest = json.loads(text)["latest_checkpoint_result"]
            self._saved = int(latest["metrics"]["step"]) if latest else 0
        return self._saved

    def wait_for_progress(self) -> None:
        """Until a checkpoint more stands, and some steps beyond it are done."""
        before = self.saved

        def come_further() -> bool:
            assert not self.failed(), self.log[-5000:]
            return before < self.saved < max(self.steps, default=0)

        wait_until(come_further, f"steps after a checkpoint after step {before}")

    def wait_for_announcement(self) -> int:
        """The step of the checkpoint that the run makes because a node is about to go."""
        before = len(self.announcements)

        def found() -> int | None:
            assert not self.failed(), self.log[-5000:]
            return self.announcements[-1] if len(self.announcements) > before else None

        step: int = wait_until(found, "a checkpoint out of turn")
        return step

    def failed(self) -> bool:
        assert self.driver is not None
        return self.driver.poll() not in (None, 0)

    def wait_for_start(self, known: int, num_workers: int) -> Start:
        """The first start beyond the `known` ones that has so many workers; `reached` is where the run was before."""
        self.reached = 0

        def found() -> Start | None:
            assert not self.failed(), self.log[-5000:]
            starts = self.starts
            if len(starts) <= known:
                self.reached = max([self.reached, *self.steps])
            return next((start for start in starts[known:] if start.num_workers == num_workers), None)

        start: Start = wait_until(found, f"a start with {num_workers} workers")
        return start
