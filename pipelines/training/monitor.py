"""What workers and the driver of a run tell each other."""

from typing import Any


class Monitor:
    """An actor between the workers and the driver: what they have to say one way, the wish to stop the other."""

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}
        self.notes: list[str] = []
        self.fault: str | None = None
        self.begun = self.stopping = False

    def begin(self) -> None:
        """Takes that a worker has started."""
        self.begun = True

    def has_begun(self) -> bool:
        return self.begun

    def note(self, line: str) -> None:
        """Takes what happened, for the log."""
        self.notes.append(line)

    def noted(self) -> list[str]:
        return self.notes

    def tell(self, metrics: dict[str, Any]) -> None:
        self.metrics = metrics

    def latest(self) -> dict[str, Any]:
        return self.metrics

    def refuse(self, fault: str) -> None:
        """Takes what is wrong with what the user gave."""
        self.fault = fault

    def refused(self) -> str | None:
        return self.fault

    def stop(self) -> None:
        self.stopping = True

    def is_stopping(self) -> bool:
        return self.stopping
