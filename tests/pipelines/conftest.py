"""An S3 server between that fails as it is told."""

import os
from collections.abc import Iterator

import pytest

from pipelines.stores import retry

from .faulty_s3 import FaultyS3, faulty_s3


@pytest.fixture(scope="module")
def faulty_server(s3_bucket: str) -> Iterator[FaultyS3]:
    with faulty_s3(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        yield proxy


@pytest.fixture
def proxy(faulty_server: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> FaultyS3:
    """A server that does as planned, and a client that pauses little."""
    faulty_server.plan()
    monkeypatch.setenv("AWS_ENDPOINT_URL", faulty_server.endpoint)
    monkeypatch.setattr(retry.Backoff, "pause_s", lambda self, number: 0.01)
    return faulty_server
