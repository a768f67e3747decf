"""Paths on any store: on disk, on NFS, or s3://bucket/key. Inputs, stores, checkpoints and results go this way.

Nothing is ever seen half written: on disk a file gets its name by a rename when it is complete and flushed; on S3 an
object appears when its upload ends. Directories have a marker that is written last, and on S3 checksums, checked when
they are read. Bytes are read and written as they are, never unpacked by a file's suffix.

S3 is reached as the environment says (`pipelines/stores/s3.py` lists the variables). What may pass is tried again with
growing pauses, and told in the log; what stays is a StorageError in one line: RefusedError where the command names what
is not there or not allowed (no bucket, no permission, wrong credentials, a read-only disk), DamagedError where a
checksum does not match, StorageError itself where a store does not answer or a disk is full. A missing file is
FileNotFoundError.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs

from pipelines.stores.directories import local_directory, upload_directory
from pipelines.stores.faults import DamagedError, RefusedError, StorageError, disk_faults
from pipelines.stores.listing import FileEntry, expand
from pipelines.stores.paths import absolute, filesystem, is_s3, join
from pipelines.stores.sums import check as check_sums
from pipelines.stores.sums import seal
from pipelines.stores.transfer import beside, create_file, download, make_parent, put_file, read_local, upload

__all__ = [
    "DamagedError",
    "FileEntry",
    "RefusedError",
    "StorageError",
    "absolute",
    "check_sums",
    "create_json",
    "delete",
    "disk_faults",
    "exists",
    "expand",
    "filesystem",
    "is_directory",
    "is_s3",
    "join",
    "list_names",
    "list_sizes",
    "local_directory",
    "local_file",
    "read_bytes",
    "read_json",
    "seal",
    "upload_directory",
    "write_bytes",
    "write_json",
    "writing",
]

_SETTLED_S = 1.0  # after a file was written to S3, everybody who saw none has written theirs


def _info(uri: str) -> pyarrow.fs.FileInfo:
    files, path = filesystem(uri)
    with _faults(uri):
        return files.get_file_info(path)


def exists(uri: str) -> bool:
    return _info(uri).type != pyarrow.fs.FileType.NotFound


def is_directory(uri: str) -> bool:
    return _info(uri).type == pyarrow.fs.FileType.Directory


def list_names(uri: str) -> list[str]:
    """The names directly in a directory, sorted; none where there is no such directory."""
    return sorted(info.base_name for info in _listed(uri))


def list_sizes(uri: str) -> dict[str, int]:
    """The files directly in a directory: name -> bytes; none where there is no such directory."""
    return {info.base_name: info.size for info in _listed(uri) if info.type == pyarrow.fs.FileType.File}


def _listed(uri: str) -> list[pyarrow.fs.FileInfo]:
    files, path = filesystem(uri)
    with _faults(uri):
        return files.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))


def delete(uri: str) -> None:
    """Deletes a file; OSError where there is none."""
    files, path = filesystem(uri)
    with _faults(uri):
        files.delete_file(path)


def _faults(uri: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if is_s3(uri) else disk_faults(uri)


def read_bytes(uri: str) -> bytes:
    if not is_s3(uri):
        with disk_faults(uri):
            return read_local(Path(absolute(uri)))
    files, path = filesystem(uri)
    with files.open_input_file(path) as stream:
        return stream.read()


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_bytes(uri: str, data: bytes, *, flush: bool = True) -> None:
    """Writes a file. Without `flush` it is not awaited that the disk has it: a power cut may take it."""
    with writing(uri, flush=flush) as path:
        path.write_bytes(data)


def write_json(uri: str, value: Any) -> None:
    """Indented, keys in the given order."""
    write_bytes(uri, _json_bytes(value))


def create_json(uri: str, value: Any) -> bool:
    """Writes a file that is not there yet; whether it did, and so what is there is `value`.

    Of several that create it at once one succeeds. On S3, which is written without conditions here, each looks again
    after a second: that does where they do not take longer between looking and writing.
    """
    data = _json_bytes(value)
    if is_s3(uri):
        if exists(uri):
            return False
        write_bytes(uri, data)
        time.sleep(_SETTLED_S)
        return read_bytes(uri) == data
    final = Path(absolute(uri))
    with disk_faults(uri):
        make_parent(final)
        path = beside(final, "tmp")
        try:
            path.write_bytes(data)
            return create_file(path, final)
        finally:
            path.unlink(missing_ok=True)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


@contextlib.contextmanager
def writing(uri: str, *, flush: bool = True) -> Iterator[Path]:
    """A local path to write a file to, which becomes `uri` when the block ends well and vanishes otherwise.

    Parent directories are made. For S3 the file lies on this machine's temporary disk until it is uploaded.
    """
    if is_s3(uri):
        filesystem(uri)  # a wrong path is told before anything is written
        with tempfile.TemporaryDirectory(prefix="rmt-") as directory:
            path = Path(directory) / uri.rpartition("/")[2]
            with disk_faults(directory):
                yield path
            upload(path, uri)
        return
    final = Path(absolute(uri))
    with disk_faults(uri):
        make_parent(final)
        path = beside(final, "tmp")
        try:
            yield path
            put_file(path, final, flush=flush)
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """The file itself where it is local; otherwise a copy that goes when the block ends."""
    if not is_s3(uri):
        yield Path(absolute(uri))
        return
    with tempfile.TemporaryDirectory(prefix="rmt-") as directory:
        path = Path(directory) / uri.rpartition("/")[2]
        with disk_faults(directory):
            download(uri, path)
        yield path
