"""Windows made ahead of time, in a background thread, exactly as they would be made in time."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from pipelines.data.lanes import Cursor, Lanes, Window


class _Made(NamedTuple):
    window: Window
    cursors: list[Cursor | None]  # behind it


class _Ahead(NamedTuple):
    """A window that is being made."""

    step: int
    num_segments: int
    made: "Future[_Made]"


class Prefetched:
    """Lanes whose next windows are read while the caller works on this one.

    `expected` says how many segments the window of a step will probably have. A window of another size is made anew,
    from where the one before it ended. What goes wrong in reading is raised where its window is asked for. From the
    first window on, the lanes belong to the background thread.
    """

    def __init__(self, lanes: Lanes, expected: Callable[[int], int], depth: int = 2) -> None:
        self._lanes = lanes
        self._expected = expected
        self._depth = depth
        self._ahead: deque[_Ahead] = deque()
        self._taken: list[Cursor | None] | None = None  # cursors behind the last window that was taken
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="windows")

    def window(self, step: int, num_segments: int) -> Window:
        """The next segments of every lane, as `Lanes.window` gives them."""
        if self._taken is None:
            self._taken = self._lanes.cursors()
        if not self._ahead or (self._ahead[0].step, self._ahead[0].num_segments) != (step, num_segments):
            self._begin_again(step, num_segments)
        made = self._ahead.popleft().made.result()
        self._taken = made.cursors
        while len(self._ahead) < self._depth:
            after = self._ahead[-1].step + 1 if self._ahead else step + 1
            self._ahead.append(self._start(after, self._expected(after), None))
        return made.window

    def cursors(self) -> list[Cursor | None]:
        """Where the lanes are behind the last window that was taken, whatever is made already."""
        return self._lanes.cursors() if self._taken is None else list(self._taken)

    def move(self, cursors: Sequence[Cursor | None]) -> None:
        """Sets the lanes to their cursors, for the next window that is taken."""
        self._discard()
        self._taken = list(cursors)

    def close(self) -> None:
        """Ends the background thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _discard(self) -> None:
        for ahead in self._ahead:
            ahead.made.cancel()
        self._ahead.clear()

    def _begin_again(self, step: int, num_segments: int) -> None:
        self._discard()
        self._ahead.append(self._start(step, num_segments, self._taken))

    def _start(self, step: int, num_segments: int, back_to: list[Cursor | None] | None) -> _Ahead:
        return _Ahead(step, num_segments, self._thread.submit(self._make, step, num_segments, back_to))

    def _make(self, step: int, num_segments: int, back_to: list[Cursor | None] | None) -> _Made:
        if back_to is not None:
            self._lanes.move(back_to)
        window = self._lanes.window(step, num_segments)
        return _Made(window, self._lanes.cursors())
