"""The workers of a summary job: a pool of Ray Data's actors that take blocks.

Ray is told which blocks, and tells back how many rows. An actor or a node that dies is replaced, and its list of blocks
is gone through again: blocks that were committed are seen to be done.
"""

import logging
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import ray
import ray.data

from pipelines.cluster import pool
from pipelines.config import InputError
from pipelines.summarising.ledger import Counts
from pipelines.summarising.strategies import Settings
from pipelines.summarising.worker import BlockWorker, Work

log = logging.getLogger(__name__)

_REPORT_S = 10.0  # between progress lines
_CHUNKS_A_WORKER = 16  # lists of blocks; more: workers end together; fewer: less for Ray to do
_SCHEMA = pa.schema([(name, pa.int64()) for name in Counts._fields])


class Crew(NamedTuple):
    """Who works, and on what."""

    num_workers: int
    device: str
    blocks: list[int]
    committed: set[int]  # those of them that have rows: only what failed in them is done again


def run_blocks(settings: Settings, work: Work, crew: Crew) -> Counts:
    """Has all blocks made; the counts of their rows."""
    made, begun = Counts(), time.monotonic()
    last_report = begun
    num_blocks = 0
    for table in _counts(settings, work, crew):
        for row in table.to_pylist():
            made = made.plus(Counts(**row))
            num_blocks += 1
        if time.monotonic() - last_report > _REPORT_S or num_blocks == len(crew.blocks):
            last_report = time.monotonic()
            speed = made.num_tokens / (last_report - begun)
            log.info(
                "%d of %d blocks: %d documents, %d ok, %d errors, %.0f tokens/s",
                *(num_blocks, len(crew.blocks), made.num_documents, made.num_ok, made.num_error, speed),
            )
    return made


def _counts(settings: Settings, work: Work, crew: Crew) -> Iterator[pa.Table]:
    """A row a block, as blocks end."""
    if not crew.blocks:
        return
    size = math.ceil(len(crew.blocks) / (_CHUNKS_A_WORKER * crew.num_workers))
    chunks = [crew.blocks[start : start + size] for start in range(0, len(crew.blocks), size)]
    rows = [{"blocks": chunk, "committed": [block in crew.committed for block in chunk]} for chunk in chunks]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Worker,
        fn_constructor_kwargs={"settings": settings, "work": work},
        compute=ray.data.ActorPoolStrategy(size=min(crew.num_workers, len(rows))),
        batch_size=1,
        batch_format="pyarrow",
        **_resources(crew),
    )
    dataset.context.execution_options.preserve_order = False
    dataset.context.execution_no_progress_timeout_s = -1  # one long document may take long
    dataset.context.target_max_block_size = 1  # so that counts come as blocks end
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


class _Worker:
    """An actor that holds the model."""

    def __init__(self, settings: Settings, work: Work) -> None:
        self._worker = BlockWorker(settings, work)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for row in batch.to_pylist():
            for block, committed in zip(row["blocks"], row["committed"], strict=True):
                counts = self._worker.run(block, committed=committed)
                yield pa.Table.from_pylist([counts._asdict()], _SCHEMA)


def _resources(crew: Crew) -> dict[str, Any]:
    """What a worker reserves: a core, or less where cores are few, since Ray's other tasks need some of them too.

    On GPUs it also chooses their pool, where the cluster has pools; Ray Data would take that for data.
    """
    available = ray.cluster_resources()
    share = available.get("CPU", 0.0) / 2 / crew.num_workers
    num_cpus = min(1.0, max(0.01, math.floor(100 * share) / 100)) if share else 1.0
    if crew.device == "cpu":
        return {"num_cpus": num_cpus}
    there, where = available.get("GPU", 0.0), pool("train")
    if not there and not where:
        raise InputError("device cuda: Ray sees no GPU; use --device cpu")
    num_gpus = min(1.0, math.floor(100 * there / crew.num_workers) / 100) if there else 1.0  # an idle pool has none
    return {"num_cpus": num_cpus, "num_gpus": num_gpus, "label_selector": where}
