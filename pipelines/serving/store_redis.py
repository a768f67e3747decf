"""Sessions in Redis: a hash `rmt:session:<group>/<part>` of data, tag and time a name."""

import contextlib
import time
import uuid
from collections.abc import Iterator
from typing import Any

from pipelines.config import InputError
from pipelines.extras import require_extra

from .store import Blob, ConflictError, Entry, UnavailableError

_PREFIX = "rmt:session:"
# KEYS: the name. ARGV: the tag that must be there ("" for none), the new tag, the data, the time.
_PUT = """
local found = redis.call('HGET', KEYS[1], 'tag')
if found == ARGV[2] then return 1 end -- sent again, since the answer was lost
if (found or '') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'tag', ARGV[2], 'data', ARGV[3], 'modified_s', ARGV[4])
return 1
"""


class RedisStore:
    """One server. What is acknowledged is as durable as that server's settings make it (`appendonly yes`)."""

    def __init__(self, uri: str) -> None:
        require_extra("serve", job="a session store in Redis")
        import redis

        try:
            self._client: Any = redis.Redis.from_url(uri, socket_timeout=30, socket_connect_timeout=10)
            self._client.ping()
        except (redis.RedisError, ValueError) as error:  # the URI may hold a password: it is not repeated
            raise InputError(f"the session store in Redis cannot be reached: {type(error).__name__}") from error
        self._put = self._client.register_script(_PUT)

    def get(self, name: str) -> Blob | None:
        with _asking():
            data, tag = self._client.hmget(_PREFIX + name, "data", "tag")
        return None if tag is None else Blob(data, tag.decode())

    def put(self, name: str, data: bytes, tag: str | None) -> str:
        new = uuid.uuid4().hex
        with _asking():
            is_put = self._put(keys=[_PREFIX + name], args=[tag or "", new, data, repr(time.time())])
        if not is_put:
            raise ConflictError(name)
        return new

    def delete(self, name: str) -> bool:
        with _asking():
            return bool(self._client.delete(_PREFIX + name))

    def entries(self, group: str | None = None) -> Iterator[Entry]:
        with _asking():
            found = set(self._client.scan_iter(match=f"{_PREFIX}{group or '*'}/*", count=1000))  # may give a name twice
        for key in sorted(found):
            pipe = self._client.pipeline(transaction=False)
            pipe.hstrlen(key, "data")
            pipe.hget(key, "modified_s")
            with _asking():
                num_bytes, modified_s = pipe.execute()
            if modified_s is not None:  # deleted meanwhile
                yield Entry(key.decode().removeprefix(_PREFIX), num_bytes, float(modified_s))


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    """What the client says of a server that is down, full or loading, as UnavailableError."""
    import redis

    try:
        yield
    except redis.RedisError as error:
        raise UnavailableError(f"Redis: {type(error).__name__}: {error}") from error
