"""That the run's storage is the same place on every machine, found out before any work starts.

The driver leaves a marker where the run will write; a task on each other node looks for it, leaves one of its own and
looks for what the run reads; the driver looks for the nodes' markers. All markers are taken away again, and the run's
directory itself is not made.
"""

import contextlib
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.util.client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines import storage
from pipelines.config import InputError

log = logging.getLogger(__name__)

ANSWER_S = 120.0  # how long nodes may take to answer: a new one has to unpack the project first


def check_storage(output: str, inputs: Sequence[str], resources: Mapping[str, float]) -> int:
    """Returns how many nodes see `output` and all `inputs` as the driver does, the driver's own counted.

    Asks the nodes that could hold a worker of these `resources`; without a connected Ray, the driver alone. Raises
    InputError that names the node and the path.
    """
    missing = [uri for uri in inputs if not storage.exists(uri)]
    if missing:
        raise InputError(f"{', '.join(missing)} does not exist")
    nodes = _other_nodes(resources) if ray.is_initialized() else {}
    with _marker(_near(output)) as marker:
        answers = {node: f"{marker}.{node[:12]}" for node in nodes}
        try:
            complaints = _ask(nodes, marker, answers, inputs)
            for node, answer in answers.items():
                if node not in complaints and not storage.exists(answer):
                    complaints[node] = f"wrote beside {marker} and this machine does not see it"
        finally:
            for answer in answers.values():
                if storage.exists(answer):
                    storage.delete(answer)
    if complaints:
        told = "; ".join(f"node {nodes[node]} {complaint}" for node, complaint in complaints.items())
        raise InputError(f"{told}; give paths on storage that all machines share, or s3://")
    return len(nodes) + 1


def look(marker: str, answer: str, inputs: Sequence[str]) -> str:
    """What a node has to complain of, or nothing; leaves `answer` beside the marker where it sees that."""
    try:
        if not storage.exists(marker):
            return f"does not see {marker.rpartition('/')[0]} as this machine does"
        missing = [uri for uri in inputs if not storage.exists(uri)]
        if missing:
            return f"does not see {', '.join(missing)}"
        storage.write_bytes(answer, b"")
    except OSError as error:
        return f"cannot use {marker.rpartition('/')[0]}: {error}"
    return ""


def _near(output: str) -> str:
    """Where a marker can stand without the run's directory being made: the nearest directory that there is."""
    if storage.is_s3(output):
        return output
    path = Path(output)
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return str(path)


@contextlib.contextmanager
def _marker(directory: str) -> Iterator[str]:
    """A file with a name of its own in a directory, there while the block runs."""
    uri = storage.join(directory, f".rmt-visible-{uuid.uuid4().hex}")
    try:
        storage.write_bytes(uri, b"")
    except OSError as error:
        raise InputError(f"{directory} cannot be written to: {error}") from error
    try:
        yield uri
    finally:
        storage.delete(uri)


def _other_nodes(resources: Mapping[str, float]) -> dict[str, str]:
    """Node id -> address of the living nodes other than this one that could ever hold these resources."""
    from_outside = ray.util.client.ray.is_connected()  # then no node's disk is the driver's
    own = None if from_outside else ray.get_runtime_context().get_node_id()
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] != own
        and all(node["Resources"].get(name, 0) >= amount for name, amount in resources.items())
    }


def _ask(nodes: Mapping[str, str], marker: str, answers: Mapping[str, str], inputs: Sequence[str]) -> dict[str, str]:
    """Node id -> complaint, of the nodes that have one."""
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    asked: dict[Any, str] = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            marker, answers[node], list(inputs)
        ): node
        for node in nodes
    }
    if not asked:
        return {}
    log.info("asking %d nodes whether they see the run's storage", len(asked))
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    complaints = {asked[each]: f"did not answer within {ANSWER_S:.0f} s" for each in late}
    for each in done:
        try:
            complaint = ray.get(each)
        except ray.exceptions.RayError as error:
            complaint = f"could not look: {str(error).splitlines()[0]}"
        if complaint:
            complaints[asked[each]] = complaint
    return complaints
