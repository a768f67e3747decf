"""An S3 server of our own."""

import os
from collections.abc import Iterator

import pytest

BUCKET = "rmt-tests"


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """s3://bucket on a server in this process, on loopback; the environment points to it while tests use it."""
    boto3 = pytest.importorskip("boto3")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    ours = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in (*ours, "AWS_ENDPOINT_URL_S3", "AWS_REGION")}
    for name in before:
        os.environ.pop(name, None)
    os.environ.update(ours)
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    yield f"s3://{BUCKET}"
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    server.stop()
