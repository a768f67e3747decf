"""Another implementation of memory replay: the package recurrent-memory-transformer-pytorch, where it is installed.

It differs from `rmt_core` by more than replay: its memory rows are seen both ways, through a dense mask, keys and
values have one learned row more, and values are mixed with the first layer's. Width, layers, heads, feed-forward width,
memory tokens and vocabulary are made equal; its caches and its several residual streams are switched off.
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from .measuring import VOCAB

PACKAGE = "recurrent_memory_transformer_pytorch"


def build_peer(sizes: Any, num_memory_tokens: int, device: str) -> tuple[nn.Module | None, str]:
    """Its model of the same sizes; or None and why."""
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError as error:
        return None, f"the package {PACKAGE.replace('_', '-')} cannot be imported ({error})"
    torch.manual_seed(0)
    dim_head = 64 if sizes.width >= 128 else 8
    transformer = package.RecurrentMemoryTransformer(
        dim=sizes.width,
        num_tokens=VOCAB,
        depth=sizes.num_layers,
        num_memory_tokens=num_memory_tokens,
        seq_len=sizes.segment_len,
        heads=sizes.width // dim_head,
        dim_head=dim_head,
        abs_pos_emb=False,
        rotary_pos_emb=True,
        use_xl_memories=False,
        num_residual_streams=1,
    )
    return package.RecurrentMemoryTransformerWrapper(transformer).to(device), ""


def full(model: nn.Module, tokens: Tensor) -> None:
    """Back through everything kept; tokens (B, N + 1)."""
    loss, _ = model(tokens, return_loss=True)
    loss.backward()


def replay(model: nn.Module, tokens: Tensor) -> None:
    """Its memory replay, which goes back by itself."""
    model(tokens, memory_replay_backprop=True, return_loss=True)
