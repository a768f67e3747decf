"""How far runs are: told by the workers that read, to the driver that waits."""

import time
from collections.abc import Callable, Hashable

_TELL_S = 5.0  # between two tellings


class Tally:
    """An actor that knows how many tokens each run has read."""

    def __init__(self) -> None:
        self._num_read: dict[Hashable, int] = {}

    def tell(self, run: Hashable, num_read: int) -> None:
        """Takes how many it has read since it began; a run that begins again tells so anew."""
        self._num_read[run] = num_read

    def told(self) -> dict[Hashable, int]:
        return self._num_read


class Teller:
    """Adds up the tokens that are read, and tells their number every few seconds."""

    def __init__(self, tell: Callable[[int], object]) -> None:
        self._tell = tell
        self._num_read = 0
        self._next = time.monotonic() + _TELL_S

    def __call__(self, num_tokens: int) -> None:
        self._num_read += num_tokens
        if time.monotonic() >= self._next:
            self._tell(self._num_read)
            self._next = time.monotonic() + _TELL_S
