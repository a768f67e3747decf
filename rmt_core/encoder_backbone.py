"""A Hugging Face encoder of the BERT family taken apart: embeddings, layers, classification head. One adapter a family.

Axes: B rows, T tokens, S positions that a layer sees, N rows that are computed, C rows that are seen, D width, H heads,
K labels.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PretrainedConfig, PreTrainedModel

from .backbone_config import config_from
from .memory.base import Attention, Dimensions, EncoderBlock, Heads


class EncoderFamily:
    """BERT: attention, residual, norm, feed-forward, residual, norm; a pooler before the classifier."""

    def layers(self, lm: Any) -> nn.ModuleList:
        return lm.base_model.encoder.layer

    def projections(self, layer: Any) -> tuple[nn.Module, nn.Module, nn.Module, float]:
        """What makes queries, keys and values, and the dropout of the attention weights."""
        attention = layer.attention.self
        return attention.query, attention.key, attention.value, attention.dropout.p

    def after_attention(self, layer: Any, h: Tensor, mixed: Tensor) -> Tensor:
        """The rest of a layer: its input h (B, N, D) and what attention gives, (B, N, D)."""
        h = layer.attention.output(mixed, h)
        return layer.output(layer.intermediate(h), h)

    def classify(self, lm: Any, first: Tensor) -> Tensor:
        """Logits (B, K) of the first row's outputs (B, 1, D)."""
        return lm.classifier(lm.dropout(lm.base_model.pooler(first)))

    def num_positions(self, config: Any) -> int:
        return config.max_position_embeddings

    def refusal(self, config: Any) -> str | None:
        """Why a model of this family cannot be used; None if it can."""
        if config.is_decoder or config.add_cross_attention:
            return "it is a decoder (is_decoder, add_cross_attention)"
        return None


class HeadedFamily(EncoderFamily):
    """ELECTRA: the head takes the first row itself."""

    def classify(self, lm: Any, first: Tensor) -> Tensor:
        return lm.classifier(first)

    def refusal(self, config: Any) -> str | None:
        if getattr(config, "embedding_size", config.hidden_size) != config.hidden_size:
            return (
                f"its embedding_size {config.embedding_size} is not its hidden_size {config.hidden_size}, "
                "so that a layer's output cannot stand among embeddings"
            )
        return super().refusal(config)


class RobertaFamily(HeadedFamily):
    """RoBERTa and its kin: positions begin after the padding token's."""

    def num_positions(self, config: Any) -> int:
        return config.max_position_embeddings - config.pad_token_id - 1


class DistilBertFamily(EncoderFamily):
    """DistilBERT: the same layers under other names."""

    def layers(self, lm: Any) -> nn.ModuleList:
        return lm.base_model.transformer.layer

    def projections(self, layer: Any) -> tuple[nn.Module, nn.Module, nn.Module, float]:
        attention = layer.attention
        return attention.q_lin, attention.k_lin, attention.v_lin, attention.dropout.p

    def after_attention(self, layer: Any, h: Tensor, mixed: Tensor) -> Tensor:
        h = layer.sa_layer_norm(layer.attention.out_lin(mixed) + h)
        return layer.output_layer_norm(layer.ffn(h) + h)

    def classify(self, lm: Any, first: Tensor) -> Tensor:
        return lm.classifier(lm.dropout(F.relu(lm.pre_classifier(first[:, 0]))))

    def refusal(self, config: Any) -> str | None:
        return None


ROBERTA = RobertaFamily()
ENCODER_FAMILIES: dict[str, EncoderFamily] = {
    "bert": EncoderFamily(),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "electra": HeadedFamily(),
    "distilbert": DistilBertFamily(),
}


class EncoderBackbone(nn.Module):
    """An encoder with a classification head in parts; `lm` is the unchanged Hugging Face model."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        self.family = ENCODER_FAMILIES[lm.config.model_type]
        words = lm.get_input_embeddings().weight.detach().float()
        self.dimensions = Dimensions(
            width=lm.config.hidden_size,
            num_layers=lm.config.num_hidden_layers,
            num_heads=lm.config.num_attention_heads,
            head_width=lm.config.hidden_size // lm.config.num_attention_heads,
            embedding_std=float(words.std()),
            has_relative_positions=False,
            encoder_layers=self.family.layers(lm),
        )

    @property
    def max_positions(self) -> int:
        return self.family.num_positions(self.lm.config)

    def embed(self, tokens: Tensor) -> Tensor:
        """Word embeddings, (B, T) int64 -> (B, T, D)."""
        return self.lm.get_input_embeddings()(tokens)

    def place(self, h: Tensor) -> Tensor:
        """Layer 0's input: word embeddings (B, S, D) with positions 0, 1, ... and token type 0, normed."""
        return self.lm.base_model.embeddings(input_ids=None, inputs_embeds=h)

    def blocks(self, present: Tensor | None) -> list[EncoderBlock]:
        """The layers; `present` (B, S) bool is false at padding, None where there is none."""
        return [self._block(layer, present) for layer in self.family.layers(self.lm)]

    def classify(self, h: Tensor) -> Tensor:
        """Logits (B, K) of the [CLS] row's outputs (B, D)."""
        return self.family.classify(self.lm, h[:, None])

    def _block(self, own: nn.Module, present: Tensor | None) -> EncoderBlock:
        family, num_heads = self.family, self.dimensions.num_heads

        def run(
            h: Tensor,
            *,
            rows: Tensor | None = None,
            seen: Tensor | None = None,
            layer: nn.Module | None = None,
            attention: Attention | None = None,
        ) -> Tensor:
            module = own if layer is None else layer
            query, key, value, dropout = family.projections(module)
            computed = h if rows is None else h[:, rows]
            keyed = h if seen is None else h[:, seen]
            visible = present if seen is None or present is None else present[:, seen]

            def heads(x: Tensor) -> Tensor:
                return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

            mixed = (attention or attend)(
                Heads(
                    heads(query(computed)),
                    heads(key(keyed)),
                    heads(value(keyed)),
                    scale=(h.shape[-1] // num_heads) ** -0.5,
                    dropout=dropout if module.training else 0.0,
                    mask=None if visible is None else visible[:, None, None],
                )
            )
            return family.after_attention(module, computed, mixed.transpose(1, 2).flatten(2))

        return run


def attend(heads: Heads) -> Tensor:
    """Attention both ways, (B, H, N, D / H)."""
    return F.scaled_dot_product_attention(
        heads.queries, heads.keys, heads.values, attn_mask=heads.mask, dropout_p=heads.dropout, scale=heads.scale
    )


def load_encoder_lm(
    source: str | Path | dict[str, Any] | PretrainedConfig, num_labels: int, dtype: torch.dtype
) -> PreTrainedModel:
    """The encoder with its classification head: weights from a directory, or random ones for a configuration.

    A directory may hold the encoder without this head, or with that of its pre-training: the head is then random.
    Raises ValueError where any other weight is missing or has no place.
    """
    config = config_from(source, ENCODER_FAMILIES)
    if reason := ENCODER_FAMILIES[config.model_type].refusal(config):
        raise ValueError(f"this {config.model_type} backbone is not supported: {reason}")
    settings = {key: value for key, value in config.to_dict().items() if key not in ("id2label", "label2id")}
    config = type(config).from_dict({**settings, "num_labels": num_labels})
    if not isinstance(source, str | Path):
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    lm, report = AutoModelForSequenceClassification.from_pretrained(
        str(source),
        local_files_only=True,
        config=config,
        dtype=dtype,
        ignore_mismatched_sizes=True,  # a head of other labels; any other is found below
        output_loading_info=True,
    )
    body = f"{lm.base_model_prefix}."
    wrong = {}
    for kind, entries in report.items():
        names = {str(entry[0] if isinstance(entry, tuple) else entry) for entry in entries}
        if found := sorted(name for name in names if name.startswith(body) and ".pooler." not in name):
            wrong[kind] = found
    if wrong:
        raise ValueError(f"the weights in {str(source)!r} do not fit its config.json: {wrong}")
    return lm


def special_tokens(source: str | Path | dict[str, Any] | PretrainedConfig) -> tuple[int | None, int | None]:
    """The ids of [CLS] and [SEP] in the tokenizer saved beside a backbone, None where there is none."""
    if not isinstance(source, str | Path) or not any(
        (Path(source) / name).is_file()
        for name in ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer_config.json")
    ):
        return None, None
    tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    return tokenizer.cls_token_id, tokenizer.sep_token_id
