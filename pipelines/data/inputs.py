"""What a preparation reads: work units, and whether an earlier one read the same."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pipelines.config import InputError, fingerprint
from pipelines.data.read import calling, file_sha256
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


def distinct_callings(files: Sequence[FileEntry]) -> dict[str, str]:
    """URI -> what a file gives its documents' ids, for those whose names alone would give what another's does.

    Of equal names it is as much of the paths as tells them apart; names that differ in their suffixes keep these.
    InputError where two remain the same.
    """
    there = {file.uri: file for file in files if file.num_bytes > 0}
    alike = _repeated(calling(uri) for uri in there)
    own = {uri: file.name if calling(uri) in alike else calling(file.name) for uri, file in there.items()}
    found = _told_apart(there, own)
    return {uri: called for uri, called in found.items() if called != calling(there[uri].name)}


def with_distinct_names(files: Sequence[FileEntry]) -> list[FileEntry]:
    """The files; in equal names as much of the paths as tells them apart. InputError where two remain the same."""
    there = {file.uri: file for file in files}
    found = _told_apart(there, {uri: file.name for uri, file in there.items()})
    return [file._replace(name=found[file.uri]) for file in files]


def _told_apart(there: Mapping[str, FileEntry], own: Mapping[str, str]) -> dict[str, str]:
    """URI -> what a file is called, behind as many directories above it as tell it from others."""
    found, depths = dict(own), Counter[str]()
    while repeated := _repeated(found.values()):
        same = [uri for uri, called in found.items() if called in repeated]
        depths.update(same)
        longer = {uri: _below(there[uri], own[uri], depths[uri]) for uri in same}
        if longer.items() <= found.items():
            pair = sorted(uri for uri in same if found[uri] == found[same[0]])[:2]
            raise InputError(f"{' and '.join(pair)} would give their documents the same ids; rename one of them")
        found = found | longer
    return found


def _repeated(names: Iterable[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}


def _below(file: FileEntry, called: str, depth: int) -> str:
    """A file's calling behind the names of that many directories above what it was found by, if there are so many."""
    above = file.uri.removesuffix(file.name).rstrip("/").split("/")
    return "/".join([*above[-depth:], called])


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
