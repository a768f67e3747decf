"""Paths on any store: a local path, or s3://bucket/key.

S3 is reached through pyarrow with the usual environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN (or the machine's role), AWS_REGION, and AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL for a store
that is not Amazon's. Nothing is ever seen half written: on disk a file gets its name by a rename when it is
complete and flushed; on S3 an object appears when its upload ends. Bytes are read and written as they are, never
unpacked by a file's suffix.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.fs

from pipelines.config import InputError

log = logging.getLogger(__name__)

_COPY_BYTES = 4 * 1024**2


class FileEntry(NamedTuple):
    """A file that was listed."""

    uri: str
    name: str  # relative to the directory or glob that it was found by; a file given itself: its last part
    num_bytes: int  # -1: there is no such file
    mtime_ns: int  # last modification, nanoseconds since 1970; 0 where unknown


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def absolute(uri: str) -> str:
    """The URI as any process can use it: local paths made absolute, `~` opened, no slash at the end."""
    if is_s3(uri):
        return uri.rstrip("/")
    if re.match(r"[a-z][a-z0-9+]*://", uri):
        raise InputError(f"{uri}: needs a local path or s3://bucket/key")
    return os.path.abspath(os.path.expanduser(uri))


def filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """(the pyarrow file system, the path in it)."""
    if not is_s3(uri):
        return pyarrow.fs.LocalFileSystem(), absolute(uri)
    path = uri.removeprefix("s3://").rstrip("/")
    if not path.split("/")[0]:
        raise InputError(f"{uri}: needs a bucket, s3://bucket/key")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return _s3(endpoint, region), path


@functools.lru_cache(maxsize=4)
def _s3(endpoint: str | None, region: str | None) -> pyarrow.fs.FileSystem:
    options: dict[str, Any] = {"connect_timeout": 10, "request_timeout": 60}
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        options.update(endpoint_override=host.rstrip("/"), scheme=scheme or "https")
        region = region or "us-east-1"
    return pyarrow.fs.S3FileSystem(region=region, **options)


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/") if uri != "/" else "", *names])


def _info(uri: str) -> pyarrow.fs.FileInfo:
    files, path = filesystem(uri)
    return files.get_file_info(path)


def exists(uri: str) -> bool:
    return _info(uri).type != pyarrow.fs.FileType.NotFound


def is_directory(uri: str) -> bool:
    return _info(uri).type == pyarrow.fs.FileType.Directory


def list_names(uri: str) -> list[str]:
    """The names directly in a directory, sorted; none where there is no such directory."""
    files, path = filesystem(uri)
    found = files.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in found)


def delete(uri: str) -> None:
    """Deletes a file; OSError where there is none."""
    files, path = filesystem(uri)
    files.delete_file(path)


# --- reading and writing ----------------------------------------------------------------------------


def read_bytes(uri: str) -> bytes:
    files, path = filesystem(uri)
    with files.open_input_stream(path, compression=None) as stream:
        return stream.read()


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_bytes(uri: str, data: bytes) -> None:
    with writing(uri) as path:
        path.write_bytes(data)


def write_json(uri: str, value: Any) -> None:
    """Indented, keys in the given order."""
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def writing(uri: str) -> Iterator[Path]:
    """A local path to write a file to, which becomes `uri` when the block ends well and vanishes otherwise.

    Parent directories are made. For S3 the file lies on this machine's temporary disk until it is uploaded.
    """
    if is_s3(uri):
        with tempfile.TemporaryDirectory(prefix="rmt-") as directory:
            path = Path(directory) / uri.rpartition("/")[2]
            yield path
            _upload(path, uri)
        return
    final = Path(absolute(uri))
    final.parent.mkdir(parents=True, exist_ok=True)
    path = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield path
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        path.replace(final)
        _sync_directory(final.parent)
    finally:
        path.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks do not sync directories
            raise
    finally:
        os.close(descriptor)


def _upload(path: Path, uri: str) -> None:
    files, key = filesystem(uri)
    with path.open("rb") as source, files.open_output_stream(key, compression=None) as target:
        shutil.copyfileobj(source, target, _COPY_BYTES)


@contextlib.contextmanager
def local_directory(uri: str) -> Iterator[Path]:
    """The directory itself where it is local; otherwise a copy that goes when the block ends."""
    if not is_s3(uri):
        path = Path(absolute(uri))
        if not path.is_dir():
            raise InputError(f"{uri}: there is no such directory")
        yield path
        return
    files, root = filesystem(uri)
    found = files.get_file_info(pyarrow.fs.FileSelector(root, recursive=True, allow_not_found=True))
    if not found:
        raise InputError(f"{uri}: there is no such directory")
    with tempfile.TemporaryDirectory(prefix="rmt-") as directory:
        for info in found:
            if info.type == pyarrow.fs.FileType.File:
                _download(files, info.path, Path(directory) / info.path[len(root) + 1 :])
        yield Path(directory)


@contextlib.contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """The file itself where it is local; otherwise a copy that goes when the block ends."""
    if not is_s3(uri):
        yield Path(absolute(uri))
        return
    with tempfile.TemporaryDirectory(prefix="rmt-") as directory:
        path = Path(directory) / uri.rpartition("/")[2]
        _download(*filesystem(uri), path)
        yield path


def _download(files: pyarrow.fs.FileSystem, key: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.open_input_stream(key, compression=None) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, _COPY_BYTES)


def upload_directory(local: Path, uri: str, *, marker: str | None = None) -> None:
    """Puts a finished local directory at `uri`, replacing what was there.

    On disk: copied beside it and renamed as a whole. On S3: file by file, `marker` (a file name directly in
    the directory that says "complete") removed first and written last.
    """
    local = Path(local)
    if not is_s3(uri):
        final = Path(absolute(uri))
        final.parent.mkdir(parents=True, exist_ok=True)
        token = uuid.uuid4().hex[:8]
        fresh, old = (final.with_name(f".{final.name}.{token}.{kind}") for kind in ("tmp", "old"))
        shutil.copytree(local, fresh)
        if final.exists():
            final.rename(old)
        fresh.rename(final)
        _sync_directory(final.parent)
        shutil.rmtree(old, ignore_errors=True)
        return
    names = sorted(str(path.relative_to(local)) for path in local.rglob("*") if path.is_file())
    names.sort(key=lambda name: name == marker)
    if marker is not None and exists(join(uri, marker)):
        delete(join(uri, marker))
    for name in names:
        _upload(local / name, join(uri, *Path(name).parts))


# --- listing ----------------------------------------------------------------------------------------


def expand(patterns: Sequence[str], suffixes: Sequence[str]) -> list[FileEntry]:
    """The files that paths, directories (all below them) and globs (`*`, `?`, `[]`, `**`) name.

    In the order of the patterns, sorted by name within each; a file named twice counts once. Files with
    other suffixes are left out of directories and globs, and counted in the log; given themselves they are an
    InputError, as is a pattern that finds nothing. A single file that is missing is listed with num_bytes -1,
    so that it can be reported beside the others.
    """
    found: dict[str, FileEntry] = {}
    num_ignored = num_repeated = 0
    for pattern in patterns:
        entries, ignored = _expand_one(pattern, tuple(suffix.lower() for suffix in suffixes))
        num_ignored += ignored
        for entry in entries:
            num_repeated += entry.uri in found
            found.setdefault(entry.uri, entry)
    if num_ignored:
        log.info("ignored %d files whose suffix is none of %s", num_ignored, ", ".join(suffixes))
    if num_repeated:
        log.info("%d files are named more than once and are read once", num_repeated)
    if all(entry.num_bytes < 0 for entry in found.values()):
        raise InputError(f"no input found: {', '.join(patterns)} does not exist")
    return list(found.values())


def _expand_one(pattern: str, suffixes: tuple[str, ...]) -> tuple[list[FileEntry], int]:
    uri = absolute(pattern)
    try:
        files, path = filesystem(uri)
        info = files.get_file_info(path)
        if info.type == pyarrow.fs.FileType.Directory:
            infos, base = files.get_file_info(pyarrow.fs.FileSelector(path, recursive=True)), path
        elif info.type == pyarrow.fs.FileType.NotFound and re.search(r"[*?\[]", path):
            infos, base = _glob(files, path)
        else:
            return [_single(pattern, uri, info, suffixes)], 0
    except OSError as error:
        raise InputError(f"{pattern}: cannot be listed: {error}") from error
    infos = sorted((i for i in infos if i.type == pyarrow.fs.FileType.File), key=lambda i: i.path)
    prefix = "s3://" if is_s3(uri) else ""
    skip = len(base.rstrip("/")) + 1
    kept = [i for i in infos if i.path.lower().endswith(suffixes)]
    if not kept:
        seen = f" ({len(infos)} others)" if infos else ""
        raise InputError(f"no input found: {pattern} holds no {', '.join(suffixes)} file{seen}")
    return [_entry(i, prefix + i.path, i.path[skip:]) for i in kept], len(infos) - len(kept)


def _entry(info: pyarrow.fs.FileInfo, uri: str, name: str) -> FileEntry:
    return FileEntry(uri, name, info.size if info.size is not None else -1, info.mtime_ns or 0)


def _single(pattern: str, uri: str, info: pyarrow.fs.FileInfo, suffixes: tuple[str, ...]) -> FileEntry:
    if not uri.lower().endswith(suffixes):
        missing = info.type == pyarrow.fs.FileType.NotFound
        fault = "does not exist" if missing else "has an unsupported suffix"
        allowed = ", ".join(suffixes)
        raise InputError(f"{pattern} {fault}; give directories, globs or files that end in {allowed}")
    if info.type == pyarrow.fs.FileType.Unknown:
        raise InputError(f"{pattern} is neither a file nor a directory")
    return _entry(info, uri, uri.rpartition("/")[2])


def _glob(files: pyarrow.fs.FileSystem, path: str) -> tuple[list[pyarrow.fs.FileInfo], str]:
    """(what matches, with all below a directory that matches; the directory before the first wildcard)."""
    parts = path.split("/")
    first = next(n for n, part in enumerate(parts) if re.search(r"[*?\[]", part))
    base = "/".join(parts[:first]) or "/"
    shape = re.compile(_translate(parts[first:]) + r"(/.*)?", re.DOTALL)
    selector = pyarrow.fs.FileSelector(base, recursive=True, allow_not_found=True)
    skip = len(base.rstrip("/")) + 1
    return [info for info in files.get_file_info(selector) if shape.fullmatch(info.path[skip:])], base


def _translate(parts: list[str]) -> str:
    """A glob's parts as a regular expression: `*`, `?` stay within a name, `**` is any directories."""
    out = []
    for n, part in enumerate(parts):
        last = n == len(parts) - 1
        if part == "**":
            out.append(r".*" if last else r"(?:[^/]+/)*")
            continue
        text = re.sub(
            r"\[!?\]?[^\]]*\]|\*+|\?|[^*?\[]+|\[",
            lambda m: _glob_piece(m[0]),
            part,
        )
        out.append(text + ("" if last else "/"))
    return "".join(out)


def _glob_piece(piece: str) -> str:
    if piece.startswith("*"):
        return "[^/]*"
    if piece == "?":
        return "[^/]"
    if piece.startswith("[") and len(piece) > 1:
        inside = piece[1:-1].replace("\\", r"\\")
        return f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"
    return re.escape(piece)
