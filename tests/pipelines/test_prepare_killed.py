"""prepare, killed for real: the driver, then a worker. The same command completes it, the same to the byte."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import tokenizers

from pipelines import prepare
from pipelines.data import inputs

ROOT = Path(__file__).resolve().parents[2]
# The command, with one file a unit.
COMMAND = """
import sys
from pipelines.data import inputs
inputs.UNIT_FILES = 1
from pipelines import prepare
sys.exit(prepare.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-pair encoding: slow enough to be caught at work."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text(50_000, 0)], trainer)
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def text(num_chars: int, seed: int) -> str:
    """Words that no cache remembers."""
    letters = np.random.default_rng(seed).choice(list("etaoinshrdlu    "), num_chars)
    return "".join(letters)


def start(*argv: str | Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", COMMAND, *map(str, argv), "--num-cpus", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd="/", env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until(process: "subprocess.Popen[str]", done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while process.poll() is None and not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]


def kill_with_its_ray(process: "subprocess.Popen[str]") -> None:
    """SIGKILL to the driver alone; Ray's workers end by themselves, its agents later."""
    ray = psutil.Process(process.pid).children(recursive=True)
    agents = [child for child in ray if "Agent" in child.name()]
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs([child for child in ray if child not in agents], timeout=60)
    names = [child.name() for child in alive]
    for child in (*alive, *agents):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    assert not names


def kill_a_worker(process: "subprocess.Popen[str]") -> None:
    """SIGKILL to a process that works on a unit."""

    def killed() -> bool:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                title = " ".join(child.cmdline())
                if re.match(r"ray::(Map\(|_write|encode_and_save)", title):  # the title that it has only while it works
                    child.kill()
                    return True
            except psutil.Error:  # it has just ended
                continue
        return False

    wait_until(process, killed)


def files(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir()}


@pytest.mark.long
def test_killed_driver_and_worker_change_nothing(
    local_ray: None, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for n in range(10):
        (tmp_path / "in" / f"{n}.txt").write_text(text(1_500_000, n))
    argv = ["--input", tmp_path / "in", "--tokenizer", tokenizer, "--segment-len", "100"]
    output = tmp_path / "out"

    killed = start(*argv, "--output", output)
    wait_until(killed, lambda: len(list(output.glob("unit-*"))) >= 2)
    kill_with_its_ray(killed)
    numbers = [path.stem.partition("-")[2] for path in output.glob("unit-*")]
    assert 2 <= len(numbers) < 10
    kept = {output / f"segments-{number}.parquet" for number in numbers}
    before = {path: path.stat().st_mtime_ns for path in kept}

    again = start(*argv, "--output", output)
    wait_until(again, lambda: len(list(output.glob("unit-*"))) > len(kept))
    kill_a_worker(again)
    stdout, stderr = again.communicate(timeout=240)
    assert again.returncode == 0, stderr
    assert stdout.count("\n") == 1
    assert f"going on, {len(kept)} of 10 units are done" in stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == before  # not made again

    monkeypatch.setattr(inputs, "UNIT_FILES", 1)
    assert prepare.main([*map(str, argv), "--output", str(tmp_path / "whole")]) == 0
    assert files(output) == files(tmp_path / "whole")


@pytest.mark.scenario
def test_one_long_document_killed_in_the_middle_keeps_what_was_tokenised(
    local_ray: None, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text(text(12_000_000, 0))
    argv = ["--input", tmp_path / "long.txt", "--tokenizer", tokenizer, "--segment-len", "100"]
    output = tmp_path / "out"

    killed = start(*argv, "--output", output)
    wait_until(killed, lambda: len(list(output.glob("tokens-*"))) >= 4)
    kill_with_its_ray(killed)
    kept = {path: path.stat().st_mtime_ns for path in output.glob("tokens-*")}
    assert 4 <= len(kept) < 12

    again = start(*argv, "--output", output)
    wait_until(again, lambda: len(list(output.glob("tokens-*"))) > len(kept))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # not made again
    kill_a_worker(again)
    assert again.communicate(timeout=240)[0].count("\n") == 1
    assert again.returncode == 0

    assert prepare.main([*map(str, argv), "--output", str(tmp_path / "whole")]) == 0
    assert files(output) == files(tmp_path / "whole")
