"""That one driver works on an output at a time: what a second took for left-overs, the first may be writing.

The driver leaves `driver.json` in the directory and writes it anew every few seconds, on disk and on S3 alike, without
locks. Who finds one watches whether it changes, so that clocks of different machines need not agree: one that does is
of a living driver, one that does not for `STALE_S` of a dead one. On the same machine the process is looked for
instead.
"""

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from pipelines import storage
from pipelines.config import InputError

log = logging.getLogger(__name__)

CLAIM = "driver.json"
_OF_RUNS = re.compile(r"config(\.partial)?\.json")  # finished or not; or of a model
BEAT_S, STALE_S = 5.0, 30.0  # between two writings; without one, after which the driver counts as dead
_PAUSES_S = (1.0, 30.0, 30.0)  # behind each Ctrl-C that a driver gives itself: the first asks, the second ends
_SETTLE_S = 0.2  # in which two that start at once have both written, and the later one has it


@contextlib.contextmanager
def claimed(output: str, job: str) -> Iterator[None]:
    """The directory is this process's while the block runs. InputError where another such job is at work there."""
    uri = storage.join(output, CLAIM)
    if (found := _at_work(uri, output, job)) is not None:
        raise _refusal(output, found, job)
    mine = {"driver": uuid.uuid4().hex, "machine": _machine(), "pid": os.getpid(), "beat": 0}
    storage.write_json(uri, mine)
    time.sleep(_SETTLE_S)
    found = _read(uri)
    if found is not None and found["driver"] != mine["driver"]:
        raise _refusal(output, found, job)
    over = threading.Event()
    thread = threading.Thread(target=_keep, args=(uri, mine, over, job), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        found = _read(uri)
        if found is not None and found["driver"] == mine["driver"]:
            _delete(output)


def refuse_runs(output: str) -> None:
    """InputError where a directory holds what its command would take up again, or a model: for commands that do not."""
    if any(_OF_RUNS.fullmatch(name) for name in storage.list_names(output)):
        raise InputError(f"--output {output} holds a run of another command, or a model; give a directory of its own")


def clear_dead(output: str, job: str) -> None:
    """Deletes the claim of a driver that was killed when all was done; that of one that lives stays."""
    if _names(output) and _at_work(storage.join(output, CLAIM), output, job) is None:
        _delete(output)


def _names(output: str) -> list[str]:
    """The claim, and what drivers left that were killed while they wrote theirs."""
    return [name for name in storage.list_names(output) if name == CLAIM or name.startswith(f".{CLAIM}.")]


def _delete(output: str) -> None:
    for name in _names(output):
        with contextlib.suppress(FileNotFoundError):  # another does the same
            storage.delete(storage.join(output, name))


def _at_work(uri: str, output: str, job: str) -> dict[str, Any] | None:
    """The claim of the driver that is at work, within a beat; None, later, where nobody is."""
    first = _read(uri)
    if first is None or _is_dead(first):
        return None
    log.info(
        "another %s, process %s, may be at work on %s; looking for up to %.0f s", job, first["pid"], output, STALE_S
    )
    end = time.monotonic() + STALE_S
    while time.monotonic() < end:
        time.sleep(min(1.0, BEAT_S))
        found = _read(uri)
        if found is None or found != first:
            return found
    return None


def _refusal(output: str, found: dict[str, Any], job: str) -> InputError:
    host = found["machine"].partition(" ")[0]
    return InputError(
        f"another {job} is at work on {output}: process {found['pid']} on {host}; wait until it ends, or end it, and "
        f"give the command again: {STALE_S:.0f} s after its last sign of life it counts as dead"
    )


def _keep(uri: str, mine: dict[str, Any], over: threading.Event, job: str) -> None:
    beat = 0
    while not over.wait(BEAT_S):
        beat += 1
        try:
            found = _read(uri)
            if found is not None and found["driver"] != mine["driver"]:
                log.error("another %s, process %s, has taken over this output: this one ends", job, found["pid"])
                break
            storage.write_json(uri, mine | {"beat": beat})
        except OSError as error:
            log.warning("%s cannot be written (%s): a second %s would not see this one", uri, error, job)
    for pause_s in _PAUSES_S:  # taken over: end at once, as by a second Ctrl-C, without a further checkpoint
        if over.is_set():
            break
        os.kill(os.getpid(), signal.SIGINT)  # to the process: its main thread wakes
        over.wait(pause_s)


def _read(uri: str) -> dict[str, Any] | None:
    """What is there; None for nothing."""
    try:
        return dict(storage.read_json(uri)) if storage.exists(uri) else None
    except (FileNotFoundError, ValueError):  # taken away meanwhile; no JSON: nobody's
        return None


def _machine() -> str:
    """What tells whether a process id may be looked up here: the host and its space of process ids."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}"


def _is_dead(found: dict[str, Any]) -> bool:
    """Whether the process was one of this machine and is gone; False where that cannot be known."""
    if found["machine"] != _machine():
        return False
    try:
        os.kill(found["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's, and alive
        pass
    return False
