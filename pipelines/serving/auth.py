"""API keys: a file says whose key has which SHA-256; the keys themselves are nowhere kept.

    python -m pipelines.serving.auth alice >> keys.txt

adds a line for a new key of the tenant alice and shows the key, once, on stderr. A key is 32 random bytes, so its plain
hash tells nothing of it. Several keys may belong to one tenant.
"""

import base64
import hashlib
import hmac
import re
import secrets
import sys
from collections.abc import Sequence
from typing import NamedTuple

from pipelines import storage
from pipelines.config import InputError

_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9a-f]{64})")


class Key(NamedTuple):
    """Who is let in by the key of this hash."""

    tenant: str
    sha256: str  # 64 hex digits


class Keys:
    """All keys. Looking one up compares it with every one of them, each in constant time."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys = keys

    def tenant(self, key: str) -> str | None:
        """Whose key this is; None: nobody's."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
        found = None
        for known in self._keys:
            if hmac.compare_digest(known.sha256, digest):
                found = known.tenant
        return found


def read_keys(uri: str) -> list[Key]:
    """The keys of a file; empty lines and lines from # on are skipped. InputError, which never shows a line."""
    try:
        text = storage.read_bytes(storage.absolute(uri)).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--api-keys {uri} cannot be read: {error}") from error
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        if not (entry := line.partition("#")[0].strip()):
            continue
        found = _LINE.fullmatch(entry)
        if found is None:
            raise InputError(
                f"--api-keys {uri}: line {number} is not `tenant:sha256` with 64 hex digits; "
                "make lines with `python -m pipelines.serving.auth TENANT`"
            )
        keys.append(Key(*found.groups()))
    if not keys:
        raise InputError(f"--api-keys {uri} holds no key; make one with `python -m pipelines.serving.auth TENANT`")
    if len({key.sha256 for key in keys}) < len(keys):
        raise InputError(f"--api-keys {uri} holds one key twice")
    return keys


def given_key(authorization: str) -> str | None:
    """The key in an Authorization header: `Bearer KEY`, or the password of `Basic`, which browsers ask for."""
    scheme, _, value = authorization.partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:  # no base64, or no text in it
            return None
    return None


def new_key(tenant: str) -> tuple[str, str]:
    """(a new key, its line for the file)."""
    key = f"rmt-{secrets.token_urlsafe(32)}"
    line = f"{tenant}:{hashlib.sha256(key.encode()).hexdigest()}"
    if not _LINE.fullmatch(line):
        raise InputError(f"tenant {tenant!r}: needs 1 to 64 letters, digits, dots, dashes or underscores")
    return key, line


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m pipelines.serving.auth TENANT >> FILE", file=sys.stderr)
        return 2
    try:
        key, line = new_key(arguments[0])
    except InputError as error:
        print(f"auth: error: {error}", file=sys.stderr)
        return 2
    print(line)
    print(f"key of {arguments[0]}, shown only now: {key}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
