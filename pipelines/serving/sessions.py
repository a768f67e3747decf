"""Sessions by tenant and id: versions, forks, returns to earlier versions, limits, times to live.

A session's current record is `<hash>/head` in the store, earlier versions that are kept are `<hash>/<version>`. The
hash is of tenant and id, so that neither becomes a name and nobody's id finds another's session. Names of another form
are somebody else's: they are neither counted nor deleted.
"""

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rmt_core import state as states

from . import records
from .readers import Position
from .records import KEPT_RESULTS, Boundary, Record, Result
from .requests import RequestError
from .store import Blob, ConflictError, Entry, Store, UnavailableError

log = logging.getLogger(__name__)

_OWN_NAME = re.compile(r"[0-9a-f]{64}/(head|summary|\d{8,})")  # `summary`: the record of a summary as a job
_USAGE_AGE_S = 10.0  # for so long a count of all sessions is used, with what this process has changed since
_ORPHAN_AGE_S = 3600.0  # a version without a session is left by a process that was killed, or belongs to one at work


@dataclass(frozen=True)
class Limits:
    """What the sessions of one store may take; None: no limit. Those of all tenants together."""

    ttl_s: float | None = None  # since a session's last change; then it is gone
    max_sessions: int | None = None
    max_bytes: int | None = None  # of all records; checked when a session is made
    kept_versions: int = 0  # earlier versions of each session that it can return to, each as large as the session


class Info(NamedTuple):
    """What may be said of a session."""

    version: int
    num_tokens: int
    num_segments: int  # closed
    num_bytes: int  # of its record
    saved_s: float  # seconds since 1970
    kept: tuple[Boundary, ...]  # versions that it can return to, the oldest first


class Loaded(NamedTuple):
    """A session's current version, as it was read."""

    record: Record
    blob: Blob


class _Usage(NamedTuple):
    """What is in the store, or rather more: what could not be told while it was counted is counted."""

    counted_s: float  # when
    num_sessions: int
    num_bytes: int

    def plus(self, num_sessions: int, num_bytes: int) -> "_Usage":
        return _Usage(self.counted_s, self.num_sessions + num_sessions, self.num_bytes + num_bytes)


class Sessions:
    """The sessions of one model in a store. Blocking; safe for several threads, and processes with the same store.

    Methods raise RequestError: "session_not_found" alike for a session that never was, is another tenant's, was
    deleted or has expired; "version_conflict", "session_exists", "store_full"; "model_mismatch" for a session that
    another model has read for. `start` is where a new session stands.
    """

    def __init__(
        self,
        store: Store,
        start: Position,
        *,
        fingerprint: str,
        limits: Limits = Limits(),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self.start = start
        self.fingerprint = fingerprint
        self.limits = limits
        self.clock = clock
        self._lock = threading.RLock()  # of the three below
        self._usage: _Usage | None = None
        self._being_made: list[int] = []  # bytes of sessions that may be in the store already, or not yet
        self._swept_s = float("-inf")  # when room was last made

    def create(self, tenant: str, session: str) -> Info:
        """A session that has read nothing."""
        return self._add(_key(tenant, session), self.start)

    def load(self, tenant: str, session: str) -> Loaded:
        return self._load(_key(tenant, session))

    def info(self, tenant: str, session: str) -> Info:
        return _info(*self.load(tenant, session))

    def commit(self, loaded: Loaded, position: Position, result: Result | None = None) -> Info:
        """The session's next version, if what was loaded is still its current one. `result` is kept with it."""
        results = (*loaded.record.results, *([] if result is None else [result]))[-KEPT_RESULTS:]
        return self._replace(loaded, position, results)

    def rewind(self, tenant: str, session: str, version: int, expected_version: int | None = None) -> Info:
        """Return to an earlier version, by a new version with its content. So a return can be undone."""
        loaded = self.load(tenant, session)
        check_version(loaded.record, expected_version)
        old = self._version(loaded, version)
        return self._replace(loaded, old.position, ())

    def fork(self, tenant: str, session: str, new: str, version: int | None = None) -> Info:
        """A new session with what this one has read, now or up to a version that is kept."""
        loaded = self.load(tenant, session)
        return self._add(_key(tenant, new), self._version(loaded, version).position)

    def export(self, tenant: str, session: str, version: int | None = None) -> bytes:
        """The session as a file for `adopt`, with no trace of who it belongs to."""
        record = self._version(self.load(tenant, session), version)
        bare = Record("", 0, record.position._replace(chain=None), record.saved_s)
        return records.to_bytes(bare, self.fingerprint)

    def adopt(self, tenant: str, session: str, data: bytes) -> Info:
        """A new session from an exported one. RequestError where a byte is altered or it is another model's.

        The seal tells what was damaged, not who wrote it: take files from those who may change the sessions anyway.
        """
        try:
            position = records.from_bytes(data, self.fingerprint).position
        except ValueError as error:
            raise RequestError("invalid_request", f"the session cannot be imported: {error}") from error
        if not states.are_alike(position.state, self.start.state):
            raise RequestError("invalid_request", "the session cannot be imported: its state has another shape")
        return self._add(_key(tenant, session), position._replace(chain=None))

    def delete(self, tenant: str, session: str) -> None:
        """Delete a session, also one that cannot be read or is another model's."""
        key = _key(tenant, session)
        try:
            self._load(key)
        except RequestError as error:
            if error.code == "session_not_found":
                raise
        self._delete(key)

    def sweep(self) -> int:
        """Delete what has expired and what killed processes left behind; how many sessions went."""
        now = self.clock()
        entries = list(self._entries())
        heads = {entry.name.partition("/")[0]: entry for entry in entries if _is_head(entry)}
        num_gone = 0
        for key, head in heads.items():
            # Listed anew: a session that has been used since then has not expired.
            if self._is_expired(head.modified_s, now) and self._is_expired(self._saved_s(key), now):
                self._delete(key)
                num_gone += 1
        for entry in entries:
            if entry.name.partition("/")[0] not in heads and now - entry.modified_s > _ORPHAN_AGE_S:
                self.store.delete(entry.name)
        return num_gone

    def _saved_s(self, key: str) -> float:
        """When a session was last changed; of one that is gone, long ago."""
        return max((entry.modified_s for entry in self._entries(key) if _is_head(entry)), default=0.0)

    def _entries(self, group: str | None = None) -> Iterator[Entry]:
        """What is in the store and ours: a bucket may hold models beside sessions."""
        return (entry for entry in self.store.entries(group) if _OWN_NAME.fullmatch(entry.name))

    def _is_expired(self, saved_s: float, now: float) -> bool:
        return self.limits.ttl_s is not None and now - saved_s > self.limits.ttl_s

    def _has_expired(self, key: str) -> bool:
        """Whether there is no such session, or no longer; then it is deleted."""
        try:
            self._load(key)
        except RequestError as error:
            return error.code == "session_not_found"
        return False

    def _load(self, key: str) -> Loaded:
        blob = self.store.get(f"{key}/head")
        if blob is None:
            raise _not_found()
        record = self._read(key, blob)
        if self._is_expired(record.saved_s, self.clock()):
            self._delete(key)
            raise _not_found()
        return Loaded(record, blob)

    def _read(self, key: str, blob: Blob) -> Record:
        try:
            record = records.from_bytes(blob.data, self.fingerprint)
        except records.ForeignRecordError as error:
            if self._is_expired(error.saved_s, self.clock()):
                self._delete(key)
                raise _not_found() from error
            raise RequestError("model_mismatch", "the session belongs to another model; delete it") from error
        except ValueError as error:
            raise RequestError("failed", f"the session cannot be read: {error}") from error
        if record.session != key:
            raise RequestError("failed", "the session cannot be read: its record is another session's")
        return record

    def _version(self, loaded: Loaded, version: int | None) -> Record:
        """The record of a version; None: the current one."""
        key = loaded.record.session
        if version is None or version == loaded.record.version:
            return loaded.record
        kept = [boundary.version for boundary in loaded.record.kept]
        blob = self.store.get(_version_name(key, version)) if version in kept else None
        if blob is None:
            raise RequestError("invalid_request", f"version {version} is not kept; those that are: {kept}")
        return self._read(key, blob)

    def _add(self, key: str, position: Position) -> Info:
        record = Record(key, 0, position, self.clock())
        data = records.to_bytes(record, self.fingerprint)
        self._take_room(len(data))
        made = False
        try:
            try:
                blob = self._put(key, data, None)
            except RequestError:
                if not self._has_expired(key):
                    raise
                blob = self._put(key, data, None)
            made = True
        finally:
            with self._lock:
                self._being_made.remove(len(data))
                if not made and self._usage is not None:
                    self._usage = self._usage.plus(-1, -len(data))
        return _info(record, blob)

    def _replace(self, loaded: Loaded, position: Position, results: tuple[Result, ...]) -> Info:
        old = loaded.record
        kept, gone = [*old.kept, old.boundary], []
        while len(kept) > self.limits.kept_versions:
            gone.append(kept.pop(0))
        if kept:
            self._keep(_version_name(old.session, old.version), loaded.blob.data)
        record = Record(old.session, old.version + 1, position, self.clock(), results, tuple(kept))
        blob = self._put(old.session, records.to_bytes(record, self.fingerprint), loaded.blob.tag)
        for boundary in gone:
            if boundary.version == old.version:  # it was never kept
                continue
            try:
                self.store.delete(_version_name(old.session, boundary.version))
            except UnavailableError as error:  # the session has moved on all the same; the rest goes with it
                log.warning("an earlier version of a session could not be deleted: %s", error)
        return _info(record, blob)

    def _keep(self, name: str, data: bytes) -> None:
        """Keep an earlier version, whatever a commit or a deletion that was killed has left under its name."""
        try:
            self.store.put(name, data, None)
        except ConflictError:
            there = self.store.get(name)
            if there is not None and there.data != data:
                self.store.put(name, data, there.tag)

    def _put(self, key: str, data: bytes, tag: str | None) -> Blob:
        try:
            return Blob(data, self.store.put(f"{key}/head", data, tag))
        except ConflictError as error:
            if tag is None:
                raise RequestError("session_exists", "there is a session of this id already") from error
            raise RequestError(
                "version_conflict", "the session was changed meanwhile; read its version again"
            ) from error

    def _delete(self, key: str) -> None:
        counted = self._usage
        num_bytes = sum(entry.num_bytes for entry in self._entries(key))
        there = self.store.delete(f"{key}/head")  # first: a commit at work then finds nothing to replace
        for entry in self._entries(key):
            self.store.delete(entry.name)
        with self._lock:
            usage = self._usage
            if there and usage is not None and counted is not None and usage.counted_s == counted.counted_s:
                self._usage = usage.plus(-1, -num_bytes)

    # --- room ---------------------------------------------------------------------------------------

    def _take_room(self, num_bytes: int) -> None:
        """Count a session that is about to be made; RequestError where there is no room for it."""
        with self._lock:
            now, usage, limits = self.clock(), self._usage, self.limits
            if limits.max_sessions is not None or limits.max_bytes is not None:
                if usage is None or now - usage.counted_s > _USAGE_AGE_S:
                    usage = self._count()
                if self._is_full(usage) and now - self._swept_s > _USAGE_AGE_S:
                    self.sweep()
                    self._swept_s = now
                    usage = self._count()
                self._usage = usage
                if self._is_full(usage):
                    raise RequestError("store_full", "there is no room for a further session; delete some")
                self._usage = usage.plus(1, num_bytes)
            self._being_made.append(num_bytes)

    def _is_full(self, usage: _Usage) -> bool:
        limits = self.limits
        return (limits.max_sessions is not None and usage.num_sessions >= limits.max_sessions) or (
            limits.max_bytes is not None and usage.num_bytes >= limits.max_bytes
        )

    def _count(self) -> _Usage:
        entries = list(self._entries())
        num_sessions = sum(_is_head(entry) for entry in entries)
        num_bytes = sum(entry.num_bytes for entry in entries)
        return _Usage(self.clock(), num_sessions, num_bytes).plus(len(self._being_made), sum(self._being_made))


def check_version(record: Record, expected: int | None) -> None:
    """RequestError where the session is not at the version that the caller expects."""
    if expected is not None and record.version != expected:
        raise RequestError("version_conflict", f"the session is at version {record.version}, not {expected}")


def _is_head(entry: Entry) -> bool:
    return entry.name.endswith("/head")


def _key(tenant: str, session: str) -> str:
    return hashlib.sha256(f"{len(tenant)} {tenant} {session}".encode("utf-8", "surrogatepass")).hexdigest()


def _version_name(key: str, version: int) -> str:
    return f"{key}/{version:08d}"


def _not_found() -> RequestError:
    return RequestError("session_not_found", "there is no such session")


def _info(record: Record, blob: Blob) -> Info:
    position = record.position
    return Info(record.version, position.num_tokens, position.num_segments, len(blob.data), record.saved_s, record.kept)
