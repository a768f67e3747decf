"""What goes wrong with stores: which faults may pass, and one clear line for those that stay.

S3's faults come as texts (pyarrow: `AWS Error NO_SUCH_BUCKET during PutObject operation: ...`) or as exceptions of
botocore and aiohttp (s3fs): both are told apart by the codes and class names in them. Nothing of the environment's
credentials gets into a line.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from typing import Literal


class StorageError(OSError):
    """A store fails, for no fault of the command: one line saying where, what and what to do."""


class RefusedError(StorageError):
    """What was asked for is not there or not allowed: no bucket, no permission, wrong credentials, read-only."""


class DamagedError(StorageError):
    """Files that are not what was written: a checksum does not match, or some are missing."""


class TruncatedError(OSError):
    """Fewer bytes came than there are."""


Kind = Literal[
    "credentials",
    "no_bucket",
    "denied",
    "region",
    "clock",
    "passing",
    "full",
    "read_only",
    "in_the_way",
    "name",
    "other",
]

_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_SHOWN_CHARACTERS = 300

# In this order: the first that matches says what it is.
_S3_KINDS: tuple[tuple[Kind, str], ...] = (
    (
        "credentials",
        r"INVALID_?ACCESS_?KEY_?ID|SIGNATURE_?DOES_?NOT_?MATCH|INVALID_?SIGNATURE|EXPIRED_?TOKEN|INVALID_?TOKEN|"
        r"INVALID_?CLIENT_?TOKEN_?ID|UNRECOGNIZED_?CLIENT|MISSING_?AUTHENTICATION_?TOKEN|NoCredentials|"
        r"PartialCredentials|ProfileNotFound|CredentialRetrieval|TokenRetrieval|UnauthorizedSSOToken",
    ),
    ("no_bucket", r"NO_?SUCH_?BUCKET|specified bucket does not exist"),
    ("clock", r"REQUEST_?TIME_?TOO_?SKEWED"),
    ("region", r"PERMANENT_?REDIRECT|HTTP status 301|AUTHORIZATION_?HEADER_?MALFORMED"),
    ("denied", r"ACCESS_?DENIED|\bForbidden\b|HTTP status 40[13]|\bPermissionError\b|ALL_?ACCESS_?DISABLED"),
    (
        "passing",
        r"INTERNAL_?FAILURE|INTERNAL_?ERROR|SERVICE_?UNAVAILABLE|SLOW_?DOWN|THROTTL|REQUEST_?TIMEOUT|"
        r"REQUEST_?LIMIT_?EXCEEDED|BANDWIDTH_?LIMIT|TOO_?MANY_?REQUESTS|HTTP status (429|5\d\d)|NETWORK_?CONNECTION|"
        r"curlCode|BadGateway|GatewayTimeout|\(5\d\d\)|Please reduce your request rate|TruncatedError|"
        r"EndpointConnection|ConnectTimeout|ReadTimeout|ConnectionClosed|ConnectionError|ConnectionReset|"
        r"BrokenPipe|IncompleteRead|ResponseStreaming|ClientPayload|ContentLength|ServerDisconnected|ClientOSError|"
        r"ClientConnector|ProtocolError|TimeoutError|HTTPClientError|RetriesExceeded",
    ),
)
_S3_PATTERNS = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _S3_KINDS)

_DISK_KINDS: dict[int, Kind] = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "full",
    errno.EROFS: "read_only",
    errno.EACCES: "denied",
    errno.EPERM: "denied",
    errno.ENOTDIR: "in_the_way",
    errno.ENAMETOOLONG: "name",
    errno.ESTALE: "passing",  # NFS: the file was replaced by another host between two calls
}


def kind_of(error: BaseException) -> Kind:
    """What a fault is, from the S3 code in it or in what caused it, or from its number where it is the disk's."""
    if isinstance(error, OSError) and error.errno in _DISK_KINDS and error.errno not in (errno.EACCES, errno.EPERM):
        return _DISK_KINDS[error.errno]
    text = re.sub(r"'[^']*'", "", " ".join(_chain(error)))  # without names of keys, which may be words of the table
    return next((kind for kind, pattern in _S3_PATTERNS if pattern.search(text)), "other")


def _chain(error: BaseException) -> Iterator[str]:
    """Class names and texts of an exception and of those that it came from."""
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return
        yield " ".join(base.__name__ for base in type(seen).__mro__ if base not in (Exception, BaseException, object))
        yield str(seen)
        seen = seen.__cause__ or seen.__context__


def may_pass(error: BaseException) -> bool:
    """Whether the same call may do later: overload, a broken or slow connection, a body cut short."""
    settled = isinstance(error, StorageError | FileNotFoundError | FileExistsError | IsADirectoryError)
    return not settled and kind_of(error) == "passing"


_S3_LINES: dict[Kind, str] = {
    "credentials": "the credentials are wrong, expired or missing; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
    "AWS_PROFILE, or give the machine a role",
    "no_bucket": "there is no bucket {bucket} at {where}; create it, or check the name and AWS_ENDPOINT_URL",
    "denied": "no permission (or wrong credentials: the server does not say which); check the bucket's policy, the "
    "credentials and AWS_PROFILE",
    "region": "the bucket is in another region; set AWS_REGION",
    "clock": "this machine's clock is wrong by minutes, and S3 refuses it; set the clock",
    "passing": "{where} does not answer as it should, tried {attempts} times; check AWS_ENDPOINT_URL and the network, "
    "or give it longer (RMT_S3_CONNECT_TIMEOUT_S, RMT_S3_READ_TIMEOUT_S, AWS_MAX_ATTEMPTS)",
}
_REFUSED = ("credentials", "no_bucket", "denied", "region", "clock", "read_only")


def explained_s3(error: BaseException, path: str, endpoint: str | None, attempts: int) -> StorageError:
    """The fault of a call on `bucket/key` in one line."""
    if isinstance(error, StorageError):
        return error
    kind = kind_of(error)
    line = _S3_LINES.get(kind, "S3 refuses this")
    line = line.format(bucket=path.partition("/")[0], where=endpoint or "Amazon S3", attempts=attempts)
    error_class = RefusedError if kind in _REFUSED else StorageError
    return error_class(f"s3://{path}: {line} ({shown(error)})")


def shown(error: BaseException) -> str:
    """An exception's text on one line, bounded, without credentials."""
    text = " ".join(str(error).split()) or type(error).__name__
    for name in _SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


@contextlib.contextmanager
def disk_faults(uri: str) -> Iterator[None]:
    """Turns what the disk refuses in the block into one line: full, read-only, no permission, too long a name."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        kind = _DISK_KINDS.get(error.errno or 0)
        if kind == "full":
            raise StorageError(
                f"{uri}: the disk is full ({shown(error)}); free some room, or give another path"
            ) from error
        if kind == "read_only":
            raise RefusedError(f"{uri}: the disk is read-only ({shown(error)}); give another path") from error
        if kind == "in_the_way":
            raise RefusedError(f"{uri}: a file stands where a directory is needed; give another path") from error
        if kind == "name":
            raise RefusedError(f"{uri}: the name is too long for the disk; give a shorter path") from error
        if kind == "denied":
            raise RefusedError(
                f"{uri}: no permission ({shown(error)}); check its owner, or give another path"
            ) from error
        raise
