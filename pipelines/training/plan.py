"""What a run will be, told before it starts: lanes, steps, tokens, memory by ZeRO stage, cost. Nothing is made.

Axes: R rows of a worker, T tokens of a segment.
"""

import logging
from collections import defaultdict
from typing import Any

import rmt_core
from pipelines.data import lanes as data
from pipelines.training.costs import model_size, segment_cost
from pipelines.training.footprint import STAGES, footprint
from pipelines.training.settings import TrainConfig, num_segments_at, stage_at

log = logging.getLogger(__name__)

_COUNTED_WINDOWS = 100_000  # that draw their size, one by one; more are taken at their mean


def make_plan(
    config: TrainConfig, store: data.Reads, lanes: list[Any], model: rmt_core.RecurrentModel
) -> dict[str, Any]:
    """The plan as JSON values; `lanes` are all of the run's, `model` needs no weights.

    Memory is that of the worker with the most rows where the run has as few workers as it may. Numbers of segments are
    those of the curriculum's steps: a stage that lasts until its answers are known may end earlier or later.
    """
    num_workers = config.workers.num_workers[0]
    num_rows = -(-config.batch_size // num_workers)
    size, cost = model_size(model), segment_cost(model, num_rows)
    reading = _reading(config, store, lanes)
    device_hours = None
    if config.report.tokens_per_s is not None:
        device_hours = reading["num_tokens"] / config.report.tokens_per_s / 3600
    return {
        "num_steps": config.num_steps,
        **reading,
        "num_parameters": size.num_parameters,
        "num_trained_parameters": size.num_trained,
        "flops_per_token": (cost.forward_flops + cost.backward_flops) / (num_rows * store.segment_len),
        "num_workers": num_workers,
        "rows_per_worker": num_rows,
        "memory_per_worker": [footprint(config, size, cost, stage, num_workers)._asdict() for stage in STAGES],
        "device_hours": device_hours,
    }


def _reading(config: TrainConfig, store: data.Reads, lanes: list[Any]) -> dict[str, Any]:
    """What the lanes read in an epoch and in the whole run."""
    num_tokens = sum(document.num_tokens for document in store.manifest)
    num_segments = sum(document.num_segments for document in store.manifest)
    num_asked = config.num_task_lanes
    windows = _windows(config)
    per_lane = sum(size * number for size, number in windows.items())
    in_documents = per_lane * (len(lanes) - num_asked)
    mean_len, epochs_of_stores = num_tokens / num_segments, None
    if store.shares:
        mean_len, epochs_of_stores = _weighted(store, in_documents)
    in_tasks = 0.0
    if num_asked:
        in_tasks = num_asked * sum(number * lanes[0].source.mean_len(size) for size, number in windows.items())
    return {
        "num_documents": len(store.manifest),
        "num_segments_per_epoch": num_segments,
        "num_tokens_per_epoch": num_tokens,
        "num_lanes": {"documents": len(lanes) - num_asked, "tasks": num_asked},
        "num_windows": round(sum(windows.values())),
        "num_segments": round(per_lane * len(lanes)),
        "num_tokens": round(in_documents * mean_len + in_tasks),
        "num_epochs": in_documents / num_segments,
        "num_epochs_of_stores": epochs_of_stores,
        "padding_fraction": {
            "segments": 1 - mean_len / store.segment_len,
            "lanes": _uneven_fraction(lanes),
        },
    }


def _weighted(store: data.Reads, num_read: float) -> tuple[float, list[float]]:
    """Of stores that are read by weight: mean tokens of a segment, and epochs of each in `num_read` segments of all."""
    weight = sum(share.weight for share in store.shares)
    mean_len, epochs = 0.0, []
    for share in store.shares:
        documents = store.manifest[share.documents.start : share.documents.stop]
        num_segments = sum(document.num_segments for document in documents)
        mean_len += share.weight / weight * sum(document.num_tokens for document in documents) / num_segments
        epochs.append(num_read * share.weight / weight / num_segments)
    return mean_len, epochs


def _uneven_fraction(lanes: list[Any]) -> float:
    """How much less than the fullest lane the others read in the first epoch, of lanes that follow documents."""
    following = [lane for lane in lanes if isinstance(lane, data.DocumentLane)]
    loads = [sum(piece.num_segments for piece in lane.source.lane(lane.number, 0)) for lane in following]
    return 1 - sum(loads) / (max(loads) * len(loads)) if loads else 0.0


def _windows(config: TrainConfig) -> dict[int, float]:
    """Segments of a window -> how many windows of the run have so many."""
    curriculum, count = config.curriculum, config.optimizer.accumulation_steps
    num_windows = config.num_steps * count
    found: dict[int, float] = defaultdict(float)
    if num_windows > _COUNTED_WINDOWS or not curriculum.vary:
        for longest, steps in zip(curriculum.num_segments, curriculum.steps, strict=True):
            sizes = range(curriculum.least_segments if curriculum.vary else longest, longest + 1)
            for num_segments in sizes:
                found[num_segments] += steps * count / len(sizes)
        return found
    for window in range(num_windows):
        found[num_segments_at(curriculum, stage_at(curriculum, window // count), window, config.seed)] += 1
    return found


def tell(plan: dict[str, Any]) -> None:
    """The plan for people, as log lines."""
    lanes = plan["num_lanes"]
    log.info(
        "%d steps of %d lanes (%d read documents, %d texts of tasks): %s tokens, %.2f epochs of %d documents",
        *(plan["num_steps"], lanes["documents"] + lanes["tasks"], lanes["documents"], lanes["tasks"]),
        *(f"{plan['num_tokens']:,}", plan["num_epochs"], plan["num_documents"]),
    )
    log.info(
        "%s parameters, %s trained; %.3g operations a token",
        *(f"{plan['num_parameters']:,}", f"{plan['num_trained_parameters']:,}", plan["flops_per_token"]),
    )
    for need in plan["memory_per_worker"]:
        log.info(
            "ZeRO %d, %d workers: %s a worker (weights %s, gradients %s, optimiser %s, buffers %s, activations %s)",
            need["zero_stage"],
            plan["num_workers"],
            *(_shown(need[f"{part}_bytes"]) for part in _PARTS),
        )
    if plan["device_hours"] is not None:
        log.info("%.3g device hours, %.3g hours", plan["device_hours"], plan["device_hours"] / plan["num_workers"])


_PARTS = ("device", "weights", "gradients", "optimizer", "buffers", "activations")


def _shown(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"
