"""Training over two hosts with their own addresses, one of which is cut off in the middle: it goes on on the other."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import storage

from . import two_hosts as hosts_module
from .two_hosts import PORT, two_hosts

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS = 300
TRAIN = (
    "tiny --batch-size 4 model.num_layers 1 model.width 16 model.feed_forward_width 16 model.num_heads 2 "
    f"curriculum.num_segments 1 curriculum.steps {NUM_STEPS} curriculum.advance_below none "
    "report.log_every 5 report.checkpoint_every 50 workers.num_workers 1,2"
).split()

pytestmark = [pytest.mark.scenario, pytest.mark.ray]


@pytest.mark.timeout(900)
def test_training_goes_on_when_a_host_is_cut_off() -> None:
    if (reason := hosts_module.missing()) is not None:
        pytest.skip(reason)
    with two_hosts() as hosts:
        output = hosts.folder / "run"
        command = [sys.executable, str(ROOT / "pipelines" / "train.py"), *TRAIN, "--output", str(output)]
        environment = {**hosts.environment, "RAY_ADDRESS": f"{hosts.addresses[0]}:{PORT}"}
        with (hosts.folder / "train.log").open("w") as log:
            training = subprocess.Popen(
                hosts.words(0, command),
                env=environment,
                cwd=hosts.folder,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            cut_at = wait_for_step(output, 60, training)
            assert "training with 2 workers from step 0" in (hosts.folder / "train.log").read_text()
            hosts.cut_off(1)
            printed, _ = training.communicate(timeout=600)
        finally:
            training.kill()
        told = (hosts.folder / "train.log").read_text()
        assert training.returncode == 0, told[-5000:]
        assert json.loads(printed.splitlines()[-1])["num_steps"] == NUM_STEPS
        resumed = [int(step) for step in re.findall(r"training with 1 worker from step (\d+)", told)]
        assert resumed, told[-5000:]
        assert resumed[0] >= cut_at - cut_at % 50, "no more is lost than the steps since the last checkpoint"
        steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(5, NUM_STEPS + 1, 5))
        assert storage.is_directory(str(output / "model"))


def wait_for_step(output: Path, step: int, training: "subprocess.Popen[str]") -> int:
    """The last step told, once it is `step` or later."""
    metrics = output / "metrics.jsonl"
    end = time.monotonic() + 300
    while time.monotonic() < end and training.poll() is None:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if lines and (last := int(json.loads(lines[-1])["step"])) >= step:
            return last
        time.sleep(0.2)
    raise AssertionError((output.parent / "train.log").read_text()[-5000:])
