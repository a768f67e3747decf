"""Sessions as files: <root>/<first two letters of the group>/<group>/<part>."""

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path

from pipelines import storage

from .store import Blob, ConflictError, Entry, UnavailableError

_MARK = ".sessions"  # by which a directory is known to be one


class DirectoryStore:
    """Files in a directory that all processes which share it can lock (`flock`: a disk, or an NFS 4 mount).

    A file appears by a rename when it is whole and flushed. Comparing and replacing happen under the lock of the
    name's first two letters.
    """

    def __init__(self, root: str) -> None:
        self.root = Path(storage.absolute(root))
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / _MARK).touch()

    def get(self, name: str) -> Blob | None:
        with _asking():
            try:
                data = self._path(name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                self._check_there()
                return None
        return Blob(data, hashlib.sha256(data).hexdigest())

    def put(self, name: str, data: bytes, tag: str | None) -> str:
        with _asking(), self._locked(name):
            found = self.get(name)
            if (None if found is None else found.tag) != tag:
                raise ConflictError(name)
            storage.write_bytes(str(self._path(name)), data)
        return hashlib.sha256(data).hexdigest()

    def delete(self, name: str) -> bool:
        path = self._path(name)
        with _asking(), self._locked(name):
            try:
                path.unlink()
            except FileNotFoundError:
                return False
            with contextlib.suppress(OSError):  # other parts are still there
                path.parent.rmdir()
        return True

    def entries(self, group: str | None = None) -> Iterator[Entry]:
        with _asking():
            self._check_there()
            paths = sorted(self.root.glob(f"??/{group or '*'}/[!.]*"))
        for path in paths:
            with _asking():
                try:
                    found = path.stat()
                except FileNotFoundError:  # deleted meanwhile
                    continue
            yield Entry(f"{path.parent.name}/{path.name}", found.st_size, found.st_mtime)

    def _check_there(self) -> None:
        """OSError where this is not the directory that was opened: one that is no longer mounted looks empty."""
        (self.root / _MARK).stat()

    def _path(self, name: str) -> Path:
        return self.root / name[:2] / name

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        self._check_there()
        path = self.root / name[:2] / ".lock"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
            yield


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    """What a disk says that is full, broken or not mounted, as UnavailableError."""
    try:
        yield
    except OSError as error:
        raise UnavailableError(f"the directory of sessions: {error.strerror or error}") from error
