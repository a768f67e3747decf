"""What a run tells of itself: metrics.jsonl, TensorBoard, and the sums behind their figures.

A figure that is no finite number, as of a run that diverged, is null in metrics.jsonl and left out of TensorBoard.

Axes: R rows of a worker, K segments of a window, T tokens of a segment.
"""

import json
import logging
import math
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

import rmt_core
from pipelines import storage
from pipelines.data.lanes import Window

log = logging.getLogger(__name__)

INDICES = 32  # the loss by segment index is kept for the first so many segments; later ones are counted with the last

_UPLOAD_S, _UPLOAD_SHARE = 30.0, 20.0  # between uploads of metrics.jsonl: seconds, and times what the last one took

Metrics = dict[str, Any]


class Sums:
    """Losses since the last line, added up over steps and then over workers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clear()

    def clear(self) -> None:
        self.num_timed = 0  # tokens read by this process, unlike those that a checkpoint brought
        self.by_index = torch.zeros(2, INDICES, dtype=torch.float64)  # nats and labels by segment index
        self.answers = torch.zeros(2, dtype=torch.float64)
        self.places = torch.zeros(4, dtype=torch.int64)  # tokens and places for them, segments and places for them

    def state(self) -> dict[str, torch.Tensor]:
        """What was added since the last line, as tensors; those of several workers may be added up."""
        return {"by_index": self.by_index, "answers": self.answers, "places": self.places}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a `state`."""
        self.by_index, self.answers = state["by_index"].clone(), state["answers"].clone()
        self.places = state["places"].clone()

    def add(self, window: Window, nats: torch.Tensor) -> None:
        """A window with the nats (R, K, T) of its labels."""
        nats = nats.detach().double().cpu()
        asked = torch.from_numpy(window.labels != rmt_core.IGNORED)
        index = torch.from_numpy(window.segment_index).clamp(max=INDICES - 1).flatten()
        self.by_index[0].index_add_(0, index, nats.sum(-1).flatten())
        self.by_index[1].index_add_(0, index, asked.sum(-1).flatten().double())
        answers = torch.from_numpy(window.is_answer)
        self.answers += torch.stack([nats[answers].sum(), answers.sum().double()])
        lengths = window.lengths
        self.num_timed += int(lengths.sum())
        self.places += torch.tensor([lengths.sum(), window.tokens.size, (lengths > 0).sum(), lengths.size])

    def metrics(self, elapsed_s: float) -> Metrics:
        """Means over all workers; every worker calls it, and all begin to sum anew.

        `elapsed_s` is what the steps since the last line, or since a start from a checkpoint, took.
        """
        timed = torch.tensor([self.num_timed], dtype=torch.float64)
        flat = torch.cat([self.by_index.flatten(), self.answers, self.places.double(), timed]).to(self.device)
        dist.all_reduce(flat)
        flat = flat.cpu()
        by_index, (answer_nats, num_answers) = flat[: 2 * INDICES].view(2, INDICES), flat[2 * INDICES : -5].tolist()
        num_tokens, token_places, num_segments, segment_places, num_timed = flat[-5:].tolist()
        self.clear()
        nats, counts = by_index.tolist()
        return {
            "loss": _mean(sum(nats), sum(counts)),
            "answer_loss": _mean(answer_nats, num_answers),
            "loss_by_segment": [_mean(n, c) for n, c in zip(nats, counts, strict=True)][: _used(counts)],
            "tokens_per_s": num_timed / elapsed_s,
            "padding_fraction": 1 - num_tokens / max(token_places, 1),
            "lane_use_fraction": num_segments / max(segment_places, 1),
        }


def finite(value: Any) -> Any:
    """JSON values with None for every number that is infinite or no number, which JSON has no name for."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def _used(counts: list[float]) -> int:
    return max((i + 1 for i, count in enumerate(counts) if count), default=0)


def scalars(metrics: Metrics) -> dict[str, float]:
    """The numbers of a line of metrics by name, the loss of segment 0 as `loss_by_segment/00`; without the step."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float) and name != "step"}
    losses = enumerate(metrics.get("loss_by_segment", []))
    numbers |= {f"loss_by_segment/{index:02d}": value for index, value in losses if value is not None}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: of the GPU where it trains on one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


class Journal:
    """metrics.jsonl and TensorBoard's files of a run, written by one worker; lines after `step` are dropped.

    On S3, where nothing can be added to an object, metrics.jsonl is written whole now and then, at most every
    `_UPLOAD_S`, and both at every `flush`.
    """

    def __init__(self, output: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.uri, self.board_uri = storage.join(output, "metrics.jsonl"), storage.join(output, "tensorboard")
        self.lines = _lines_until(self.uri, step)
        self.remote = storage.is_s3(output)
        self._folder = tempfile.TemporaryDirectory(prefix="rmt-") if self.remote else None
        self.board = SummaryWriter(self.board_uri if self._folder is None else self._folder.name, purge_step=step + 1)
        self._num_new = 0  # lines since the last flush
        self._upload()

    def _upload(self) -> None:
        began = time.monotonic()
        storage.write_bytes(self.uri, "".join(line + "\n" for line in self.lines).encode())
        now = time.monotonic()
        self._next_s = now + max(_UPLOAD_S, _UPLOAD_SHARE * (now - began))

    def write(self, metrics: Metrics) -> None:
        """One line of metrics, which hold their `step`."""
        self.lines.append(_line(metrics))
        self._num_new += 1
        if not self.remote:
            with storage.disk_faults(self.uri), open(self.uri, "a", encoding="utf-8") as file:
                file.write(self.lines[-1] + "\n")
        elif time.monotonic() >= self._next_s:
            self._upload()
        for name, value in scalars(metrics).items():
            self.board.add_scalar(name if "/" in name else f"train/{name}", value, metrics["step"])
        self.board.flush()

    def flush(self) -> None:
        """Everything is where it belongs when this returns."""
        if self._folder is not None and self._num_new:
            self._upload()
            for path in sorted(Path(self._folder.name).iterdir()):
                storage.write_bytes(storage.join(self.board_uri, path.name), path.read_bytes())
        self._num_new = 0

    def close(self) -> None:
        self.flush()
        self.board.close()
        if self._folder is not None:
            self._folder.cleanup()


def _line(metrics: Metrics) -> str:
    return json.dumps(finite(metrics), allow_nan=False)


def _lines_until(uri: str, step: int) -> list[str]:
    """The lines of a metrics.jsonl up to a step; what a kill left half written is no line."""
    found, num_torn = [], 0
    for line in storage.read_bytes(uri).decode(errors="replace").splitlines() if storage.exists(uri) else []:
        try:
            metrics = json.loads(line)
            if metrics["step"] <= step:
                found.append(_line(metrics))
        except (ValueError, KeyError, TypeError):
            num_torn += 1
    if num_torn:
        log.warning("%s: left out %d lines that are no metrics, as a kill leaves them half written", uri, num_torn)
    return found
