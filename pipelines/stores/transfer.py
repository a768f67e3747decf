"""Moving bytes between this machine's disk and a store, and putting files in their places on a disk.

What is put in place is flushed first and gets its name by a rename, which on NFS too is seen whole or not at all. No
locks are used: two that write the same name leave one of the two, whole, and of two that create it one succeeds.
"""

import errno
import os
import shutil
import uuid
from pathlib import Path

from pipelines.stores.faults import TruncatedError
from pipelines.stores.paths import filesystem
from pipelines.stores.retry import Backoff, steadily

_COPY_BYTES = 16 * 1024**2  # of one request
STALE = Backoff(attempts=4, first_s=0.05)  # NFS: opened again, a file that was replaced is the new one


def upload(path: Path, uri: str) -> None:
    """A local file to S3; the object appears when all is sent."""
    files, key = filesystem(uri)
    target = files.open_output_stream(key, compression=None)  # not `with`: what is closed is there, even cut short
    with path.open("rb") as source:
        shutil.copyfileobj(source, target, _COPY_BYTES)
    target.close()


def download(uri: str, path: Path) -> None:
    """An object of S3 to a local file, whose folders are made."""
    files, key = filesystem(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.open_input_file(key) as source, path.open("wb") as target:
        size = source.size()
        shutil.copyfileobj(source, target, _COPY_BYTES)
        if target.tell() != size:
            raise TruncatedError(f"{uri}: {target.tell()} of {size} bytes came")


def read_local(path: Path) -> bytes:
    return steadily(lambda _: path.read_bytes(), str(path), STALE)


def beside(final: Path, kind: str) -> Path:
    """A hidden name in the same folder, so that a rename is enough."""
    return final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.{kind}")


def put_file(fresh: Path, final: Path, *, flush: bool = True) -> None:
    """Gives a complete file its name; it is on the disk when this returns, or without `flush` some time later."""
    if flush:
        _sync(fresh)
    fresh.replace(final)
    if flush:
        _sync(final.parent)


def create_file(fresh: Path, final: Path) -> bool:
    """Gives a complete file its name, if nothing has it; whether it did. Needs a disk that knows hard links."""
    _sync(fresh)
    try:
        os.link(fresh, final)
    except FileExistsError:
        return False
    _sync(final.parent)
    return True


def make_parent(path: Path) -> None:
    """The directory that a file or directory will stand in."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from error
    except FileNotFoundError as error:  # the system's own folders, such as /proc
        raise PermissionError(errno.EPERM, "nothing can be made there", str(path.parent)) from error


def put_directory(local: Path, final: Path) -> None:
    """Copies a directory and gives the copy its name as a whole; what had it is deleted."""
    make_parent(final)
    fresh, old = beside(final, "tmp"), beside(final, "old")
    try:
        fresh.mkdir()
        for path in sorted(local.rglob("*")):  # not copytree, which hides why it failed
            copy = fresh / path.relative_to(local)
            copy.mkdir() if path.is_dir() else shutil.copyfile(path, copy)
        for path in (*fresh.rglob("*"), fresh):
            _sync(path)
        if final.exists():
            final.rename(old)
        fresh.rename(final)
        _sync(final.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks do not sync directories
            raise
    finally:
        os.close(descriptor)
