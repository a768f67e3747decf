"""The files that paths, directories and globs name, on disk and on S3 alike."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyarrow.fs

from pipelines.config import InputError
from pipelines.stores.faults import StorageError
from pipelines.stores.paths import absolute, filesystem, is_s3

log = logging.getLogger(__name__)


class FileEntry(NamedTuple):
    """A file that was listed."""

    uri: str
    name: str  # relative to the directory or glob that it was found by; a file given itself: its last part
    num_bytes: int  # -1: there is no such file
    mtime_ns: int  # last modification, nanoseconds since 1970; 0 where unknown


def expand(patterns: Sequence[str], suffixes: Sequence[str]) -> list[FileEntry]:
    """The files that paths, directories (all below them) and globs (`*`, `?`, `[]`, `**`) name.

    In the order of the patterns, sorted by name within each; a file named twice counts once. Files with
    other suffixes are left out of directories and globs, and counted in the log; given themselves they are an
    InputError, as is a pattern that finds nothing. A single file that is missing is listed with num_bytes -1,
    so that it can be reported beside the others; so is a link to a file that is not there.
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
        raise InputError(f"no input found: {', '.join(entry.uri for entry in found.values())} does not exist")
    return list(found.values())


def _expand_one(pattern: str, suffixes: tuple[str, ...]) -> tuple[list[FileEntry], int]:
    uri = absolute(pattern)
    try:
        files, path = filesystem(uri)
        info = files.get_file_info(path)
        if info.type == pyarrow.fs.FileType.Directory:
            infos, base = _all_below(files, path, uri), path
        elif info.type == pyarrow.fs.FileType.NotFound and re.search(r"[*?\[]", path):
            infos, base = _glob(files, path, uri)
        else:
            return [_single(pattern, uri, info, suffixes)], 0
    except StorageError:
        raise
    except OSError as error:
        raise InputError(f"{pattern}: cannot be listed: {error}") from error
    listed = (pyarrow.fs.FileType.File, pyarrow.fs.FileType.NotFound)  # not found: behind a link
    infos = sorted((i for i in infos if i.type in listed), key=lambda i: i.path)
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


def _all_below(files: pyarrow.fs.FileSystem, path: str, uri: str) -> list[pyarrow.fs.FileInfo]:
    """What stands below a directory, at any depth; nothing where it is not there."""
    if is_s3(uri):
        return files.get_file_info(pyarrow.fs.FileSelector(path, recursive=True, allow_not_found=True))
    return files.get_file_info(list(_walk(path, frozenset()))) if os.path.isdir(path) else []


def _walk(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """The paths below a directory on disk. Links are followed, but for those to a directory that they stand in."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        log.warning("%s leads back to a directory that it stands in, and is not followed", folder)
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry.path
            if entry.is_dir():
                yield from _walk(entry.path, above | {here})


def _glob(files: pyarrow.fs.FileSystem, path: str, uri: str) -> tuple[list[pyarrow.fs.FileInfo], str]:
    """(what matches, with all below a directory that matches; the directory before the first wildcard)."""
    parts = path.split("/")
    first = next(n for n, part in enumerate(parts) if re.search(r"[*?\[]", part))
    base = "/".join(parts[:first]) or "/"
    try:
        shape = re.compile(_translate(parts[first:]) + r"(/.*)?", re.DOTALL)
    except re.error as error:
        raise InputError(f"{path}: not a glob: {error}; characters are listed in brackets, [abc] or [a-z]") from error
    skip = len(base.rstrip("/")) + 1
    return [info for info in _all_below(files, base, uri) if shape.fullmatch(info.path[skip:])], base


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
