"""A Hugging Face encoder-decoder taken apart: the encoder's layers one by one, the decoder whole. One adapter a family.

Only rows of different lengths need a mask: an encoder sees a segment both ways, and must not see padding.

Axes: B rows, T tokens of a source, U tokens of a target, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel

from .backbone import load_weights
from .backbone_config import config_from, supported
from .config import BackboneSource
from .memory.base import Attention, Block, Context, Dimensions


class T5Family:
    """T5 and mT5: pre-norm layers, relative positions as a bias on attention that the first layer holds for all.

    Infinities are not clamped in float16 as transformers does it: train and run these in bfloat16 or float32.
    """

    def encoder_layers(self, lm: Any) -> nn.ModuleList:
        return lm.encoder.block

    def embed(self, lm: Any, tokens: Tensor) -> Tensor:
        """What the encoder's first layer sees of tokens (B, T): (B, T, D)."""
        return lm.encoder.dropout(lm.encoder.embed_tokens(tokens))

    def bias(self, lm: Any, length: int) -> Tensor | None:
        """What all encoder layers add to attention's logits, (1, heads, T, T)."""
        attention = lm.encoder.block[0].layer[0].SelfAttention
        return attention.compute_bias(length, length, device=attention.q.weight.device)

    def attention(self, lm: Any, layer: int, h: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        """h (B, T, D) after the encoder layer's self-attention."""
        return lm.encoder.block[layer].layer[0](h, attention_mask=mask, position_bias=bias)[0]

    def feed_forward(self, lm: Any, layer: int, h: Tensor) -> Tensor:
        """h (B, T, D) after the encoder layer's feed-forward part."""
        return lm.encoder.block[layer].layer[-1](h)

    def finish(self, lm: Any, h: Tensor) -> Tensor:
        """The encoder's output, from what its last layer gives."""
        return lm.encoder.dropout(lm.encoder.final_layer_norm(h))

    def before_head(self, lm: Any, h: Tensor) -> Tensor:
        """What the head sees of the decoder's output h (..., D)."""
        return h * lm.model_dim**-0.5 if getattr(lm.config, "scale_decoder_outputs", False) else h

    def logits_bias(self, lm: Any) -> Tensor | None:
        """What is added to logits, (V,)."""
        return None

    def max_positions(self, config: Any) -> int | None:
        """Tokens that a source or a target may have; None where there is no limit."""
        return None

    def refusal(self, config: Any) -> str | None:
        """Why a model of this family cannot be used; None if it can."""
        return None


class BartFamily(T5Family):
    """BART: a norm after each half layer, learned positions."""

    def encoder_layers(self, lm: Any) -> nn.ModuleList:
        return lm.model.encoder.layers

    def embed(self, lm: Any, tokens: Tensor) -> Tensor:
        encoder = lm.model.encoder
        h = encoder.layernorm_embedding(encoder.embed_tokens(tokens) + encoder.embed_positions(tokens))
        return F.dropout(h, encoder.dropout, encoder.training)

    def bias(self, lm: Any, length: int) -> Tensor | None:
        return None

    def attention(self, lm: Any, layer: int, h: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        module = lm.model.encoder.layers[layer]
        out = module.self_attn(h, attention_mask=mask)[0]
        return module.self_attn_layer_norm(h + F.dropout(out, module.dropout, module.training))

    def feed_forward(self, lm: Any, layer: int, h: Tensor) -> Tensor:
        module = lm.model.encoder.layers[layer]
        inner = F.dropout(module.activation_fn(module.fc1(h)), module.activation_dropout, module.training)
        return module.final_layer_norm(h + F.dropout(module.fc2(inner), module.dropout, module.training))

    def finish(self, lm: Any, h: Tensor) -> Tensor:
        return h

    def before_head(self, lm: Any, h: Tensor) -> Tensor:
        return h

    def logits_bias(self, lm: Any) -> Tensor | None:
        return lm.final_logits_bias[0]

    def max_positions(self, config: Any) -> int | None:
        return config.max_position_embeddings

    def refusal(self, config: Any) -> str | None:
        if config.encoder_layerdrop:
            return f"its encoder leaves out layers at random (encoder_layerdrop is {config.encoder_layerdrop}, not 0)"
        return None


T5 = T5Family()
FAMILIES: dict[str, T5Family] = {"t5": T5, "mt5": T5, "bart": BartFamily()}


class EncoderDecoder(nn.Module):
    """A sequence-to-sequence model in parts; `lm` is the unchanged Hugging Face model."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        self.family = family_of(lm.config)
        embedding = lm.get_input_embeddings()
        scale = float(getattr(embedding, "embed_scale", 1.0))
        self.dimensions = Dimensions(
            width=lm.config.hidden_size,
            num_layers=len(self.family.encoder_layers(lm)),
            num_heads=lm.config.num_attention_heads,
            head_width=getattr(lm.config, "head_dim", None) or lm.config.hidden_size // lm.config.num_attention_heads,
            embedding_std=float(embedding.weight.detach().float().std()) * scale if embedding.weight.numel() else 0.02,
            has_relative_positions=False,
        )

    @property
    def vocab_size(self) -> int:
        return self.lm.config.vocab_size

    @property
    def max_positions(self) -> int | None:
        """Tokens that a source or a target may have; None where there is no limit."""
        return self.family.max_positions(self.lm.config)

    @property
    def start_token(self) -> int:
        """What stands before a target's first token."""
        return self.lm.config.decoder_start_token_id

    def embed(self, tokens: Tensor) -> Tensor:
        """What the encoder's first layer sees of tokens (B, T) int64: (B, T, D)."""
        return self.family.embed(self.lm, tokens)

    def blocks(self, h: Tensor, lengths: Tensor | None) -> list[Block]:
        """The encoder layers as functions on h (B, T, D), of which each row has `lengths` (B,) real tokens."""
        mask = None
        if lengths is not None:
            padding = ~_real(lengths, h.shape[1])[:, None, None]
            mask = h.new_zeros(padding.shape).masked_fill(padding, torch.finfo(h.dtype).min)  # (B, 1, 1, T)
        bias = self.family.bias(self.lm, h.shape[1])
        return [self._block(layer, mask, bias) for layer in range(self.dimensions.num_layers)]

    def _block(self, layer: int, mask: Tensor | None, bias: Tensor | None) -> Block:
        def run(
            h: Tensor,
            *,
            context: Context | None = None,
            between: Callable[[Tensor], Tensor] | None = None,
            attention: Attention | None = None,
        ) -> Tensor:
            if context is not None or attention is not None:
                raise ValueError("an encoder's attention is its own: no memory can extend or compute it")
            h = self.family.attention(self.lm, layer, h, mask, bias)
            if between is not None:
                h = between(h)
            return self.family.feed_forward(self.lm, layer, h)

        return run

    def finish(self, h: Tensor) -> Tensor:
        """The encoder's output (B, T, D), from what its last layer gives."""
        return self.family.finish(self.lm, h)

    def decode(self, encoded: Tensor, lengths: Tensor | None, targets: Tensor) -> Tensor:
        """Hidden states (B, U, D) that predict each of targets (B, U) int64 from those before it.

        encoded (B, T, D) is the encoder's output, of which each row has `lengths` (B,) real tokens.
        """
        start = torch.full_like(targets[:, :1], self.start_token)
        mask = None if lengths is None else _real(lengths, encoded.shape[1]).long()
        out = self.lm.get_decoder()(
            input_ids=torch.cat([start, targets[:, :-1]], dim=1),
            encoder_hidden_states=encoded,
            encoder_attention_mask=mask,
            use_cache=False,
        )
        return self.family.before_head(self.lm, out.last_hidden_state)

    def head(self, h: Tensor) -> Tensor:
        """The decoder's hidden states (..., D) -> logits (..., V)."""
        logits, bias = self.lm.get_output_embeddings()(h), self.family.logits_bias(self.lm)
        return logits if bias is None else logits + bias


def _real(lengths: Tensor, size: int) -> Tensor:
    """Which of `size` places are real tokens, (B, size) bool; a row without any shows its first, to stay finite."""
    return torch.arange(size, device=lengths.device) < lengths.clamp(min=1)[:, None]


def family_of(config: PretrainedConfig) -> T5Family:
    """The adapter of a model's family; a ValueError that says why there is none."""
    name: Any = config.model_type
    family = FAMILIES[supported(name, FAMILIES)]
    reason = family.refusal(config)
    if getattr(config, "decoder_start_token_id", None) is None:
        reason = "its configuration does not say what a target starts with; set decoder_start_token_id"
    if reason:
        raise ValueError(f"this {name} backbone is not supported: {reason}")
    return family


def load_lm(source: BackboneSource, dtype: torch.dtype) -> PreTrainedModel:
    """The encoder-decoder: weights from a directory, or random ones for a configuration."""
    config = config_from(source, FAMILIES)
    family_of(config)
    return load_weights(AutoModelForSeq2SeqLM, source, config, dtype=dtype)
