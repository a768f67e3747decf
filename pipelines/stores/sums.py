"""Checksums of the files of a directory: written beside them, and checked where the directory is read.

One line a file, `<64 hex digits>  <path>`, as `sha256sum` writes and `sha256sum --check` reads.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.stores.faults import DamagedError

SUMS = "SHA256SUMS"
_SUFFIX = ".sha256"  # of further such files, where several processes write one directory


def sha256_of(path: Path) -> str:
    """Of a file's bytes, 64 hex digits; about a second a gigabyte."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def names_in(directory: Path) -> list[str]:
    """The files below a directory, as paths relative to it with `/`, sorted; without files of checksums."""
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in names if not is_sums(name))


def is_sums(name: str) -> bool:
    return name == SUMS or ("/" not in name and name.endswith(_SUFFIX))


def seal(directory: Path, *, part: str | None = None) -> Path:
    """Writes the checksums of all files below a directory into it; the file, SHA256SUMS or `<part>.sha256`.

    `part` names what one of several processes wrote, whose directories are put together afterwards.
    """
    file = directory / (SUMS if part is None else part + _SUFFIX)
    file.write_text(as_text({name: sha256_of(directory / name) for name in names_in(directory)}), encoding="utf-8")
    return file


def as_text(sums: Mapping[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


def parse(text: str, where: str) -> dict[str, str]:
    """Name -> checksum. DamagedError where the text is not such a file's."""
    found = {}
    for line in text.splitlines():
        digest, gap, name = line.partition("  ")
        if not gap or len(digest) != 64:
            raise DamagedError(f"{where} is damaged: {line[:80]!r} is no checksum; restore it or make the files anew")
        found[name] = digest
    return found


def check(directory: Path, where: str) -> int:
    """Compares a local directory with its checksums; how many files have one. DamagedError names what differs.

    `where` is what the directory is called in messages.
    """
    expected: dict[str, str] = {}
    for file in sorted(path for path in directory.iterdir() if path.is_file() and is_sums(path.name)):
        expected |= parse(file.read_text(encoding="utf-8"), f"{where}/{file.name}")
    missing = [name for name in expected if not (directory / name).is_file()]
    if missing:
        raise DamagedError(incomplete(where, missing))
    wrong = [name for name, digest in expected.items() if sha256_of(directory / name) != digest]
    if wrong:
        raise DamagedError(damaged(where, wrong))
    return len(expected)


def incomplete(where: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{where} is incomplete: {names[0]}{more} should be there; write it again, or take an older one"


def damaged(where: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{where} is damaged: {names[0]}{more} does not match its checksum; write it again, or take an older one"
