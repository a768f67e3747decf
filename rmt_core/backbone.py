"""A Hugging Face causal LM taken apart: embedding, layers, final norm, head. One adapter a family.

No attention call gets a mask: rows are laid out so that the causal flag suffices. The one exception is decoding a
token, where the rows of a batch have keys of different number.

Axes: B rows, T tokens, S positions that a layer sees, P positions of context, D width, V vocabulary.
"""

from __future__ import annotations  # torch.compile cannot evaluate those of functions made while it traces

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .backbone_config import config_from, supported
from .grouped import folded_attention
from .memory.base import Attention, Block, Context, Dimensions, Heads, take, weave


class FeedForward(nn.Module):
    """What may replace a layer's feed-forward part: normed h (..., D) -> (..., D), without the residual."""

    def penalty(self) -> Tensor:
        """Its auxiliary loss, ()."""
        raise NotImplementedError


Angles = Any  # what a family's rotary embedding gives: a pair (cos, sin), one pair a layer type, or None


class Family:
    """Llama and its kin: pre-norm layers, sequential residuals, rotary positions."""

    has_relative_positions = True
    kv_heads_name = "num_key_value_heads"

    def layers(self, lm: Any) -> nn.ModuleList:
        return lm.model.layers

    def final_norm(self, lm: Any) -> nn.Module:
        return lm.model.norm

    def place(self, lm: Any, h: Tensor, positions: Tensor) -> Tensor:
        """Add learned positions to layer 0's input, where the family has them."""
        return h

    def angles(self, lm: Any, h: Tensor, positions: Tensor) -> Angles:
        return lm.model.rotary_emb(h, position_ids=positions)

    def attention(self, lm: Any, layer: int, h: Tensor, angles: Angles, settings: dict[str, Any]) -> Tensor:
        """h (B, S, D) + attention(norm(h)); `settings` are keywords of the family's attention module."""
        module = lm.model.layers[layer]
        out, _ = module.self_attn(module.input_layernorm(h), position_embeddings=angles, **settings)
        return h + out

    def feed_forward(self, lm: Any, layer: int, h: Tensor) -> Tensor:
        """h (B, S, D) + mlp(norm(h))."""
        module = lm.model.layers[layer]
        return h + module.mlp(module.post_attention_layernorm(h))

    def window(self, config: Any) -> int | None:
        """The fewest positions that any layer's sliding window sees; None without windows."""
        types = getattr(config, "layer_types", None)
        if types is not None and "sliding_attention" not in types:
            return None
        return getattr(config, "sliding_window", None)

    def refusal(self, config: Any) -> str | None:
        """Why a model of this family cannot be used; None if it can."""
        return None


class Gemma3Family(Family):
    """Gemma 3 text: a norm after each half layer too, and two rotary bases."""

    def angles(self, lm: Any, h: Tensor, positions: Tensor) -> Angles:
        kinds = sorted(set(lm.config.layer_types))
        return {kind: lm.model.rotary_emb(h, positions, kind) for kind in kinds}

    def attention(self, lm: Any, layer: int, h: Tensor, angles: Angles, settings: dict[str, Any]) -> Tensor:
        module = lm.model.layers[layer]
        own_angles = angles[lm.config.layer_types[layer]]
        out, _ = module.self_attn(module.input_layernorm(h), position_embeddings=own_angles, **settings)
        return h + module.post_attention_layernorm(out)

    def feed_forward(self, lm: Any, layer: int, h: Tensor) -> Tensor:
        module = lm.model.layers[layer]
        return h + module.post_feedforward_layernorm(module.mlp(module.pre_feedforward_layernorm(h)))

    def refusal(self, config: Any) -> str | None:
        if config.use_bidirectional_attention:
            return "its attention is bidirectional (use_bidirectional_attention)"
        if config.attn_logit_softcapping is not None:
            return "it caps attention logits (attn_logit_softcapping), which fast attention cannot"
        return None


class GPT2Family(Family):
    """GPT-2: learned positions, added to memory and text rows alike."""

    has_relative_positions = False
    kv_heads_name = "num_attention_heads"

    def layers(self, lm: Any) -> nn.ModuleList:
        return lm.transformer.h

    def final_norm(self, lm: Any) -> nn.Module:
        return lm.transformer.ln_f

    def place(self, lm: Any, h: Tensor, positions: Tensor) -> Tensor:
        return lm.transformer.drop(h + lm.transformer.wpe(positions))

    def angles(self, lm: Any, h: Tensor, positions: Tensor) -> Angles:
        return None

    def attention(self, lm: Any, layer: int, h: Tensor, angles: Angles, settings: dict[str, Any]) -> Tensor:
        module = lm.transformer.h[layer]
        out, _ = module.attn(module.ln_1(h), **settings)
        return h + out

    def feed_forward(self, lm: Any, layer: int, h: Tensor) -> Tensor:
        module = lm.transformer.h[layer]
        return h + module.mlp(module.ln_2(h))

    def refusal(self, config: Any) -> str | None:
        return "it has cross-attention (add_cross_attention)" if config.add_cross_attention else None


LLAMA = Family()
FAMILIES: dict[str, Family] = {
    "llama": LLAMA,  # SmolLM and SmolLM2 are saved under this type too
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "gemma3_text": Gemma3Family(),
    "gpt2": GPT2Family(),
}


class Placement(NamedTuple):
    """Where the rows of a step stand, and what decoding adds."""

    positions: Tensor  # (1, N) or (B, N): of the context and the segment, or of one decoded token
    mask: Tensor | None = None  # (B, 1, 1, C), true where a decoded token sees a key; else None
    kv: Any = None  # keys and values kept for decoding, in the form of a transformers cache
    grouped: bool = False  # blocks run within `torch.vmap`, several layers as one


class Backbone(nn.Module):
    """A causal LM in parts; `lm` is the unchanged Hugging Face model."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        self.family = family_of(lm.config)
        self.dimensions = _dimensions(lm, self.family)
        attention: str = lm.config._attn_implementation
        if attention != ATTENTION:
            raise ValueError(f"attn_implementation is {attention!r}; load the model with {ATTENTION!r}")

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, as the family has them."""
        return self.family.layers(self.lm)

    @property
    def vocab_size(self) -> int:
        return self.lm.config.vocab_size

    @property
    def max_positions(self) -> int:
        """Positions that one step may take: the trained range, or a sliding window where that is narrower."""
        window = self.family.window(self.lm.config)
        limit: int = self.lm.config.max_position_embeddings
        return limit if window is None else min(limit, window)

    @property
    def steady_positions(self) -> int | None:
        """Positions of a call up to which rotary factors do not depend on how many it has; None: they never do.

        Within `max_positions`, that is. Of transformers' kinds, longrope has other factors for longer texts.
        """
        parameters = getattr(self.lm.config, "rope_parameters", None) or {}
        kinds = [one for one in (parameters, *parameters.values()) if isinstance(one, dict)]  # or one a kind of layer
        limits = [one["original_max_position_embeddings"] for one in kinds if one.get("rope_type") == "longrope"]
        return min(limits, default=None)

    def replace_feed_forward(self, layer: int, module: FeedForward) -> None:
        """Put `module` in the place of a layer's feed-forward part, whose weights are dropped."""
        self.layers[layer].mlp = module

    def penalties(self) -> list[Tensor]:
        """Auxiliary losses of replaced feed-forward parts, () each."""
        parts = [layer.mlp for layer in self.layers]
        return [part.penalty() for part in parts if isinstance(part, FeedForward)]

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, D)."""
        return self.lm.get_input_embeddings()(tokens)

    def norm(self, h: Tensor) -> Tensor:
        """The norm after the last layer, (B, S, D) -> (B, S, D)."""
        return self.family.final_norm(self.lm)(h)

    def head(self, h: Tensor) -> Tensor:
        """Normed hidden states (..., D) -> logits (..., V)."""
        logits = self.lm.get_output_embeddings()(h)
        cap = getattr(self.lm.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def place(self, h: Tensor, placement: Placement) -> Tensor:
        """Layer 0's input: h (B, S, D) with learned positions added, where the family has them."""
        return self.family.place(self.lm, h, placement.positions[:, : h.shape[1]])

    def blocks(self, h: Tensor, placement: Placement) -> list[Block]:
        """The decoder layers as functions on rows that stand as `placement` says; h (B, S, D) gives type and device."""
        return self.blocks_from(h, placement, [0])[0]

    def blocks_from(self, h: Tensor, placement: Placement, starts: Sequence[int]) -> list[list[Block]]:
        """For each start, the decoder layers on rows that stand from that position of the placement on."""
        angles = self.family.angles(self.lm, h, placement.positions)
        layers = range(self.lm.config.num_hidden_layers)
        return [[self._block(layer, _from(angles, start), placement) for layer in layers] for start in starts]

    def _block(self, layer: int, angles: Angles, placement: Placement) -> Block:
        family, lm = self.family, self.lm

        def project(rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            found: list[Heads] = []

            def catch(heads: Heads) -> Tensor:
                found.append(heads)
                return heads.queries

            settings = {"attention_mask": None, "past_key_values": None, "instead": catch}
            family.attention(lm, layer, rows, family.angles(lm, rows, positions), settings)
            return found[0].keys, found[0].values

        def attend(h: Tensor, attention: Attention | None) -> Tensor:
            settings = {"attention_mask": placement.mask, "past_key_values": placement.kv}
            if attention is not None:
                settings["instead"] = lambda heads: attention(heads._replace(project=project))
            if placement.grouped:
                settings["grouped"] = True
            return family.attention(lm, layer, h, _first(angles, h.shape[1]), settings)

        def run(
            h: Tensor,
            *,
            context: Context | None = None,
            between: Callable[[Tensor], Tensor] | None = None,
            attention: Attention | None = None,
        ) -> Tensor:
            if context is None:
                h = attend(h, attention)
            else:
                seen, own = weave(context, h)
                h = take(attend(seen, _after(context, attention)), own)
            if between is not None:
                h = between(h)
            return family.feed_forward(lm, layer, h)

        return run


def _after(context: Context, attention: Attention | None) -> Attention | None:
    """`attention` told where the segment's rows begin."""
    if attention is None:
        return None
    return lambda heads: attention(heads._replace(context_filled=context.filled))


def _dimensions(lm: PreTrainedModel, family: Family) -> Dimensions:
    embedding = lm.get_input_embeddings()
    scale = getattr(embedding, "embed_scale", 1.0)  # Gemma multiplies what it looks up
    return Dimensions(
        width=lm.config.hidden_size,
        num_layers=lm.config.num_hidden_layers,
        num_heads=lm.config.num_attention_heads,
        head_width=getattr(lm.config, "head_dim", None) or lm.config.hidden_size // lm.config.num_attention_heads,
        embedding_std=0.02 if embedding.weight.is_meta else _std(embedding.weight.detach()) * float(scale),
        has_relative_positions=family.has_relative_positions,
    )


def _std(weight: Tensor) -> float:
    """The standard deviation of a weight; what is usual where it is sharded away."""
    return float(weight.float().std()) if weight.numel() else 0.02


def _from(angles: Angles, start: int) -> Angles:
    """The angles of the positions from `start` on."""
    if isinstance(angles, dict):
        return {kind: _from(pair, start) for kind, pair in angles.items()}
    return None if angles is None else tuple(part[:, start:] for part in angles)


def _first(angles: Angles, length: int) -> Angles:
    """The angles of the first `length` positions."""
    if isinstance(angles, dict):
        return {kind: _first(pair, length) for kind, pair in angles.items()}
    return None if angles is None else tuple(part[:, :length] for part in angles)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    instead: Attention | None = None,
    grouped: bool = False,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: the fast kernel, or `instead` of it what a memory computes.

    query (B, H, N, D / H), key and value with as many heads or fewer; gives (B, N, H, D / H).
    """
    if instead is None and grouped:
        return folded_attention(query, key, value, settings.get("scaling")).transpose(1, 2), None
    if instead is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    groups = query.shape[1] // key.shape[1]
    heads = Heads(
        query,
        key.repeat_interleave(groups, dim=1) if groups > 1 else key,
        value.repeat_interleave(groups, dim=1) if groups > 1 else value,
        settings["scaling"] if settings.get("scaling") is not None else query.shape[-1] ** -0.5,
        settings.get("dropout", 0.0),
        attention_mask,
    )
    return instead(heads).transpose(1, 2), None


ATTENTION = "rmt_core"  # under this name transformers finds `_attend`; its own forward of a loaded model uses it too


def _make_attention_known() -> None:
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def family_of(config: PretrainedConfig) -> Family:
    """The adapter of a model's family; a ValueError that lists the families when there is none."""
    family = FAMILIES[supported(config.model_type, FAMILIES)]
    if reason := family.refusal(config):
        raise ValueError(f"this {config.model_type} backbone is not supported: {reason}")
    return family


def load_lm(source: str | Path | dict[str, Any] | PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM: weights from a directory, or random ones for a configuration."""
    config = config_from(source, FAMILIES)
    family_of(config)
    _make_attention_known()
    return load_weights(AutoModelForCausalLM, source, config, attn_implementation=ATTENTION, dtype=dtype)


def load_weights(
    auto: Any, source: str | Path | dict[str, Any] | PretrainedConfig, config: PretrainedConfig, **settings: Any
) -> PreTrainedModel:
    """A model made by a transformers `Auto` class with `settings`: from a directory, or random for a configuration."""
    if not isinstance(source, str | Path):
        return auto.from_config(config, **settings)
    lm, report = auto.from_pretrained(str(source), local_files_only=True, output_loading_info=True, **settings)
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        raise ValueError(f"the weights in {str(source)!r} do not fit its config.json: {wrong}")
    return lm
