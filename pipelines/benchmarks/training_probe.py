"""Measurements of training that need processes of their own: `python -m pipelines.benchmarks.training_probe KIND JSON`.

KIND is `bare` (a plain PyTorch loop over the job's windows) or `memory`; JSON a training configuration. The last line
of stdout is one JSON object.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

import rmt_core
from pipelines.config import build
from pipelines.data.lanes import Lanes
from pipelines.training.costs import model_size, outline, segment_cost
from pipelines.training.engine import parameter_groups, segments_of
from pipelines.training.footprint import footprint
from pipelines.training.live_bytes import LiveBytes
from pipelines.training.reading import make_lanes, open_store
from pipelines.training.settings import TrainConfig, learning_rate, model_config
from pipelines.training.weights import fresh_model
from pipelines.training.worker import Run, set_up, start_run


def bare(config: TrainConfig) -> dict[str, Any]:
    """Tokens a second of the loop that one would write without Ray and DeepSpeed, at its best between two lines."""
    torch.set_num_threads(1)
    store = open_store(config)
    tokenizer = store.load_tokenizer()
    lanes = Lanes(make_lanes(config, store, tokenizer), store.segment_len)
    device = torch.device("cuda" if config.workers.use_gpu else "cpu")
    description = model_config(config, tokenizer, store.segment_len)
    model = fresh_model(description, config.model, config.seed).to(device)
    groups = parameter_groups(model, config.optimizer.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(config.optimizer.beta1, config.optimizer.beta2))
    state = rmt_core.state.detach(model.init_state(config.batch_size))
    first = time.time()
    rates, began, tokens = [], time.perf_counter(), 0
    for step in range(config.num_steps):
        window = lanes.window(step, config.curriculum.num_segments[0])
        result = model.unroll(segments_of(window, device), state)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, config.num_steps)
        optimizer.step()
        optimizer.zero_grad()
        state = rmt_core.state.detach(result.state)
        tokens += int(window.lengths.sum())
        if (step + 1) % config.report.log_every == 0:
            float(result.loss)  # waits for the device, as a line of metrics does
            now = time.perf_counter()
            rates.append(tokens / (now - began))
            began, tokens = now, 0
    rmt_core.save(Path(config.output) / "model", model)
    return {"tokens_per_s": max(rates[1:] or rates), "began": first}


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


KINDS = {"bare": bare, "memory": memory}

if __name__ == "__main__":
    print(json.dumps(KINDS[sys.argv[1]](build(TrainConfig, json.loads(sys.argv[2])))))
