"""Pools are chosen where a cluster has them, and nowhere else."""

import pytest
import ray.data

from pipelines import cluster


def test_pools_are_those_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RMT_POOLS", raising=False)
    assert cluster.pool("train") == cluster.pool("data") == {}
    monkeypatch.setenv("RMT_POOLS", "train, data")
    assert cluster.pool("train") == {"rmt/pool": "train"}
    assert cluster.pool("data") == {"rmt/pool": "data"}
    monkeypatch.setenv("RMT_POOLS", "train")
    assert cluster.pool("data") == {}
    with cluster._no_pools():
        assert cluster.pool("train") == {}
    assert cluster.pool("train") == {"rmt/pool": "train"}


@pytest.mark.usefixtures("local_ray")
def test_ray_data_works_in_its_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMT_POOLS", "data")
    options = ray.data.DataContext.get_current().execution_options
    with cluster.connect():
        assert options.label_selector == {"rmt/pool": "data"}
    monkeypatch.delenv("RMT_POOLS")
    with cluster.connect():
        assert options.label_selector is None
