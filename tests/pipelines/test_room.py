"""Workers that can never start are refused before Ray waits for them."""

import pytest

from pipelines.config import InputError
from pipelines.training.room import check_room
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
