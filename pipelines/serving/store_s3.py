"""Sessions as objects on S3: s3://bucket/prefix/<group>/<part>, replaced by conditional writes."""

import secrets
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pipelines import storage
from pipelines.config import InputError
from pipelines.extras import require_extra
from pipelines.stores import faults, s3
from pipelines.stores.retry import Backoff, steadily

from .store import Blob, ConflictError, Entry, UnavailableError

_Result = TypeVar("_Result")

# 412: another tag, or a name that should be new is there; 409: two writes met; 404: what should be replaced is gone.
_CONFLICTS = (404, 409, 412)


class S3Store:
    """Objects below a prefix, reached with the settings and the patience of `pipelines.storage`, but by boto3.

    The store must know `If-Match` and `If-None-Match` in PUT, as Amazon's does since November 2024; pyarrow's file
    system, which the rest of the project uses, cannot send these. What stays is an UnavailableError in one line.
    """

    def __init__(self, uri: str) -> None:
        require_extra("serve", job=f"the session store {uri}")
        import boto3
        from botocore.config import Config

        self.bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
        if not self.bucket:
            raise InputError(f"session store {uri}: needs a bucket, s3://bucket/prefix")
        storage.absolute(uri)  # refuses credentials in it
        self.prefix = f"{prefix}/" if prefix else ""
        self._how = s3.settings()
        config = Config(
            connect_timeout=self._how.connect_timeout_s,
            read_timeout=self._how.read_timeout_s,
            max_pool_connections=16,
            retries={"mode": "standard", "total_max_attempts": 1},  # we try again, and tell
        )
        self._client = boto3.client(
            "s3",
            region_name=self._how.region or "us-east-1",
            endpoint_url=self._how.endpoint,
            verify=self._how.ca_file,
            config=config,
        )
        self._check(uri)

    def _check(self, uri: str) -> None:
        """InputError where the store cannot be reached, or takes conditional writes for plain ones."""
        name = f"{secrets.token_hex(32)}/00000000"  # as versions are named: left by a killed process, it is swept
        try:
            self.put(name, b"first", None)
            try:
                self.put(name, b"second", None)
            except ConflictError:
                return
            finally:
                self.delete(name)
        except UnavailableError as error:
            raise InputError(f"the session store {uri} cannot be written to: {error}") from error
        raise InputError(f"the session store {uri} knows no conditional writes (If-None-Match); use another one")

    def get(self, name: str) -> Blob | None:
        def action(_: int) -> Blob | None:
            try:
                found = self._client.get_object(Bucket=self.bucket, Key=self.prefix + name)
            except self._client.exceptions.NoSuchKey:
                return None
            return Blob(found["Body"].read(), found["ETag"])

        return self._do(name, action)

    def put(self, name: str, data: bytes, tag: str | None) -> str:
        from botocore.exceptions import ClientError

        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}

        def action(number: int) -> str:
            try:
                done = self._client.put_object(Bucket=self.bucket, Key=self.prefix + name, Body=data, **condition)
            except ClientError as error:
                if _status(error) not in _CONFLICTS or faults.kind_of(error) == "no_bucket":
                    raise
                there = self.get(name) if number > 1 else None
                if there is None or there.data != data:
                    raise ConflictError(name) from error
                return there.tag  # an earlier attempt's, whose answer was lost
            return done["ETag"]

        return self._do(name, action)

    def delete(self, name: str) -> bool:
        found = next((entry for entry in self._entries(name) if entry.name == name), None)
        key = self.prefix + name
        self._do(name, lambda _: self._client.delete_object(Bucket=self.bucket, Key=key))  # says not if it was there
        return found is not None

    def entries(self, group: str | None = None) -> Iterator[Entry]:
        return self._entries(f"{group}/" if group else "")

    def _entries(self, start: str) -> Iterator[Entry]:
        page: dict[str, Any] = {"NextContinuationToken": None}
        while "NextContinuationToken" in page:
            page = self._page(start, page["NextContinuationToken"])
            for found in page.get("Contents", []):
                name = found["Key"][len(self.prefix) :]
                yield Entry(name, found["Size"], found["LastModified"].timestamp())

    def _page(self, start: str, after: str | None) -> dict[str, Any]:
        where = {"Bucket": self.bucket, "Prefix": self.prefix + start}
        where |= {"ContinuationToken": after} if after else {}
        found: dict[str, Any] = self._do(start, lambda _: self._client.list_objects_v2(**where))
        return found

    def _do(self, name: str, action: Callable[[int], _Result]) -> _Result:
        """An action that is given its attempt's number, tried again while its fault may pass."""
        path = f"{self.bucket}/{self.prefix}{name}"
        try:
            return steadily(action, f"s3://{path}", Backoff(attempts=self._how.attempts))
        except ConflictError:
            raise
        except Exception as error:  # of botocore, urllib3 or the connection
            explained = faults.explained_s3(error, path, self._how.endpoint, self._how.attempts)
            raise UnavailableError(str(explained)) from error


def _status(error: Any) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]
