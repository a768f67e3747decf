"""Where sessions are kept: bytes by name, replaced only by those who know what they replace."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from pipelines.config import InputError


class Blob(NamedTuple):
    """What is kept under a name."""

    data: bytes
    tag: str  # of this content under this name; another content has another one


class Entry(NamedTuple):
    """A name that is there."""

    name: str
    num_bytes: int
    modified_s: float  # seconds since 1970


class ConflictError(RuntimeError):
    """What is kept there is not what the caller meant to replace."""


class UnavailableError(RuntimeError):
    """The store cannot be reached or does not do what it should: one line, with no content and no secret."""


class Store(Protocol):
    """Bytes by name; a name has the form `group/part`, both of letters, digits and dashes.

    A write is seen whole or not at all. Safe for several threads, processes and machines at once. All methods raise
    UnavailableError; whether a write that did so was made is unknown.
    """

    def get(self, name: str) -> Blob | None: ...

    def put(self, name: str, data: bytes, tag: str | None) -> str:
        """Replace the content with `tag`, or with None make the name, which must be new; gives the new tag.

        Raises ConflictError and changes nothing where something else is there.
        """
        ...

    def delete(self, name: str) -> bool:
        """Remove a name; whether it was there."""
        ...

    def entries(self, group: str | None = None) -> Iterator[Entry]:
        """All names, or those of a group."""
        ...


def open_store(uri: str) -> Store:
    """The store that a URI names: `memory:`, a directory, s3://bucket/prefix, redis://host:port/number.

    Nothing is imported or reached for those that are not asked for. Raises InputError.
    """
    if uri == "memory:":
        from .store_memory import MemoryStore

        return MemoryStore()
    if uri.startswith(("redis://", "rediss://")):
        from .store_redis import RedisStore

        return RedisStore(uri)
    if uri.startswith("s3://"):
        from .store_s3 import S3Store

        return S3Store(uri)
    if "://" in uri:
        raise InputError(
            f"session store {uri}: give memory:, a directory, s3://bucket/prefix or redis://host:port/number"
        )
    from .store_directory import DirectoryStore

    return DirectoryStore(uri)
