"""Paths: local ones and s3://bucket/key, and the file system behind each."""

import functools
import os
import re

import pyarrow.fs

from pipelines.config import InputError
from pipelines.stores import s3
from pipelines.stores.steady import SteadyS3


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def absolute(uri: str) -> str:
    """The URI as any process can use it: local paths made absolute, `~` opened, no slash at the end."""
    if not uri:
        raise InputError("a path is empty; give a local path or s3://bucket/key")
    if is_s3(uri):
        _check(uri)
        return uri.rstrip("/")
    if re.match(r"[a-z][a-z0-9+]*://", uri):
        raise InputError(f"{uri}: needs a local path or s3://bucket/key")
    return os.path.abspath(os.path.expanduser(uri))


def _check(uri: str) -> None:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise InputError(f"{uri}: needs a bucket, s3://bucket/key; look whether a variable in it is empty")
    if "@" in bucket or ("@" in key.partition("/")[0] and ":" in bucket) or "secret_key=" in uri:
        raise InputError(  # not shown: it would end in logs and results
            "an s3:// path holds credentials; take them out of it, and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )


def filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """(the pyarrow file system, the path in it). That of S3 retries, explains, and may be sent to workers."""
    if not is_s3(uri):
        return pyarrow.fs.LocalFileSystem(), absolute(uri)
    _check(uri)
    return _steady(s3.settings()), uri.removeprefix("s3://").rstrip("/")


@functools.lru_cache(maxsize=8)
def _steady(settings: s3.S3Settings) -> pyarrow.fs.FileSystem:
    return pyarrow.fs.PyFileSystem(SteadyS3(settings))


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/") if uri != "/" else "", *names])
