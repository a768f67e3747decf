"""Two workers under DeepSpeed equal one process and plain torch, for every ZeRO stage and gradient mode."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

import rmt_core
from pipelines.config import build
from pipelines.data import lanes
from pipelines.data.books import BookStore
from pipelines.training import engine as engines
from pipelines.training.settings import TrainConfig, learning_rate, model_config, num_segments_at, stage_at
from pipelines.training.worker import make_lanes
from rmt_core.checkpoint import tensors_of

STEPS, WORLD_SIZE = 3, 2
CASES = [
    (0, {"mode": "full"}),
    (1, {"mode": "full"}),
    (2, {"mode": "full"}),
    (3, {"mode": "full"}),
    (2, {"mode": "truncated", "bptt_segments": 2}),
    (3, {"mode": "checkpoint"}),
]


def settings(zero_stage: int, gradient: dict[str, Any]) -> TrainConfig:
    return build(
        TrainConfig,
        {
            "batch_size": 4,
            "segment_len": 48,
            "model": {"width": 32, "feed_forward_width": 48, "memory": {"kind": "rmt", "num_tokens": 2}},
            "optimizer": {"warmup_steps": 1, "clip_norm": 0.5, "weight_decay": 0.1},
            "curriculum": {"num_segments": [3, 4], "steps": [2, 10], "vary": False},
            "dataset": {"piece_segments": 2, "recall_fraction": 0.25},
            "workers": {"num_workers": WORLD_SIZE, "zero_stage": zero_stage},
            "gradient": gradient,
        },
    )


def fresh_model(config: TrainConfig) -> rmt_core.RecurrentModel:
    store = BookStore(config.segment_len)
    torch.manual_seed(config.seed)
    return rmt_core.build(model_config(config, store.load_tokenizer(), config.segment_len)).train()


def lanes_of(config: TrainConfig, rank: int, world_size: int) -> lanes.Lanes:
    store = BookStore(config.segment_len)
    return lanes.Lanes(make_lanes(config, store, store.load_tokenizer())[rank::world_size], config.segment_len)


def num_segments(config: TrainConfig, step: int) -> int:
    return num_segments_at(config.curriculum, stage_at(config.curriculum, step), step, config.seed)


def worker(rank: int, port: int, folder: str) -> None:
    """All cases on one of two processes; rank 0 writes each case's parameters."""
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE))  # as Ray Train sets them
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=WORLD_SIZE)
    for number, (stage, gradient) in enumerate(CASES):
        config = settings(stage, gradient)
        given = engines.deepspeed_config(config, WORLD_SIZE)
        given["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # shard even the smallest parameter
        engine = engines.start_engine(fresh_model(config), config, given)
        mine = lanes_of(config, rank, WORLD_SIZE)
        import deepspeed

        model = engine.module.model
        with deepspeed.zero.GatheredParameters(list(model.memory.parameters()), enabled=stage == 3):
            state = rmt_core.state.tree_map(torch.clone, rmt_core.state.detach(model.init_state(len(mine.lanes))))
        for step in range(STEPS):
            window = mine.window(step, num_segments(config, step))
            state = engines.optimise(engine, window, state, learning_rate(config.optimizer, step, STEPS)).state
        description = model.config
        engines.save_portable(Path(folder) / f"case{number}", engine, description, None)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def reference(config: TrainConfig) -> dict[str, torch.Tensor]:
    """The same steps in one process: the mean over all rows, clipped, by torch's own AdamW."""
    model = fresh_model(config)
    groups = engines.parameter_groups(model, config.optimizer.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(config.optimizer.beta1, config.optimizer.beta2))
    everything = lanes_of(config, 0, 1)
    state = rmt_core.state.detach(model.init_state(len(everything.lanes)))
    for step in range(STEPS):
        segments = engines.segments_of(everything.window(step, num_segments(config, step)), torch.device("cpu"))
        result = model.unroll(segments, state, bptt_segments=config.gradient.bptt_segments)
        optimizer.zero_grad()
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, STEPS)
        optimizer.step()
        state = rmt_core.state.detach(result.state)
    return {name: tensor.clone() for name, tensor in tensors_of(model).items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(worker, args=(port, str(folder)), nprocs=WORLD_SIZE)  # type: ignore[attr-defined]
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"zero{s}-{g['mode']}" for s, g in CASES])
def test_two_workers_equal_one_process(trained: Path, number: int) -> None:
    config = settings(*CASES[number])
    start, found, wanted = fresh_model(config), rmt_core.load(trained / f"case{number}"), reference(config)
    moved = 0.0
    for name, tensor in tensors_of(found).items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-5, rtol=0)
        moved = max(moved, float((tensor - tensors_of(start)[name]).abs().max()))
    assert moved > 1e-3  # otherwise nothing was learned and the equality says nothing
