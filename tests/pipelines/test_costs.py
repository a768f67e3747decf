"""What a segment costs, found without numbers, is what running it costs: operations and memory.

Axes: R rows, K segments, T tokens of a segment, M memory tokens, S = T + 2 M, D width, V vocabulary.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import rmt_core
from pipelines.training.costs import model_size, outline, segment_cost
from pipelines.training.live_bytes import LiveBytes
from pipelines.training.settings import ModelSettings
from tests.rmt_core import tiny

T, M, D, V, LAYERS, INNER = 24, 3, 32, 50, 2, 80
LLAMA = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def described(**settings: Any) -> rmt_core.ModelConfig:
    given = {"backbone": LLAMA, "memory": {"kind": "rmt", "num_tokens": M}, "segment_len": T} | settings
    return rmt_core.ModelConfig(**given)


def cost(description: rmt_core.ModelConfig, train: str = "everything", num_rows: int = 1) -> Any:
    return segment_cost(outline(description, ModelSettings.model_validate({"train": train})), num_rows)


def of_maps(num_rows: int) -> int:
    """Operations of the linear maps of all layers, forward."""
    return num_rows * (T + 2 * M) * LAYERS * 2 * (4 * D * D + 3 * D * INNER)


def of_attention(num_rows: int) -> int:
    return num_rows * LAYERS * 4 * (T + 2 * M) ** 2 * D


def of_head(num_rows: int) -> int:
    return num_rows * 2 * T * D * V


@pytest.mark.parametrize("num_rows", [1, 3])
def test_operations_are_those_of_the_formula(num_rows: int) -> None:
    found = cost(described(), num_rows=num_rows)
    assert found.forward_flops == of_maps(num_rows) + of_attention(num_rows) + of_head(num_rows)
    assert found.backward_flops == 2 * found.forward_flops


def test_weights_that_are_frozen_cost_no_gradient() -> None:
    found = cost(described(), "memory")
    assert found.forward_flops == of_maps(1) + of_attention(1) + of_head(1)
    assert found.backward_flops == of_maps(1) + 2 * of_attention(1) + of_head(1)


def test_adapters_cost_little_more_than_a_frozen_backbone() -> None:
    frozen, adapted, everything = (sum(cost(described(), train)[:2]) for train in ("memory", "lora", "everything"))
    assert frozen < adapted
    assert adapted - frozen < (everything - frozen) * 1.5  # rank 8 of width 32


@pytest.mark.parametrize("memory", tiny.MEMORIES)
def test_operations_of_every_memory_are_those_of_a_real_step(memory: str) -> None:
    description = described(memory=tiny.MEMORIES[memory])
    model = rmt_core.build(description).train()
    tokens = torch.zeros(2, T, dtype=torch.long)
    state = model.init_state(2)
    model.step(tokens, state)  # what is made once and kept
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _ = model.step(tokens, state)[0].logits
    assert cost(description, num_rows=2).forward_flops == counter.get_total_flops()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_operations_of_every_family_are_those_of_a_real_step(family: str) -> None:
    description = rmt_core.ModelConfig(backbone=tiny.tiny_config(family), memory=tiny.RMT, segment_len=T)
    model = rmt_core.build(description).train()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _ = model.step(torch.zeros(1, T, dtype=torch.long), model.init_state(1))[0].logits
    assert cost(description).forward_flops == counter.get_total_flops()


def test_sizes_are_those_of_the_real_model() -> None:
    for settings in ({}, {"feed_forward": {"kind": "ultramem", "layers": [1]}}):
        description = described(**settings)
        real, found = rmt_core.build(description), model_size(outline(description, ModelSettings()))
        assert found.num_parameters == found.num_trained == sum(each.numel() for each in real.parameters())
    assert found.largest_layer == max(
        sum(each.numel() for each in layer.parameters())
        for layer in [*real.backbone.layers, real.backbone.lm.get_input_embeddings()]
    )


def test_an_outline_takes_no_memory_however_large_the_model() -> None:
    large = {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    model = outline(described(backbone={**large, "num_attention_heads": 64}, segment_len=128), ModelSettings())
    assert all(each.is_meta for each in model.parameters())
    assert model_size(model).num_parameters > 6e10


# --- memory -----------------------------------------------------------------------------------------


def peak_bytes(folder: Path, work: Any) -> int:
    """The most that `work` holds above what was held before, as torch's allocator tells its profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    told = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = peak = 0
    for _, num_bytes in told:
        held += num_bytes
        peak = max(peak, held)
    return peak


def train_window(model: rmt_core.RecurrentModel, num_rows: int, num_segments: int, checkpointed: bool) -> None:
    """A window forward and backward; of the parameters' gradients none is kept."""
    tokens = torch.zeros(num_rows, model.segment_len, dtype=torch.long)
    segments = [rmt_core.SegmentBatch(tokens, tokens)] * num_segments
    model.unroll(segments, model.init_state(num_rows), checkpointed=checkpointed).loss.backward()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("num_segments", "checkpointed"), [(1, False), (4, False), (4, True)])
def test_activations_are_what_the_allocator_sees_or_little_more(
    num_segments: int, checkpointed: bool, dtype: str, tmp_path: Path
) -> None:
    backbone = {**LLAMA, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6}
    description = described(backbone=backbone, segment_len=64, dtype=dtype)
    model, num_rows = rmt_core.build(description).train(), 4
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    train_window(model, num_rows, 1, checkpointed)  # what is made once
    found = segment_cost(model, num_rows)
    kept = 1 if checkpointed else num_segments
    wanted = kept * found.kept_bytes + found.passing_bytes + (num_segments * found.state_bytes if checkpointed else 0)
    if num_segments > 1:  # behind the later segments' backward passes their gradients wait for the first one's
        whole = sum(parameter.nbytes for parameter in model.parameters())
        wanted = max(wanted, found.kept_bytes + found.passing_bytes + whole)
    measured = peak_bytes(tmp_path, lambda: train_window(model, num_rows, num_segments, checkpointed))
    assert 0.97 * measured < wanted < 1.2 * measured  # rather too much, for a plan, than too little


def test_live_bytes_are_what_the_allocator_sees(tmp_path: Path) -> None:
    model = rmt_core.build(described(segment_len=64)).train()
    train_window(model, 2, 1, checkpointed=False)
    model.zero_grad()
    measured = peak_bytes(tmp_path, lambda: train_window(model, 2, 3, checkpointed=False))
    model.zero_grad()
    with LiveBytes() as live:
        train_window(model, 2, 3, checkpointed=False)
    assert live.peak_bytes == pytest.approx(measured, rel=0.05)


def test_live_bytes_know_views_and_what_is_gone() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)[1:]
        assert live.num_bytes == 4000
        del a
        assert live.num_bytes == 4000
        del b
        assert live.num_bytes == 0
    assert live.peak_bytes == 4000
