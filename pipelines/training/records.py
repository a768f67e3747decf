"""What a run tells of itself: metrics.jsonl, TensorBoard, and the sums behind their figures.

Axes: R rows of a worker, K segments of a window, T tokens of a segment.
"""

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

import rmt_core
from pipelines import storage
from pipelines.data.lanes import Window

INDICES = 32  # the loss by segment index is kept for the first so many segments; later ones are counted with the last

Metrics = dict[str, Any]


class Sums:
    """Losses since the last line, added up over steps and then over workers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clear()

    def clear(self) -> None:
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
        self.places += torch.tensor([lengths.sum(), window.tokens.size, (lengths > 0).sum(), lengths.size])

    def metrics(self, elapsed_s: float) -> Metrics:
        """Means over all workers; every worker calls it, and all begin to sum anew."""
        flat = torch.cat([self.by_index.flatten(), self.answers, self.places.double()]).to(self.device)
        dist.all_reduce(flat)
        flat = flat.cpu()
        by_index, (answer_nats, num_answers) = flat[: 2 * INDICES].view(2, INDICES), flat[2 * INDICES : -4].tolist()
        num_tokens, token_places, num_segments, segment_places = flat[-4:].tolist()
        self.clear()
        nats, counts = by_index.tolist()
        return {
            "loss": _mean(sum(nats), sum(counts)),
            "answer_loss": _mean(answer_nats, num_answers),
            "loss_by_segment": [_mean(n, c) for n, c in zip(nats, counts, strict=True)][: _used(counts)],
            "tokens_per_s": num_tokens / elapsed_s,
            "padding_fraction": 1 - num_tokens / max(token_places, 1),
            "lane_use_fraction": num_segments / max(segment_places, 1),
        }


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
    """metrics.jsonl and TensorBoard files of a run, written by one worker; lines after `step` are dropped."""

    def __init__(self, output: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.uri = storage.join(output, "metrics.jsonl")
        old = storage.read_bytes(self.uri).decode().splitlines() if storage.exists(self.uri) else []
        self.lines = [line for line in old if json.loads(line)["step"] <= step]
        local = not storage.is_s3(output)
        self.board = SummaryWriter(str(Path(output) / "tensorboard"), purge_step=step) if local else None
        storage.write_bytes(self.uri, self._content())

    def _content(self) -> bytes:
        return "".join(line + "\n" for line in self.lines).encode()

    def write(self, metrics: Metrics) -> None:
        """One line of metrics, which hold their `step`."""
        self.lines.append(json.dumps(metrics))
        if storage.is_s3(self.uri):  # objects cannot grow
            storage.write_bytes(self.uri, self._content())
        else:
            with open(self.uri, "a", encoding="utf-8") as file:
                file.write(self.lines[-1] + "\n")
        if self.board is not None:
            for name, value in scalars(metrics).items():
                self.board.add_scalar(name if "/" in name else f"train/{name}", value, metrics["step"])
            self.board.flush()
