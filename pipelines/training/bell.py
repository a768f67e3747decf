"""What makes the workers look up from their steps."""

import time
from collections.abc import Callable
from typing import Any

SILENT = (False, False)
_STOP_S, _NOTICE_S = 1.0, 2.0  # seconds between questions; Ray itself learns of notices every 5


class Bell:
    """The driver's wish to stop, and notices of nodes that are about to go (spot machines that are taken back)."""

    def __init__(self, is_stopping: Callable[[], bool]) -> None:
        self.is_stopping = is_stopping
        self._asked_s = self._looked_s = time.monotonic()
        self._known: set[str] = set()

    def wishes(self) -> tuple[bool, bool]:
        """Whether to stop after this step, and whether all workers are to look for notices; asked on rank 0."""
        now, stop, look = time.monotonic(), False, False
        if now - self._asked_s >= _STOP_S:
            self._asked_s, stop = now, self.is_stopping()
        if now - self._looked_s >= _NOTICE_S:
            self._looked_s, look = now, True
        return stop, look

    def is_new(self, notice: Any) -> bool:
        """Whether a notice, None or Ray's `PreemptionInfo`, names nodes not heard of before; equal on all workers."""
        nodes = set() if notice is None else set(notice.preempted_node_ids)
        is_new = bool(nodes - self._known)
        self._known |= nodes
        return is_new
