"""Storage that machines do not share is found before work starts, and the search leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.config import InputError
from pipelines.training import visibility
from pipelines.training.visibility import check_storage, look

ROOT = Path(__file__).resolve().parents[2]


def test_alone_the_driver_sees_its_own_disk_and_nothing_is_left(tmp_path: Path) -> None:
    assert check_storage(str(tmp_path / "runs" / "new"), [str(tmp_path)], {"CPU": 1}) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist"):
        check_storage(str(tmp_path / "run"), [str(tmp_path / "nowhere")], {})


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(uri: str, data: bytes) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(storage, "write_bytes", refuse)
    with pytest.raises(InputError, match=r"cannot be written to: not yours"):
        check_storage(str(tmp_path / "run"), [], {})


def test_in_a_bucket_the_marker_comes_and_goes(s3_bucket: str) -> None:
    output = f"{s3_bucket}/visible/run"
    assert check_storage(output, [], {}) == 1
    assert storage.list_names(output) == []


def test_a_node_answers_beside_the_marker_or_says_what_it_lacks(tmp_path: Path) -> None:
    marker, answer = str(tmp_path / "marker"), str(tmp_path / "answer")
    assert look(marker, answer, []) == f"does not see {tmp_path} as this machine does"
    (tmp_path / "marker").touch()
    assert look(marker, answer, [str(tmp_path / "store")]) == f"does not see {tmp_path}/store"
    assert not (tmp_path / "answer").exists()
    assert look(marker, answer, [str(tmp_path)]) == ""
    assert (tmp_path / "answer").exists()


def pretend_nodes(monkeypatch: pytest.MonkeyPatch, told: dict[str, str], writes: bool = True) -> None:
    """Two other nodes of which one may have a complaint; those without write their answer, if they `write`."""

    def ask(nodes: dict[str, str], marker: str, answers: dict[str, str], inputs: list[str]) -> dict[str, str]:
        assert storage.exists(marker)
        for node, answer in answers.items():
            if writes and node not in told:
                storage.write_bytes(answer, b"")
        return dict(told)

    monkeypatch.setattr(visibility.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(visibility, "_other_nodes", lambda resources: {"a1": "10.0.0.1", "b2": "10.0.0.2"})
    monkeypatch.setattr(visibility, "_ask", ask)


def test_all_nodes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_nodes(monkeypatch, {})
    assert check_storage(str(tmp_path / "run"), [], {}) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_does_not_see_it_is_named_by_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_nodes(monkeypatch, {"b2": "does not see /data"})
    with pytest.raises(InputError, match=r"^node 10.0.0.2 does not see /data; give paths on storage"):
        check_storage(str(tmp_path / "run"), [], {})
    assert list(tmp_path.iterdir()) == []


def test_a_node_whose_writing_is_not_seen_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_nodes(monkeypatch, {}, writes=False)
    with pytest.raises(InputError, match=r"node 10.0.0.1 wrote beside .* and this machine does not see it"):
        check_storage(str(tmp_path / "run"), [], {})


ASK_A_CLUSTER = """
import sys
import ray
from ray.cluster_utils import Cluster
from pipelines.config import InputError
from pipelines.training import visibility

small = {"object_store_memory": 80 * 1024**2}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
for _ in range(2):
    cluster.add_node(num_cpus=1, **small)
ray.init(address=cluster.address, logging_level="ERROR")
told = [str(visibility.check_storage(sys.argv[1], [], {"CPU": 1.0}))]
nodes = visibility._other_nodes({"CPU": 1.0})
answers = {node: sys.argv[1] + "/answer-" + node for node in nodes}
told.append(str(sorted(visibility._ask(nodes, sys.argv[1] + "/none", answers, []).values())))
ray.shutdown()
cluster.shutdown()
print(" | ".join(told))
"""


@pytest.mark.long
def test_tasks_look_on_every_node_that_could_hold_a_worker(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ASK_A_CLUSTER, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    complaint = f"does not see {tmp_path} as this machine does"
    assert done.stdout.splitlines()[-1] == f"3 | {[complaint] * 2}"
    assert list(tmp_path.iterdir()) == []
