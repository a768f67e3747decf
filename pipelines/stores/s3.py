"""Reaching S3 as the environment says, by pyarrow's own client or by s3fs.

    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN   credentials; or AWS_PROFILE; or the machine's role
    AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL                         a store that is not Amazon's; or the profile's own
    AWS_REGION, AWS_DEFAULT_REGION                                or the profile's own
    AWS_CA_BUNDLE                                                 a file of certificates to trust
    AWS_MAX_ATTEMPTS                                              attempts at a call (6)
    RMT_S3_CONNECT_TIMEOUT_S, RMT_S3_READ_TIMEOUT_S               seconds of silence before an attempt fails (10, 60)
    RMT_S3_CLIENT                                                 pyarrow or s3fs

Credentials are found by the client library, in each process anew: they are in no setting, file or message.
"""

import configparser
import functools
import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.fs

from pipelines.config import InputError

CLIENTS = ("pyarrow", "s3fs")


class S3Settings(NamedTuple):
    """How to reach a store; nothing secret, so it may be sent to workers."""

    endpoint: str | None
    region: str | None
    ca_file: str | None
    connect_timeout_s: float
    read_timeout_s: float
    attempts: int
    client: str  # one of CLIENTS


def settings() -> S3Settings:
    """What the environment and the profile say. InputError."""
    own_profile = _profile()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint is None and os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() != "true":
        endpoint = own_profile.get("endpoint_url")
    if endpoint and "@" in endpoint:
        raise InputError(
            "AWS_ENDPOINT_URL holds a user or password; give it without, and credentials as AWS_ACCESS_KEY_ID"
        )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or own_profile.get("region")
    client = os.environ.get("RMT_S3_CLIENT") or CLIENTS[0]
    if client not in CLIENTS:
        raise InputError(f"RMT_S3_CLIENT {client!r}: needs to be {' or '.join(CLIENTS)}")
    if client == "s3fs" and importlib.util.find_spec("s3fs") is None:
        raise InputError("RMT_S3_CLIENT is s3fs, which is not installed; run: pip install '.[s3fs]', or unset it")
    return S3Settings(
        endpoint=endpoint.rstrip("/") if endpoint else None,
        region=region or ("us-east-1" if endpoint else None),  # other stores take any, and asking for it costs seconds
        ca_file=os.environ.get("AWS_CA_BUNDLE") or None,
        connect_timeout_s=_number("RMT_S3_CONNECT_TIMEOUT_S", 10.0),
        read_timeout_s=_number("RMT_S3_READ_TIMEOUT_S", 60.0),
        attempts=int(_number("AWS_MAX_ATTEMPTS", 6)),
        client=client,
    )


def _number(name: str, default: float) -> float:
    text = os.environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise InputError(f"{name} {text!r}: needs a number above 0")
    return value


def _profile() -> dict[str, str]:
    """The profile's endpoint_url and region in ~/.aws/config, which pyarrow's client does not look for there."""
    path = Path(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config").expanduser()
    name = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or "default"
    parser = configparser.RawConfigParser(default_section="\n", strict=False)  # [default] is a profile, no default
    try:
        parser.read(path, encoding="utf-8")
    except (OSError, configparser.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as an AWS configuration: {type(error).__name__}") from error
    section = next((each for each in (f"profile {name}", name) if parser.has_section(each)), None)
    found = dict(parser[section]) if section else {}
    services = f"services {found.get('services')}"
    if parser.has_option(services, "s3"):  # nested: an indented list of its own
        inner = (line.partition("=") for line in parser.get(services, "s3").splitlines())
        found |= {key.strip(): value.strip() for key, equals, value in inner if equals}
    return found


class Clients(NamedTuple):
    """The client library's file systems."""

    once: pyarrow.fs.FileSystem  # tries a request once: what fails can then be told, and tried again, by us
    patient: pyarrow.fs.FileSystem  # tries again by itself, in silence: for the parts of long objects


@functools.lru_cache(maxsize=8)
def clients(how: S3Settings) -> Clients:
    """Both are made at once: Arrow makes none while a request of another is going on, which may be for long."""
    make = _s3fs if how.client == "s3fs" else _pyarrow
    return Clients(make(how, 1), make(how, how.attempts))


def _pyarrow(how: S3Settings, attempts: int) -> pyarrow.fs.FileSystem:
    options: dict[str, Any] = {}
    if how.endpoint:
        scheme, _, host = how.endpoint.rpartition("://")
        options.update(endpoint_override=host, scheme=scheme or "https")
    return pyarrow.fs.S3FileSystem(
        region=how.region,
        connect_timeout=how.connect_timeout_s,
        request_timeout=how.read_timeout_s,
        tls_ca_file_path=how.ca_file,
        allow_delayed_open=True,  # a small object is then one request
        background_writes=False,  # those need Arrow's I/O threads, which may all be waiting for them in a parallel copy
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        **options,
    )


def _s3fs(how: S3Settings, attempts: int) -> pyarrow.fs.FileSystem:
    import s3fs

    class Handler(pyarrow.fs.FSSpecHandler):
        """With times of modification, which pyarrow looks for under another name."""

        @staticmethod
        def _create_file_info(path: str, info: dict[str, Any]) -> pyarrow.fs.FileInfo:
            known = {**info, "mtime": info.get("LastModified")}
            return pyarrow.fs.FSSpecHandler._create_file_info(path, known)

    store = s3fs.S3FileSystem(
        endpoint_url=how.endpoint,
        client_kwargs={"region_name": how.region, "verify": how.ca_file},
        config_kwargs={
            "connect_timeout": how.connect_timeout_s,
            "read_timeout": how.read_timeout_s,
            "retries": {"mode": "standard", "total_max_attempts": attempts},
        },
        use_listings_cache=False,  # other processes write, too
        skip_instance_cache=True,
    )
    store.retries = attempts  # s3fs has a loop of its own around botocore's
    return pyarrow.fs.PyFileSystem(Handler(store))
