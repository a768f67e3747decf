"""A short load, many users that cancel and vanish; tests/scenarios/serve_load.py is the same for as long as wanted."""

import asyncio

import pytest

from tests.pipelines.serving_http import running
from tests.scenarios.serve_load import run


@pytest.mark.long
def test_under_load_nothing_breaks_leaks_or_grows() -> None:
    with running(max_requests=64, prefix_cache_bytes=2**20) as server:
        found = asyncio.run(run(server.url, None, num_sessions=60, seconds=30.0, seed=0))
    assert found["ok"], found
    assert found["broken_off"]
