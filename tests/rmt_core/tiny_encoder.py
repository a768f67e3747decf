"""Encoders small enough for exact comparisons: two layers, width 32, float64.

Axes: B rows, N tokens of a document.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

import rmt_core
from rmt_core import EncoderModel

from .tiny import stir

VOCAB, CLS, SEP = 23, 20, 21  # text tokens are 2 to 19; 0 and 1 are the families' padding
FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")


def tiny_encoder_config(family: str = "bert", **changes: Any) -> PretrainedConfig:
    """A configuration of the family without dropout."""
    if family == "distilbert":
        settings: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
        settings |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    else:
        settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if family == "electra":
        settings["embedding_size"] = 32
    return AutoConfig.for_model(family, **{**settings, "vocab_size": VOCAB, "max_position_embeddings": 64, **changes})


def tiny_encoder(
    memory: Any = "none",
    family: str = "bert",
    segment_len: int = 6,
    *,
    changes: dict[str, Any] | None = None,
    **settings: Any,
) -> EncoderModel:
    """A float64 model of three classes in evaluation mode; `changes` are the backbone's, `settings` the model's."""
    torch.manual_seed(0)
    given = {"num_labels": 3, "cls_token_id": CLS, "sep_token_id": SEP, "dtype": "float64", **settings}
    backbone = tiny_encoder_config(family, **(changes or {}))
    model = rmt_core.build_encoder(backbone=backbone, memory=memory, segment_len=segment_len, **given)
    stir(model)
    return model.eval()


def text(*shape: int, seed: int = 1) -> Tensor:
    """Random text tokens of the given shape."""
    return torch.randint(2, CLS, shape, generator=torch.Generator().manual_seed(seed))


def documents(*lengths: int) -> list[Tensor]:
    return [text(length, seed=10 + i) for i, length in enumerate(lengths)]
