"""A short load, many users that cancel and vanish; tests/scenarios/serve_load.py is the same for as long as wanted."""

import asyncio

import httpx
import pytest

from tests.pipelines.serving_http import running
from tests.scenarios.serve_load import Load, report, run


@pytest.mark.long
def test_under_load_nothing_breaks_leaks_or_grows() -> None:
    with running(max_requests=64, prefix_cache_bytes=2**20) as server:
        found = asyncio.run(run(server.url, None, num_sessions=60, seconds=30.0, seed=0))
    assert found["ok"], found
    assert found["broken_off"]


def test_a_connection_that_broke_is_a_fault() -> None:
    load = Load(httpx.AsyncClient(), 0.0, 0)
    load.first_s = [0.1]
    left = {"rmt_engine_num_requests": 0.0, "rmt_engine_num_writing": 0.0}
    assert report(load, [(0.0, 1.0)], left, 1.0)["ok"]
    load.faults["ReadError"] += 1
    assert not report(load, [(0.0, 1.0)], left, 1.0)["ok"]
