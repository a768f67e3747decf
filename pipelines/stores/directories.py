"""Whole directories: put in place at once, with checksums where they travel, and brought back."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs

from pipelines.config import InputError
from pipelines.stores import sums
from pipelines.stores.faults import DamagedError, disk_faults
from pipelines.stores.paths import absolute, filesystem, is_s3, join
from pipelines.stores.transfer import download, put_directory, upload

log = logging.getLogger(__name__)


def upload_directory(local: Path, uri: str, *, marker: str | None = None) -> None:
    """Puts a finished local directory at `uri`, replacing what was there.

    On disk: copied beside it, flushed and renamed as a whole. On S3: `marker` (a file name directly in the directory
    that says "complete") is deleted first and written last; before it SHA256SUMS, after which files of an earlier
    directory that this one does not have are deleted.
    """
    local = Path(local)
    if not is_s3(uri):
        with disk_faults(uri):
            put_directory(local, Path(absolute(uri)))
        return
    names = sums.names_in(local)
    before = _names_at(uri)
    for name in [marker, sums.SUMS]:
        if name in before:
            _delete(uri, str(name))
    for name in names:
        if name != marker:
            upload(local / name, join(uri, name))
    with tempfile.TemporaryDirectory(prefix="rmt-") as folder:
        file = Path(folder) / sums.SUMS
        file.write_text(sums.as_text({name: sums.sha256_of(local / name) for name in names}), encoding="utf-8")
        upload(file, join(uri, sums.SUMS))
    for name in set(before) - {*names, sums.SUMS}:
        _delete(uri, name)
    if marker in names:
        upload(local / str(marker), join(uri, str(marker)))


def _names_at(uri: str) -> list[str]:
    """The files below a directory on S3, relative to it; none where there is no such directory."""
    files, root = filesystem(uri)
    found = files.get_file_info(pyarrow.fs.FileSelector(root, recursive=True, allow_not_found=True))
    return sorted(info.path[len(root) + 1 :] for info in found if info.type == pyarrow.fs.FileType.File)


def _delete(uri: str, name: str) -> None:
    files, key = filesystem(join(uri, name))
    files.delete_file(key)


@contextlib.contextmanager
def local_directory(uri: str) -> Iterator[Path]:
    """The directory itself where it is local; otherwise a copy that goes when the block ends.

    A copy is compared with the checksums that came with it; DamagedError where it does not match or is incomplete.
    """
    if not is_s3(uri):
        path = Path(absolute(uri))
        if not path.is_dir():
            raise InputError(f"{uri}: there is no such directory")
        yield path
        return
    names = _names_at(uri)
    if not names:
        raise InputError(f"{uri}: there is no such directory")
    with tempfile.TemporaryDirectory(prefix="rmt-") as folder:
        copy = Path(folder)
        with disk_faults(folder):
            _fetch(uri, names, copy)
        yield copy


def _fetch(uri: str, names: list[str], copy: Path) -> None:
    for name in names:
        download(join(uri, name), copy / name)
    try:
        sums.check(copy, uri)
    except DamagedError as error:  # damaged on the way, or written anew meanwhile: once more
        log.warning("%s; it is read again", error)
        for name in names:
            download(join(uri, name), copy / name)
        sums.check(copy, uri)
    (copy / sums.SUMS).unlink(missing_ok=True)  # of the way, not of the directory
