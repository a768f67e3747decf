"""What a worker is said to need is what training takes, under every ZeRO stage, and what DeepSpeed's estimator says."""

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rmt_core
from pipelines.config import build
from pipelines.data.books import BookStore
from pipelines.data.lanes import Window
from pipelines.training import engine as engines
from pipelines.training.costs import ModelSize, SegmentCost, model_size, outline, segment_cost
from pipelines.training.footprint import STAGES, activations_bytes, footprint
from pipelines.training.live_bytes import LiveBytes
from pipelines.training.settings import TrainConfig, model_config
from pipelines.training.steps import Stepper
from pipelines.training.weights import choose_trained
from tests.process_group import spawn

WORLD_SIZE, NUM_SEGMENTS = 2, 2
PRECISIONS = ("float32", "bfloat16")
# Tokens of a segment, with activations of few bytes or of more than gradients, and gradient mode.
KINDS: dict[str, tuple[int, str]] = {"short": (16, "full"), "long": (256, "full"), "replayed": (256, "replay")}
NOTHING = SegmentCost(0, 0, 0, 0, 0)


def config_of(
    stage: int = 2, precision: str = "float32", train: str = "everything", segment_len: int = 16, **gradient: Any
) -> TrainConfig:
    """A model of 1.6 million parameters, so that what DeepSpeed keeps beside it does not count."""
    return build(
        TrainConfig,
        {
            "batch_size": WORLD_SIZE,
            "segment_len": segment_len,
            "model": {"width": 128, "num_layers": 6, "feed_forward_width": 512, "train": train},
            "curriculum": {"num_segments": [NUM_SEGMENTS], "steps": [10], "vary": False},
            "workers": {"num_workers": WORLD_SIZE, "zero_stage": stage, "precision": precision},
            "gradient": gradient,
        },
    )


def described(config: TrainConfig) -> rmt_core.ModelConfig:
    segment_len = config.segment_len or 0
    return model_config(config, BookStore(segment_len).load_tokenizer(), segment_len)


def peak_of(config: TrainConfig) -> int:
    """Bytes of tensors at the worst moment of the second step, from before the model was built."""
    with LiveBytes() as live:
        model = rmt_core.build(described(config)).train()
        choose_trained(model, config.model)
        stepper = Stepper(engines.start_engine(model, config, engines.deepspeed_config(config, WORLD_SIZE)), config)
        window, state = window_of(config), torch.zeros(1, 4, 128, dtype=next(model.parameters()).dtype)
        for step in range(2):
            live.peak_bytes = live.num_bytes
            stepper.step([window], state, float(WORLD_SIZE * window.weights.sum()), step=step, rate=1e-3)
        return live.peak_bytes


def window_of(config: TrainConfig) -> Window:
    """Full segments of one row."""
    shape = 1, NUM_SEGMENTS, config.segment_len or 0
    tokens = np.zeros(shape, np.int64)
    lengths = np.full(shape[:2], shape[2])
    at = np.zeros(shape[:2], np.int64)
    return Window(tokens, tokens, np.ones(shape, np.float32), lengths, at > 0, at, tokens > 0)


def configs() -> dict[str, TrainConfig]:
    """All that is measured, by name."""
    return {
        f"{kind} {stage} {precision}": config_of(stage, precision, segment_len=size, mode=mode)
        for kind, (size, mode) in KINDS.items()
        for stage in STAGES
        for precision in PRECISIONS
    }


def measure(rank: int, name: str) -> None:
    found = {}
    for what, config in configs().items():
        gc.collect()
        found[what] = peak_of(config)
    if rank == 0:
        Path(name).write_text(json.dumps(found))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    path = tmp_path_factory.mktemp("footprint") / "measured.json"
    spawn(measure, WORLD_SIZE, str(path))
    return json.loads(path.read_text())


@pytest.mark.long
@pytest.mark.parametrize("what", configs())
def test_the_estimate_is_within_a_tenth_of_what_training_takes(measured: dict[str, int], what: str) -> None:
    config = configs()[what]
    model = outline(described(config), config.model)
    need = footprint(config, model_size(model), segment_cost(model), config.workers.zero_stage, WORLD_SIZE)
    assert need.device_bytes == pytest.approx(measured[what], rel=0.1)


@pytest.mark.parametrize("num_workers", [1, 8])
def test_states_of_16_bit_weights_are_those_of_deepspeeds_estimators(num_workers: int) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    number = 8_000_000_000
    size, config = ModelSize(number, number, 200_000_000), config_of(precision="bfloat16")
    need = footprint(config, size, NOTHING, 2, num_workers)
    _, wanted = estimate_zero2_model_states_mem_needs(number, num_workers, cpu_offload=False)
    assert need.weights_bytes + need.gradients_bytes + need.optimizer_bytes == wanted
    need = footprint(config, size, NOTHING, 3, num_workers)
    _, wanted, largest = estimate_zero3_model_states_mem_needs(
        number, size.largest_layer, num_workers, cpu_offload=False, cpu_offload_params=False
    )
    whole = 2 * 10**9  # what ZeRO 3 keeps whole for its next use; the estimator counts the largest layer alone
    found = need.weights_bytes + need.gradients_bytes + need.optimizer_bytes
    assert found - whole == wanted - largest


def test_frozen_weights_need_neither_gradients_nor_an_optimiser() -> None:
    need = footprint(config_of(train="memory"), ModelSize(1000, 10, 100), NOTHING, 2, 1)
    assert (need.weights_bytes, need.gradients_bytes, need.optimizer_bytes) == (4000, 80, 120)


def test_an_offloaded_optimiser_is_on_the_host() -> None:
    config = build(TrainConfig, {"workers": {"offload_optimizer": True, "precision": "bfloat16"}})
    size = ModelSize(10**9, 10**9, 10**7)
    need, without = footprint(config, size, NOTHING, 2, 2), footprint(config_of(2, "bfloat16"), size, NOTHING, 2, 2)
    assert need.host_bytes == (12 + 6) * 10**9 // 2
    assert without.device_bytes - need.device_bytes >= 12 * 10**9 // 2


def test_zero_3_begins_with_the_whole_model_on_the_device() -> None:
    workers = {"offload_optimizer": True, "precision": "bfloat16"}
    config = build(TrainConfig, {"workers": workers, "curriculum": {"num_segments": [1], "steps": [1]}})
    need = footprint(config, ModelSize(13 * 10**9, 13 * 10**9, 10**8), NOTHING, 3, 8)
    assert need.device_bytes == 2 * 13 * 10**9


def test_gradients_of_several_segments_are_whole_at_once() -> None:
    """All weights are used in each, so that none is reduced before the first segment's are known."""
    settings = {"num_segments": [2], "steps": [1]}
    config = build(TrainConfig, {"workers": {"precision": "bfloat16"}, "curriculum": settings})
    size = ModelSize(13 * 10**9, 13 * 10**9, 10**8)
    assert footprint(config, size, NOTHING, 3, 64).device_bytes > 2 * 13 * 10**9


def test_activations_grow_with_what_a_mode_keeps() -> None:
    cost = SegmentCost(0, 0, kept_bytes=100, passing_bytes=10, state_bytes=1)
    modes: list[tuple[dict[str, Any], int]] = [
        ({"mode": "full"}, 211),
        ({"mode": "checkpoint"}, 112),
        ({"mode": "replay"}, 112),
        ({"mode": "truncated", "bptt_segments": 1}, 211),  # one backward pass: all activations until then
        ({"mode": "truncated", "bptt_segments": 1, "exact_depth": True}, 111),
    ]
    for gradient, wanted in modes:
        assert activations_bytes(config_of(**gradient), cost) == wanted
