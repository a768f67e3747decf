"""Models small enough for exact comparisons: two layers, width 32, float64, weights large enough to tell tokens apart.

Axes: B rows, T tokens of a segment, D width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

import rmt_core
from rmt_core import RecurrentModel
from rmt_core.state import State, leaves

VOCAB = 23
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text", "gpt2")
RMT = {"kind": "rmt", "num_tokens": 3}
XL = {"kind": "xl", "cache_len": 8}
LAMEMO = {"kind": "lamemo", "cache_len": 8}
BMOJO = {"kind": "bmojo", "window": 4, "state_size": 3}
FULL_BMOJO = {**BMOJO, "num_eidetic": 3}
MEMFORMER = {"kind": "memformer", "num_slots": 3, "num_heads": 2}
ARMT = {"kind": "armt", "num_tokens": 3, "key_width": 8}
SHM = {"kind": "shm", "size": 8, "num_thetas": 5}
OPEN_RMT = {"kind": "rmt", "num_tokens": 3, "bidirectional": True}
RMT_R = {"kind": "rmt", "num_tokens": 3, "max_past_memories": 2}
INFINITY = {"kind": "infinity", "num_basis": 8, "basis_widths": [0.05, 0.2], "num_samples": 5, "kl_weight": 0.01}
MEMORIES: dict[str, Any] = {
    "none": "none",
    "rmt": RMT,
    "xl": XL,
    "xl+rmt": [XL, RMT],
    "rmt+xl": [RMT, XL],
    "lamemo": LAMEMO,
    "lamemo+rmt": [LAMEMO, RMT],
    "bmojo": BMOJO,
    "bmojo-full": FULL_BMOJO,
    "bmojo+rmt": [FULL_BMOJO, RMT],
    "memformer": MEMFORMER,
    "xl+memformer": [XL, MEMFORMER],
    "memformer+rmt": [MEMFORMER, RMT],
    "armt": ARMT,
    "xl+armt": [XL, ARMT],
    "shm": SHM,
    "shm+rmt": [SHM, RMT],
    "rmt-open": OPEN_RMT,
    "xl+rmt-open": [XL, OPEN_RMT],
    "rmt-5-read": {"kind": "rmt", "num_tokens": 3, "num_read_tokens": 5},
    "rmt-r": RMT_R,
    "rmt-lstm": {"kind": "rmt", "num_tokens": 3, "gate": "lstm"},
    "rmt-binary": {"kind": "rmt", "num_tokens": 3, "gate": "binary", "write_cost": 0.1},
    "infinity": INFINITY,
    "xl+infinity": [XL, INFINITY],
}

# Each kind with the settings that leave the plain backbone.
OFF: dict[str, Any] = {
    "none": "none",
    "rmt": {"kind": "rmt", "num_tokens": 0},
    "xl": {"kind": "xl", "cache_len": 0},
    "lamemo": {"kind": "lamemo", "cache_len": 0},
    "bmojo": {"kind": "bmojo", "window": 0},
    "memformer": {"kind": "memformer", "num_slots": 0},
    "armt": {"kind": "armt", "num_tokens": 0},
    "infinity": {"kind": "infinity", "num_basis": 0},
    "shm": {"kind": "shm", "size": 0},
}
ENCODER_ONLY = {"memory_transformer"}  # kinds that a causal backbone cannot have

# Where a family has something of its own, the tiny configuration uses it.
SPECIAL: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 40},
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2, "pad_token_id": None},
    "gemma3_text": {
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 40,
        "final_logit_softcapping": 5.0,
        "pad_token_id": None,
        "query_pre_attn_scalar": 8,
    },
}


def tiny_config(family: str = "llama", **changes: Any) -> PretrainedConfig:
    """A configuration of the family; grouped-query heads (4 query, 2 key-value) where the family has them."""
    if family == "gpt2":
        settings: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        settings |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        settings = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
        }
    settings |= {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, **SPECIAL.get(family, {}), **changes}
    return AutoConfig.for_model(family, **settings)


def stir(module: torch.nn.Module, seed: int = 0, by: float = 0.25) -> None:
    """Move every parameter, biases and norms too, away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.dtype), alpha=by)


def tiny_model(
    memory: Any = "none",
    family: str = "llama",
    segment_len: int = 6,
    seed: int = 0,
    stirred: float = 0.25,
    **changes: Any,
) -> RecurrentModel:
    """A float64 model in evaluation mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    model = rmt_core.build(backbone=config, memory=memory, segment_len=segment_len, dtype="float64")
    stir(model, seed, stirred)
    return model.eval()


def tokens_like(*shape: int, seed: int = 1) -> Tensor:
    """Random tokens of the given shape."""
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def next_labels(tokens: Tensor) -> Tensor:
    """The next token at each place; -100 at the last."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], dim=1)


def gradients(model: RecurrentModel) -> dict[str, Tensor]:
    """Each parameter's `.grad`, zeros where there is none."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> bool:
    """Equal up to float64 rounding."""
    return a.shape == b.shape and bool(torch.allclose(a.double(), b.double(), rtol=0, atol=atol))


def close_states(a: State, b: State, atol: float = 1e-10) -> bool:
    """`close` for every tensor of two states, relative to its largest entry where that is above 1: sums can be."""
    pairs = zip(leaves(a), leaves(b), strict=True)
    return all(
        close(x, y, atol * max(1.0, float(y.detach().double().abs().max()) if y.numel() else 0)) for x, y in pairs
    )


def same_states(a: State, b: State) -> bool:
    """Bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


class Embeddings:
    """Records what the embedding gives at each call, kept for gradients: one tensor (B, T, D) a segment."""

    def __init__(self, model: RecurrentModel) -> None:
        self.seen: list[Tensor] = []
        self._handle = model.backbone.lm.get_input_embeddings().register_forward_hook(self._record)

    def _record(self, module: object, inputs: object, output: Tensor) -> Tensor:
        output.retain_grad()
        self.seen.append(output)
        return output

    def __enter__(self) -> "Embeddings":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def gradients(self) -> list[Tensor]:
        """Of each recorded call; zeros where none arrived."""
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in self.seen]
