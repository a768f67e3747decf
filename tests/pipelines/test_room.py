"""Workers that can never start are refused before Ray waits for them."""

import pytest

from pipelines.config import InputError
from pipelines.training.room import check_room, room_for
from pipelines.training.settings import WorkerSettings

THERE = {"CPU": 2.0, "GPU": 1.0, "memory": 1e9}


@pytest.mark.parametrize(
    "settings",
    [
        {"num_workers": 2},
        {"num_workers": 4, "cpus": 0.5},
        {"num_workers": "1,64"},
        {"num_workers": 1, "use_gpu": True},
    ],
)
def test_workers_that_fit_may_come(settings: dict[str, object]) -> None:
    check_room(WorkerSettings(**settings), THERE)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_workers": 4}, r"num_workers 4 x workers.cpus 1 exceeds the 2 cores .* workers.cpus to at most 0.5"),
        ({"num_workers": "3,8"}, "num_workers 3 x"),
        ({"cpus": 8.0}, "num_workers 1 x workers.cpus 8 exceeds the 2 cores"),
        ({"num_workers": 2, "use_gpu": True}, "num_workers 2 with a GPU each, but this machine has 1"),
    ],
)
def test_workers_that_never_fit_are_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_room(WorkerSettings(**settings), THERE)


def node(pool: str | None = None, alive: bool = True, **resources: float) -> dict[str, object]:
    """As `ray.nodes()` tells it."""
    return {"Alive": alive, "Resources": resources, "Labels": None if pool is None else {"rmt/pool": pool, "zone": "a"}}


def test_room_is_counted_node_by_node_and_by_what_is_free() -> None:
    free = {"CPU": 100.0, "GPU": 100.0}
    nodes = [node(CPU=3.0), node(CPU=3.0, GPU=1.0), node(CPU=64.0, alive=False)]
    assert room_for({"CPU": 2.0}, nodes, free, {}) == 2
    assert room_for({"CPU": 0.1}, nodes, free, {}) == 60
    assert room_for({"CPU": 1.0, "GPU": 1.0}, nodes, free, {}) == 1
    assert room_for({"CPU": 1.0}, nodes, {"CPU": 2.5}, {}) == 2
    assert room_for({"CPU": 1.0}, nodes, {}, {}) == 0


def test_room_is_counted_in_the_pool_alone() -> None:
    nodes = [node(CPU=4.0), node("train", CPU=2.0), node("data", CPU=8.0)]
    assert room_for({"CPU": 1.0}, nodes, {"CPU": 14.0}, {"rmt/pool": "train"}) == 2
