"""One driver a run: a second one is refused while the first lives, and takes over once it is dead."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines import claim, storage
from pipelines.claim import CLAIM, claimed, clear_dead
from pipelines.config import InputError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT_S", 0.05)
    monkeypatch.setattr(claim, "STALE_S", 2.0)


def leave(output: str, **changes: Any) -> None:
    """What a driver left that died."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    found = {"driver": "other", "machine": claim._machine(), "pid": dead.pid, "beat": 3} | changes
    storage.write_json(storage.join(output, CLAIM), found)


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_second_driver_is_refused_while_the_first_is_at_work(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    output = str(tmp_path / "run") if where == "disk" else request.getfixturevalue("s3_bucket") + "/claimed"
    with claimed(output, "train"):
        with (
            pytest.raises(InputError, match=r"another train is at work on .*: process \d+ on .*; wait until"),
            claimed(output, "train"),
        ):
            raise AssertionError("two at work")
        assert storage.exists(storage.join(output, CLAIM))
    assert storage.list_names(output) == []


def test_the_claim_goes_with_a_driver_that_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no more"), claimed(str(tmp_path), "train"):
        raise RuntimeError("no more")
    assert list(tmp_path.iterdir()) == []


def test_a_dead_process_of_this_machine_is_followed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "STALE_S", 1e6)
    leave(str(tmp_path))
    with claimed(str(tmp_path), "train"):
        assert json.loads((tmp_path / CLAIM).read_text())["driver"] != "other"


def test_one_of_another_machine_is_dead_when_it_writes_no_more(tmp_path: Path) -> None:
    leave(str(tmp_path), machine="elsewhere pid:[1]")
    began = time.monotonic()
    with claimed(str(tmp_path), "train"):
        assert time.monotonic() - began >= claim.STALE_S
        assert json.loads((tmp_path / CLAIM).read_text())["driver"] != "other"


def test_a_driver_that_was_taken_for_dead_ends_when_it_wakes(tmp_path: Path) -> None:
    def work() -> None:
        with claimed(str(tmp_path), "train"):
            for _ in range(100):  # the other one beats too
                leave(str(tmp_path))
                time.sleep(0.3)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert json.loads((tmp_path / CLAIM).read_text())["driver"] == "other"  # whose it is now


def test_of_two_that_start_at_once_the_later_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim.time, "sleep", lambda seconds: leave(str(tmp_path), machine="elsewhere pid:[1]", pid=7))
    with pytest.raises(InputError, match="process 7 on elsewhere; wait"), claimed(str(tmp_path), "train"):
        raise AssertionError("two at work")
    assert json.loads((tmp_path / CLAIM).read_text())["driver"] == "other"


def test_what_a_killed_driver_was_writing_goes_too(tmp_path: Path) -> None:
    (tmp_path / f".{CLAIM}.0123abcd.tmp").write_text("{")
    with claimed(str(tmp_path), "train"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_claim_of_the_dead_is_cleared_and_that_of_the_living_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stale_s, changes in ((1e6, {}), (0.2, {"machine": "elsewhere pid:[1]"})):
        monkeypatch.setattr(claim, "STALE_S", stale_s)
        leave(str(tmp_path), **changes)
        (tmp_path / f".{CLAIM}.0123abcd.tmp").write_text("{")
        (tmp_path / "done.json").write_text("{}")
        clear_dead(str(tmp_path), "train")
        assert [path.name for path in tmp_path.iterdir()] == ["done.json"]
    monkeypatch.setattr(claim, "STALE_S", 60.0)
    with claimed(str(tmp_path), "train"):
        clear_dead(str(tmp_path), "train")
        assert (tmp_path / CLAIM).exists()
