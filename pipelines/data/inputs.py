"""What a preparation reads: work units, and whether an earlier one read the same."""

from collections.abc import Sequence
from typing import NamedTuple

from pipelines.config import fingerprint
from pipelines.data.read import file_sha256
from pipelines.storage import FileEntry

UNIT_BYTES = 32 * 1024**2
UNIT_FILES = 1000
_GZIP_FACTOR = 3  # text compresses to about a third


class InputFile(NamedTuple):
    """A file as it was read."""

    uri: str
    name: str
    num_bytes: int  # -1: there was none
    mtime_ns: int
    sha256: str | None  # of its bytes; None where it could not be read


def plan_units(files: Sequence[FileEntry]) -> list[list[FileEntry]]:
    """Files in order, in groups of about `UNIT_BYTES` of text; depends on the files alone, never on the machine."""
    units: list[list[FileEntry]] = []
    room = 0
    for file in files:
        size = max(0, file.num_bytes) * (_GZIP_FACTOR if file.name.lower().endswith(".gz") else 1)
        if not units or size > room or len(units[-1]) >= UNIT_FILES:
            units.append([])
            room = UNIT_BYTES
        units[-1].append(file)
        room -= size
    return units


def input_fingerprint(files: Sequence[InputFile]) -> str:
    """Of names, sizes and contents in order; not of where or when."""
    return fingerprint([[file.name, file.num_bytes, file.sha256] for file in files])


def difference(before: Sequence[InputFile], now: Sequence[FileEntry]) -> str | None:
    """How the input differs from what was read before, in words; None where it is the same.

    A file is the same if its name and size are, and its time of modification or else its content.
    """
    old, new = {file.name for file in before}, {file.name for file in now}
    for what, names in (("added", new - old), ("removed", old - new)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"{what} {min(names)}{more}"
    if [file.name for file in before] != [file.name for file in now]:
        return "the same files in another order"
    changed = (new.name for old, new in zip(before, now, strict=True) if not is_same(old, new))
    first = next(changed, None)
    return None if first is None else f"changed {first}"


def is_same(old: InputFile, new: FileEntry) -> bool:
    """Whether a file that was read is still as it was."""
    if old.num_bytes != new.num_bytes:
        return False
    if old.uri == new.uri and old.mtime_ns == new.mtime_ns and old.sha256 is not None:
        return True
    return old.sha256 == file_sha256(new.uri)
