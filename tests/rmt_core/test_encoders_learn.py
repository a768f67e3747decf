"""Encoders learn to use their memory: with it they answer, without it they guess. Seconds of training on one core.

A value stands somewhere in the noise of a document's first segment; the class is that value.

Axes: B rows, N tokens of a document, T tokens of a segment.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import rmt_core
from rmt_core import EncoderModel

T, NUM_VALUES, NUM_NOISE, BATCH = 8, 8, 8, 32
CLS, SEP = NUM_VALUES + NUM_NOISE, NUM_VALUES + NUM_NOISE + 1


def build(memory: Any) -> EncoderModel:
    torch.manual_seed(0)
    backbone = {"model_type": "bert", "vocab_size": SEP + 1, "hidden_size": 48, "intermediate_size": 96}
    backbone |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
    backbone |= {"initializer_range": 0.1}  # with the usual 0.02 half of the seeds learn nothing in so few steps
    backbone |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    special = {"cls_token_id": CLS, "sep_token_id": SEP}
    return rmt_core.build_encoder(backbone=backbone, memory=memory, segment_len=T, num_labels=NUM_VALUES, **special)


def recall(batch_size: int, num_segments: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Documents (B, N) and the value that each first segment holds, (B,)."""
    shape = (batch_size, num_segments * T)
    tokens = torch.randint(NUM_VALUES, NUM_VALUES + NUM_NOISE, shape, generator=generator)
    values = torch.randint(NUM_VALUES, (batch_size,), generator=generator)
    at = torch.randint(T, (batch_size,), generator=generator)
    tokens[torch.arange(batch_size), at] = values
    return tokens, values


def train(model: EncoderModel, most_segments: int, steps: int) -> None:
    """Documents of 1 to `most_segments` segments."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20, 0.05 + 2 * (steps - step) / steps)
        num_segments = int(torch.randint(1, most_segments + 1, (), generator=generator)) if step > steps // 4 else 1
        optimizer.zero_grad()
        model(*recall(BATCH, num_segments, generator)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def accuracy(logits: Tensor, values: Tensor) -> float:
    return float((logits.argmax(-1) == values).double().mean())


@pytest.mark.long
@torch.no_grad()
def test_a_recurrent_encoder_answers_with_its_memory_and_not_without() -> None:
    """Four segments after at most three in training; the memory is zeroed before every segment."""
    model = build({"kind": "rmt", "num_tokens": 4})
    with torch.enable_grad():
        train(model, 3, 300)
    tokens, values = recall(256, 4, torch.Generator().manual_seed(10**6))
    state, out = model.init_state(256), None
    for part in tokens.split(T, 1):
        out, state = model.step(part, rmt_core.state.zeroed(state))
    assert out is not None
    found = accuracy(model.read(tokens).logits, values), accuracy(out.logits, values)
    assert found[0] >= 0.9, found
    assert found[1] <= 0.3, found  # guessing gives 1 / 8


@pytest.mark.long
@torch.no_grad()
def test_a_bottleneck_answers_through_its_memory_only() -> None:
    """One segment; then what memory rows become is zeroed in each layer."""
    model = build({"kind": "memory_transformer", "num_tokens": 4, "variant": "bottleneck"})
    with torch.enable_grad():
        train(model, 1, 250)
    tokens, values = recall(256, 1, torch.Generator().manual_seed(10**6))
    with_memory = accuracy(model.read(tokens).logits, values)
    for layer in model.memory.layers:
        layer.output.LayerNorm.weight.zero_()
        layer.output.LayerNorm.bias.zero_()
    found = with_memory, accuracy(model.read(tokens).logits, values)
    assert found[0] >= 0.9, found
    assert found[1] <= 0.3, found
