"""What every test runs under: few threads, no network, no foreign Ray; and one Ray for those that need it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUCKET = "rmt-tests"

# Set before torch, transformers and ray are imported, and inherited by every process that a test starts.
ENVIRONMENT = {
    "AWS_EC2_METADATA_DISABLED": "true",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
}
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}


def pytest_configure(config: pytest.Config) -> None:
    os.environ.update(ENVIRONMENT)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background: commands would be deaf to Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        os.environ.pop(name, None)  # a test never joins the cluster of whoever runs it
    import torch

    torch.set_num_threads(1)


# Files that take long, the longest first: two workers that take a file at a time then finish together.
LONG = (
    *["test_readme.py", "test_kinds_learn.py", "test_end_to_end.py", "test_train.py", "test_memory_works.py"],
    *["test_serve.py", "test_checkpoints.py", "test_prepare_killed.py", "test_part_trained.py", "test_footprint.py"],
    *["test_summarise.py", "test_prepare.py", "test_packaging.py", "test_benchmark.py", "test_engine.py"],
    "test_evaluate.py",
)


# What is tested with the long tests, in every test that takes it by name: compositions and variants of memories whose
# parts are tested otherwise too, and the second client of S3.
FURTHER = {
    *("rmt+xl", "lamemo+rmt", "bmojo+rmt", "xl+memformer", "memformer+rmt", "xl+armt", "shm+rmt", "xl+rmt-open"),
    *("xl+infinity", "rmt-5-read", "rmt-open", "bmojo", "s3fs"),
}


@pytest.hookimpl(tryfirst=True)  # before what `-m` leaves out is chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        case = getattr(item, "callspec", None)
        if case is not None and not FURTHER.isdisjoint(each for each in case.params.values() if isinstance(each, str)):
            item.add_marker(pytest.mark.long)
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))
    for item in items:
        if "local_ray" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One private Ray of two CPUs for the whole run; a start costs seconds. Tests use it and never shut it down."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 * 1024**2,
        runtime_env={"env_vars": WORKER_ENVIRONMENT},
    )
    yield
    ray.shutdown()


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
