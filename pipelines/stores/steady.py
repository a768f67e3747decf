"""S3 as a pyarrow file system that retries what may pass and says in one line what does not.

Every use of S3 goes through it: our own reads and writes, Parquet's random access, Ray Train's checkpoints. Reading
goes on at the byte where a connection broke; fewer bytes than there are count as a fault. An object of up to
`WHOLE_BYTES` is sent at once when it is closed, and again where that fails; a longer one goes up in parts, which the
client library retries. There are no directories to make: S3 has none.
"""

import io
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs
from pyarrow.fs import FileInfo, FileSelector, FileType

from pipelines.stores import faults, s3
from pipelines.stores.retry import Backoff, steadily, within

WHOLE_BYTES = 32 * 1024**2
READ_AHEAD_BYTES = 2**18  # of a request, at least: gzip asks for 8 kB at a time
LEAST_BYTES_PER_S = 20_000  # slower than this is a fault, beyond the time in which the server may be silent

T = TypeVar("T")


class SteadyS3(pyarrow.fs.FileSystemHandler):
    """Wrap it: `pyarrow.fs.PyFileSystem(SteadyS3(settings))`. Pickled, it is its settings: workers connect anew."""

    def __init__(self, settings: s3.S3Settings) -> None:
        self.settings = settings
        self.backoff = Backoff(attempts=settings.attempts)
        self._known_buckets: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return SteadyS3, (self.settings,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SteadyS3) and self.settings == other.settings

    def __hash__(self) -> int:
        return hash(self.settings)

    @property
    def once(self) -> pyarrow.fs.FileSystem:
        return s3.clients(self.settings).once

    @property
    def patient(self) -> pyarrow.fs.FileSystem:
        return s3.clients(self.settings).patient

    def do(self, path: str, action: Callable[[int], T], *, attempts: int | None = None) -> T:
        """An action on `bucket/key`, retried; StorageError in one line, but FileNotFoundError where there is no key."""
        backoff = self.backoff if attempts is None else self.backoff._replace(attempts=attempts)
        try:
            return steadily(action, f"s3://{path}", backoff)
        except FileNotFoundError:
            self._check_bucket(path)
            raise
        except Exception as error:  # of pyarrow, or with s3fs of botocore and aiohttp
            raise self._explained(error, path) from error

    def limit_s(self, num_bytes: int) -> float:
        """How long moving so many bytes may take."""
        return self.settings.connect_timeout_s + self.settings.read_timeout_s + num_bytes / LEAST_BYTES_PER_S

    def _explained(self, error: Exception, path: str) -> faults.StorageError:
        return faults.explained_s3(error, path, self.settings.endpoint, self.backoff.attempts)

    def _check_bucket(self, path: str) -> None:
        """RefusedError where there is no such bucket: then a missing object is no wonder."""
        bucket, _, key = path.partition("/")
        if not key or bucket in self._known_buckets:
            return
        try:
            info = steadily(lambda _: self.once.get_file_info(bucket), f"s3://{bucket}", self.backoff)
        except faults.StorageError:
            raise
        except Exception as error:  # as above; who may not ask for the bucket may still read in it
            if faults.kind_of(error) != "denied":
                raise self._explained(error, path) from error
        else:
            if info.type == FileType.NotFound:
                raise self._explained(OSError("NoSuchBucket"), path)
        self._known_buckets.add(bucket)

    # --- what pyarrow calls ---------------------------------------------------------------------

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> FileInfo:
        info = self.do(path, lambda _: self.once.get_file_info(path))
        if info.type == FileType.NotFound:
            self._check_bucket(path)
        return info

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        found = self.do(selector.base_dir, lambda _: self.once.get_file_info(selector))
        if not found:
            self._check_bucket(selector.base_dir)
        return found

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing: a directory is there once something is in it."""

    def delete_dir(self, path: str) -> None:
        self.do(path, _deleting(lambda: self.once.delete_dir(path)))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.do(path, lambda _: self.once.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        raise faults.RefusedError("all buckets are not to be emptied")

    def delete_file(self, path: str) -> None:
        self.do(path, _deleting(lambda: self.once.delete_file(path)))

    def move(self, src: str, dest: str) -> None:
        self.copy_file(src, dest)
        self.delete_file(src)

    def copy_file(self, src: str, dest: str) -> None:
        self.do(dest, lambda _: self.once.copy_file(src, dest))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_Reader(self, path), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(_Writer(self, path, metadata), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError("an object of S3 cannot grow")


def _deleting(delete: Callable[[], None]) -> Callable[[int], None]:
    """The deletion as an action: what is gone at a later attempt went at an earlier one, whose answer was lost."""

    def action(number: int) -> None:
        try:
            delete()
        except FileNotFoundError:
            if number == 1:
                raise

    return action


class _Reader(io.RawIOBase):
    """An object's bytes, at any place."""

    def __init__(self, store: SteadyS3, path: str) -> None:
        self._store, self._path, self._at = store, path, 0
        self._held_at, self._held = 0, b""  # what came beyond what was asked for, with what was
        self._file, self._size = store.do(path, lambda _: self._open())

    def _open(self) -> tuple[pa.NativeFile, int]:
        file = self._store.once.open_input_file(self._path)
        return file, file.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        wanted = left if size is None or size < 0 else min(size, left)
        if not wanted:
            return b""
        start = self._at - self._held_at
        if start < 0 or start + wanted > len(self._held):
            fetched = min(left, max(wanted, READ_AHEAD_BYTES))
            self._held = self._store.do(self._path, lambda number: self._get(fetched, number))
            self._held_at, start = self._at, 0
        data = self._held[start : start + wanted]
        if len(self._held) > READ_AHEAD_BYTES:
            self._held = b""
        self._at += wanted
        return data

    def _get(self, wanted: int, number: int) -> bytes:
        if number > 1:  # s3fs keeps what it has read ahead; and a read that was given up may still be going on
            self._file, _ = self._open()
        self._file.seek(self._at)
        data = within(self._store.limit_s(wanted), lambda: self._file.read(wanted))
        if len(data) < wanted:
            raise faults.TruncatedError(f"{len(data)} of {wanted} bytes came, from byte {self._at} on")
        return data

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Writer:
    """Bytes that become an object when they are closed, and only then: one that is dropped leaves nothing behind."""

    def __init__(self, store: SteadyS3, path: str, metadata: Any) -> None:
        self._store, self._path = store, path
        self._metadata = dict(metadata) if metadata else None
        self._held = io.BytesIO()
        self._stream: pa.NativeFile | None = None
        self._size = 0
        self.closed = False

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Nothing: an object is there whole or not at all."""

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self._stream is None and self._size + size <= WHOLE_BYTES:
            self._held.write(data)
        else:
            self._store.do(self._path, lambda _: self._append(data), attempts=1)
        self._size += size
        return size

    def _append(self, data: Any) -> None:
        if self._stream is None:
            self._stream = self._open(self._store.patient)
            self._stream.write(self._held.getvalue())
            self._held = io.BytesIO()
        self._stream.write(data)

    def _open(self, client: pyarrow.fs.FileSystem) -> pa.NativeFile:
        return client.open_output_stream(self._path, compression=None, metadata=self._metadata)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True  # first: what has failed to close is not to be closed again
        if (stream := self._stream) is not None:
            self._store.do(self._path, lambda _: stream.close(), attempts=1)
        else:
            limit_s = self._store.limit_s(self._size)
            self._store.do(self._path, lambda _: within(limit_s, self._send))

    def _send(self) -> None:
        with self._open(self._store.once) as stream:
            stream.write(self._held.getvalue())
