"""`ray job submit` to a Ray that was started by hand and asks for a token: logs, exit codes, stopping, going on."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from .ray_head import Head, ray_head

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS = 400
TRAIN = (
    "tiny --batch-size 4 model.num_layers 1 model.width 16 model.feed_forward_width 16 model.num_heads 2 "
    f"curriculum.num_segments 1 curriculum.steps {NUM_STEPS} curriculum.advance_below none "
    "report.log_every 1 report.checkpoint_every 100000"
).split()

pytestmark = [pytest.mark.scenario, pytest.mark.ray]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with ray_head(environment) as started:
        yield started


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is submitted: the packages, with short books."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("rmt_core", "pipelines"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".rayignore", folder)
    for book in (folder / "pipelines" / "books").glob("*/*.txt"):
        book.write_bytes(book.read_bytes()[: 2**15])
    return folder


def ray_job(verb: str, *words: str, head: Head, project: Path) -> subprocess.CompletedProcess[str]:
    """`ray job VERB ...`, from the project's folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= head.token | {"RAY_API_SERVER_ADDRESS": head.dashboard}
    program = str(Path(sys.executable).with_name("ray"))
    return subprocess.run(
        [program, "job", verb, *words],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_who_has_no_token_is_refused(head: Head, project: Path) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.dashboard}/api/jobs/")
    done = ray_job("list", head=head._replace(token={"RAY_AUTH_MODE": "disabled"}), project=project)
    assert done.returncode != 0


def test_bad_input_ends_a_submitted_job_with_its_line(head: Head, project: Path, tmp_path: Path) -> None:
    words = ["--working-dir", ".", "--", "python", "pipelines/train.py", "tiny", "--data", str(tmp_path / "none")]
    done = ray_job("submit", *words, head=head, project=project)
    assert done.returncode != 0
    assert re.search(r"train: error: \S+/none is not a finished segment store", done.stdout + done.stderr)
    assert re.search(r"exit code:? 2\b|exited with code 2|code 2", done.stdout + done.stderr)


def test_a_stopped_job_leaves_a_checkpoint_and_resubmitted_goes_on(head: Head, project: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = ["--working-dir", ".", "--", "python", "pipelines/train.py", *TRAIN, "--output", str(output)]
    submitted = ray_job("submit", "--no-wait", "--submission-id", "first", *command, head=head, project=project)
    assert submitted.returncode == 0, submitted.stderr
    wait_for_lines(output / "metrics.jsonl", 5)
    stopped = ray_job("stop", "first", head=head, project=project)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    status = ray_job("status", "first", head=head, project=project)
    assert "STOPPED" in (status.stdout + status.stderr).upper()
    logs = ray_job("logs", "first", head=head, project=project).stdout
    assert re.search(r"stopping .*with a checkpoint", logs)
    last = int(re.findall(r"stopped at step (\d+)", logs)[-1])
    assert 5 <= last < NUM_STEPS
    assert [path.name for path in output.glob("checkpoint_*") if path.is_dir()]
    assert not (output / "run.json").exists()

    done = ray_job("submit", *command, head=head, project=project)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "going on with the run" in done.stdout
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert result["num_steps"] == NUM_STEPS
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, NUM_STEPS + 1))


def wait_for_lines(path: Path, num: int) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end:
        if path.exists() and len(path.read_text().splitlines()) >= num:
            return
        time.sleep(0.2)
    raise AssertionError(f"{path} did not get {num} lines")
