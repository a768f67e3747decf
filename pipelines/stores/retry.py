"""Trying again what may pass: a bounded number of times, with growing, jittered pauses, each told in the log."""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from pipelines.stores import faults

log = logging.getLogger(__name__)

T = TypeVar("T")


class Backoff(NamedTuple):
    """How often and how patiently."""

    attempts: int = 6  # the first one included
    first_s: float = 0.25  # the first pause, at most; each further one is at most twice the last
    longest_s: float = 20.0

    def pause_s(self, number: int) -> float:
        """The pause after attempt `number`, from 1 on: random, so that many workers do not come back at once."""
        longest = min(self.longest_s, self.first_s * 2.0 ** (number - 1))
        return random.uniform(0.5, 1.0) * longest  # no need of a seed: nothing that is computed depends on it


def steadily(action: Callable[[int], T], what: str, backoff: Backoff) -> T:
    """The action's result; it is given its attempt's number, from 1 on, and tried again while its fault may pass."""
    for number in range(1, backoff.attempts + 1):
        try:
            return action(number)
        except Exception as error:  # s3fs raises what botocore and aiohttp do; what may not pass goes on its way
            if number == backoff.attempts or not faults.may_pass(error):
                raise
            pause_s = backoff.pause_s(number)
            reason = faults.shown(error)
            log.warning("%s: attempt %d of %d: %s; again in %.1f s", what, number, backoff.attempts, reason, pause_s)
            time.sleep(pause_s)
    raise ValueError(f"attempts {backoff.attempts}: needs at least 1")


def within(limit_s: float, action: Callable[[], T]) -> T:
    """The action's result, or its exception; TimeoutError where it takes longer.

    Client libraries bound silence, not slowness: a byte a second would go on for days. What is given up goes on in a
    thread of its own until the library lets go of it.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(action())
        except BaseException as error:  # handed to the caller's thread
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"too slow: not done after {limit_s:.0f} s")
    return done[0]
