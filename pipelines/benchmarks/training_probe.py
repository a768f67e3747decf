"""Measurements of training that need processes of their own: `python -m pipelines.benchmarks.training_probe KIND JSON`.

KIND is `bare` (a plain PyTorch loop over the job's windows), `turns` (that loop and the job's, by turns) or `memory`;
JSON a training configuration. The last line of stdout is one JSON object.
"""

import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
from torch import distributed as dist

import rmt_core
from pipelines.cluster import connect
from pipelines.config import build
from pipelines.data.lanes import Lanes
from pipelines.training.bell import Bell
from pipelines.training.costs import model_size, outline, segment_cost
from pipelines.training.engine import parameter_groups, segments_of
from pipelines.training.footprint import footprint
from pipelines.training.live_bytes import LiveBytes
from pipelines.training.monitor import Monitor
from pipelines.training.reading import make_lanes, open_store
from pipelines.training.settings import TrainConfig, learning_rate, model_config
from pipelines.training.weights import fresh_model
from pipelines.training.worker import Run, set_up, start_run
from rmt_core.checkpoint import tensors_of


class _Loop:
    """The loop that one would write without Ray and DeepSpeed, a step at a time."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        store = open_store(config)
        tokenizer = store.load_tokenizer()
        self._lanes = Lanes(make_lanes(config, store, tokenizer), store.segment_len)
        self._device = torch.device("cuda" if config.workers.use_gpu else "cpu")
        description = model_config(config, tokenizer, store.segment_len)
        self.model = fresh_model(description, config.model, config.seed).to(self._device)
        groups = parameter_groups(self.model, config.optimizer.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, betas=(config.optimizer.beta1, config.optimizer.beta2))
        self._state = rmt_core.state.detach(self.model.init_state(config.batch_size))
        self._step = 0

    def advance(self) -> tuple[int, torch.Tensor]:
        """One step: (the tokens it read, its loss)."""
        config = self._config
        window = self._lanes.window(self._step, config.curriculum.num_segments[0])
        result = self.model.unroll(segments_of(window, self._device), self._state)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, self._step, config.num_steps)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._state = rmt_core.state.detach(result.state)
        self._step += 1
        return int(window.lengths.sum()), result.loss


def bare(config: TrainConfig) -> dict[str, Any]:
    """Tokens a second of the loop, at its best between two lines."""
    torch.set_num_threads(1)
    loop = _Loop(config)
    first = time.time()
    rates, began, tokens = [], time.perf_counter(), 0
    for step in range(config.num_steps):
        num_tokens, loss = loop.advance()
        tokens += num_tokens
        if (step + 1) % config.report.log_every == 0:
            float(loss)  # waits for the device, as a line of metrics does
            now = time.perf_counter()
            rates.append(tokens / (now - began))
            began, tokens = now, 0
    rmt_core.save(Path(config.output) / "model", loop.model)
    return {"tokens_per_s": max(rates[1:] or rates), "began": first}


def turns(config: TrainConfig) -> dict[str, Any]:
    """Seconds of each step of the loop and of the job's worker, which take turns in one process: what disturbs the
    machine disturbs both. The process is a worker of Ray, and asks the run's monitor as the job's do.
    """
    with connect(1):
        monitor = ray.remote(num_cpus=0)(Monitor).remote()
        found: dict[str, Any] = ray.get(ray.remote(num_cpus=1)(_turns).remote(config.model_dump(mode="json"), monitor))
    return found


def _turns(settings: dict[str, Any], monitor: Any) -> dict[str, Any]:
    config = build(TrainConfig, settings)
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")  # as Ray Train sets them
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        run, loop = start_run(set_up(config), None), _Loop(config)
        bell = Bell(lambda: bool(ray.get(monitor.is_stopping.remote())))

        def of_job() -> None:
            run.advance(bell.wishes())
            if run.step % config.report.log_every == 0:
                run._metrics(1.0)

        ways = {"job": of_job, "loop": lambda: float(loop.advance()[1])}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for step in range(config.num_steps):
            for name in list(ways)[:: 1 if step % 2 else -1]:
                began = time.perf_counter()
                ways[name]()
                seconds[name].append(time.perf_counter() - began)
        dist.destroy_process_group()
    ours, theirs = (tensors_of(model) for model in (run.setup.model, loop.model))
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    return {"seconds": seconds, "difference": apart}


def memory(config: TrainConfig) -> dict[str, Any]:
    """The most that worker 0 of two holds for its model and its steps, in tensors and in all; the plan's estimate."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Path(config.output).mkdir()
    torch.multiprocessing.spawn(_memory_worker, args=(config, port), nprocs=2)
    found: dict[str, Any] = json.loads((Path(config.output) / "found.json").read_text())
    return found


def _memory_worker(rank: int, config: TrainConfig, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2")  # as Ray Train sets them
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    small = config.model.model_copy(update={"width": 32, "num_layers": 1, "feed_forward_width": 32})
    _three_steps(config.model_copy(update={"model": small}))  # what libraries load and keep, whatever the model
    before = _resident("VmRSS")
    with LiveBytes() as live:
        run = _three_steps(config, live)
    resident = _resident("VmHWM") - before
    if rank == 0:
        model = outline(run.setup.description, config.model)
        size, cost = model_size(model), segment_cost(model, len(run.setup.numbers))
        estimate = footprint(config, size, cost, config.workers.zero_stage, 2).device_bytes
        found = {
            "parameters": size.num_parameters,
            "estimate_bytes": estimate,
            "peak_bytes": live.peak_bytes,
            "resident_bytes": resident,
        }
        (Path(config.output) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _three_steps(config: TrainConfig, live: LiveBytes | None = None) -> Run:
    """A run as the job's workers have it, without Ray; peaks are those of its last two steps, which begin alike."""
    run = start_run(set_up(config), None)
    run.advance()
    if live is not None:
        live.peak_bytes = live.num_bytes
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    for _ in range(2):
        run.advance()
    return run


def _resident(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


KINDS = {"bare": bare, "turns": turns, "memory": memory}

if __name__ == "__main__":
    print(json.dumps(KINDS[sys.argv[1]](build(TrainConfig, json.loads(sys.argv[2])))))
