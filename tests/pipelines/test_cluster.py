"""Pools are chosen where a cluster has them, and nowhere else."""

import pytest
import ray
import ray.data

from pipelines import cluster
from pipelines.config import InputError
from pipelines.summarising import crew


def test_pools_are_those_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RMT_POOLS", raising=False)
    assert cluster.pool("train") == cluster.pool("data") == {}
    monkeypatch.setenv("RMT_POOLS", "train, data")
    assert cluster.pool("train") == {"rmt/pool": "train"}
    assert cluster.pool("data") == {"rmt/pool": "data"}
    monkeypatch.setenv("RMT_POOLS", "train")
    assert cluster.pool("data") == {}
    with cluster._environment(RMT_POOLS=""):
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


def test_summaries_on_gpus_ask_for_their_pool_though_it_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = crew.Crew(2, "cuda", [], set())
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    assert crew._resources(wanted) == {"num_cpus": 1.0, "num_gpus": 0.5, "label_selector": {}}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    with pytest.raises(InputError, match="no GPU"):
        crew._resources(wanted)
    monkeypatch.setenv("RMT_POOLS", "train,data")
    assert crew._resources(wanted) == {"num_cpus": 1.0, "num_gpus": 1.0, "label_selector": {"rmt/pool": "train"}}
    assert crew._resources(wanted._replace(device="cpu")) == {"num_cpus": 1.0}  # where Ray Data works: data
