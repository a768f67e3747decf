"""Sessions in this process: gone when it ends."""

import threading
import time
import uuid
from collections.abc import Iterator

from .store import Blob, ConflictError, Entry


class MemoryStore:
    """A dictionary."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[Blob, float]] = {}

    def get(self, name: str) -> Blob | None:
        found = self._kept.get(name)
        return None if found is None else found[0]

    def put(self, name: str, data: bytes, tag: str | None) -> str:
        with self._lock:
            found = self.get(name)
            if (None if found is None else found.tag) != tag:
                raise ConflictError(name)
            new = Blob(data, uuid.uuid4().hex)
            self._kept[name] = new, time.time()
            return new.tag

    def delete(self, name: str) -> bool:
        with self._lock:
            return self._kept.pop(name, None) is not None

    def entries(self, group: str | None = None) -> Iterator[Entry]:
        with self._lock:
            kept = sorted(self._kept.items())
        for name, (blob, modified_s) in kept:
            if group is None or name.startswith(f"{group}/"):
                yield Entry(name, len(blob.data), modified_s)
