"""Sessions as objects on S3: s3://bucket/prefix/<group>/<part>, replaced by conditional writes."""

import os
import uuid
from collections.abc import Iterator
from typing import Any

from pipelines.config import InputError
from pipelines.extras import require_extra

from .store import Blob, ConflictError, Entry

# 412: another tag, or a name that should be new is there; 409: two writes met; 404: what should be replaced is gone.
_CONFLICTS = (404, 409, 412)


class S3Store:
    """Objects below a prefix, with the environment that boto3 reads (as pipelines.storage does).

    The store must know `If-Match` and `If-None-Match` in PUT, as Amazon's does since November 2024; pyarrow's file
    system, which the rest of the project uses, cannot send these.
    """

    def __init__(self, uri: str) -> None:
        require_extra("serve", job=f"the session store {uri}")
        import boto3
        from botocore.config import Config

        self.bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
        if not self.bucket:
            raise InputError(f"session store {uri}: needs a bucket, s3://bucket/prefix")
        self.prefix = f"{prefix}/" if prefix else ""
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        config = Config(connect_timeout=10, read_timeout=60, max_pool_connections=16, retries={"mode": "standard"})
        self._client = boto3.client("s3", region_name=region, config=config)
        self._check(uri)

    def _check(self, uri: str) -> None:
        """InputError where the store cannot be reached, or takes conditional writes for plain ones."""
        from botocore.exceptions import BotoCoreError, ClientError

        name = f"check/{uuid.uuid4().hex}"
        try:
            self.put(name, b"", None)
            try:
                self.put(name, b"", None)
            except ConflictError:
                return
            finally:
                self.delete(name)
        except (BotoCoreError, ClientError) as error:
            raise InputError(f"the session store {uri} cannot be written to: {type(error).__name__}") from error
        raise InputError(f"the session store {uri} knows no conditional writes (If-None-Match); use another one")

    def get(self, name: str) -> Blob | None:
        from botocore.exceptions import ClientError

        try:
            found = self._client.get_object(Bucket=self.bucket, Key=self.prefix + name)
        except ClientError as error:
            if _status(error) == 404:
                return None
            raise
        return Blob(found["Body"].read(), found["ETag"])

    def put(self, name: str, data: bytes, tag: str | None) -> str:
        from botocore.exceptions import ClientError

        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        try:
            done = self._client.put_object(Bucket=self.bucket, Key=self.prefix + name, Body=data, **condition)
        except ClientError as error:
            if _status(error) in _CONFLICTS and error.response["Error"]["Code"] != "NoSuchBucket":
                raise ConflictError(name) from error
            raise
        return done["ETag"]

    def delete(self, name: str) -> bool:
        found = next((entry for entry in self._entries(name) if entry.name == name), None)
        self._client.delete_object(Bucket=self.bucket, Key=self.prefix + name)  # does not say whether it was there
        return found is not None

    def entries(self, group: str | None = None) -> Iterator[Entry]:
        return self._entries(f"{group}/" if group else "")

    def _entries(self, start: str) -> Iterator[Entry]:
        prefix = self.prefix + start
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        for page in pages:
            for found in page.get("Contents", []):
                name = found["Key"][len(self.prefix) :]
                yield Entry(name, found["Size"], found["LastModified"].timestamp())


def _status(error: Any) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]
