"""Memformer's encoder-decoder form (Wu et al. 2020, arXiv:2010.06891, section 3), on sequence-to-sequence backbones.

The encoder reads a segment, with the memory read in each of its layers, and its output writes the memory; the decoder
sees the encoder's output alone and predicts a target: the segment that follows, or one that is given.

Axes: B rows, N tokens of a text, T tokens of a source, U tokens of a target, D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import state as states
from .backbone_config import config_from
from .build import build_memory, configured, on_its_own
from .config import DTYPES, NOT_KEPT, BackboneSource, memory_settings, memory_to_json
from .encoder_decoder import FAMILIES, EncoderDecoder, load_lm
from .memory import MEMORIES
from .memory.base import Memory, Segment
from .recurrent import IGNORED, Output, SegmentLoss, SegmentModel, check_rows
from .state import State


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig:
    """An encoder-decoder, its memory and the segments they read."""

    backbone: BackboneSource
    """A directory saved by Hugging Face (its weights are taken), or a configuration (random weights): a transformers
    config object or its dictionary with `model_type`."""

    memory: Any = "memformer"
    """A kind ("memformer"), or a dictionary of a kind and its settings ({"kind": "memformer", "num_slots": 8})."""

    segment_len: int = 512
    """Tokens of a source at most."""

    dtype: str = "float32"
    """Type of the parameters: float32, bfloat16, float16 or float64."""

    def __post_init__(self) -> None:
        if type(self.segment_len) is not int or self.segment_len < 1:
            raise ValueError(f"segment_len is {self.segment_len!r}; it must be a whole number of tokens, at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        memory = memory_settings(self.memory)
        fitting = [kind for kind, memory_class in MEMORIES.items() if memory_class.for_encoder_decoders]
        if not {settings["kind"] for settings in memory} <= set(fitting):
            kinds = " with ".join(settings["kind"] for settings in memory)
            raise ValueError(f"an encoder-decoder has no memory {kinds!r}; it takes one of: {', '.join(fitting)}")
        object.__setattr__(self, "memory", memory)

    def to_json(self) -> dict[str, Any]:
        """The configuration as JSON values; a backbone directory becomes the configuration found in it."""
        backbone = config_from(self.backbone, FAMILIES).to_dict()
        return {
            "backbone": {key: value for key, value in backbone.items() if key not in NOT_KEPT},
            "memory": memory_to_json(self.memory),
            "segment_len": self.segment_len,
            "dtype": self.dtype,
        }


class Seq2SeqBatch(NamedTuple):
    """One source of each row, and the target that its encoding should predict."""

    tokens: Tensor  # (B, T) int64, the source
    targets: Tensor  # (B, U) int64; U is 0 where the source is only read
    labels: Tensor  # (B, U) int64: the targets, -100 where nothing is asked, as at padding
    lengths: Tensor | None = None  # (B,) real tokens of the source; None where all rows are full
    reset: Tensor | None = None  # (B,) bool: a document begins here
    weights: Tensor | None = None  # (B, U) of the labels in the loss; None where all weigh 1


class Encoded(NamedTuple):
    """A source as the decoder sees it."""

    hidden: Tensor  # (B, T, D), the encoder's output; at padding without meaning
    lengths: Tensor | None  # (B,) real tokens
    aux: Tensor  # () auxiliary loss


class Seq2SeqModel(SegmentModel[Seq2SeqBatch]):
    """An encoder-decoder with a memory. Parameters only: the state comes in and goes out."""

    def __init__(self, backbone: EncoderDecoder, memory: Memory, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.memory = memory
        self.config = config
        limit = backbone.max_positions
        if limit is not None and self.segment_len > limit:
            raise ValueError(f"segment_len {self.segment_len} exceeds the backbone's {limit} positions")

    @property
    def segment_len(self) -> int:
        return self.config.segment_len

    def step(
        self,
        source: Tensor,
        targets: Tensor,
        state: State,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        active: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Output, State]:
        """Read source (B, T) int64 and predict each of targets (B, U) int64 from it and the targets before.

        The output's logits (B, U, V) at u are those of targets[:, u]; the others are as in `encode`.
        """
        encoded, state = self.encode(source, state, lengths, reset, active, generator)
        return self.decode(encoded, targets), state

    def encode(
        self,
        source: Tensor,
        state: State,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        active: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Encoded, State]:
        """Read one source of each row: (B, T) int64, T <= segment_len.

        `lengths` (B,): real tokens of each row; what follows is padding and touches nothing. A row of length 0 keeps
        its state, and its encoding has no meaning. `reset` (B,) bool: the row starts anew before this source. `active`
        (B,) bool: an inactive row keeps its state, whatever else is said of it. `generator` is for memories that draw.
        """
        if source.dim() != 2 or not 1 <= source.shape[1] <= self.segment_len:
            raise ValueError(f"source is {tuple(source.shape)}; a step takes (rows, 1 to {self.segment_len} tokens)")
        check_rows(source, state, lengths)
        before = state if reset is None else states.where(reset, self.init_state(len(source)), state)
        segment = Segment(source.shape[1], lengths, generator=generator)
        h, new = self.memory.enter(self.backbone.embed(source), before, segment), before
        for layer, block in enumerate(self.backbone.blocks(h, lengths)):
            h, new = self.memory.around(layer, h, block, new, segment)
        hidden, new = self.memory.leave(self.backbone.finish(h), new, segment)
        if lengths is not None:
            new = states.where(lengths > 0, new, before)
        if active is not None:
            new = states.where(active, new, state)
        aux = torch.stack(segment.aux).sum() if segment.aux else hidden.new_zeros(())
        return Encoded(hidden, lengths, aux), new

    def decode(self, encoded: Encoded, targets: Tensor) -> Output:
        """Predict each of targets (B, U) int64 from an encoding and the targets before it."""
        limit = self.backbone.max_positions
        most = targets.shape[-1] if limit is None else limit
        if targets.dim() != 2 or not 1 <= targets.shape[1] <= most:
            allowed = "at least 1 token" if limit is None else f"1 to {limit} tokens"
            raise ValueError(f"targets are {tuple(targets.shape)}; a step takes (rows, {allowed})")
        hidden = self.backbone.decode(encoded.hidden, encoded.lengths, targets)
        return Output(hidden, encoded.aux, self.backbone.head)

    def _segment_loss(
        self, segment: Seq2SeqBatch, state: State, generator: torch.Generator | None
    ) -> tuple[SegmentLoss, State]:
        """The loss of one target and the state after its source; the decoder only where there is a target."""
        encoded, state = self.encode(segment.tokens, state, segment.lengths, segment.reset, generator=generator)
        if segment.targets.shape[1]:
            return self.decode(encoded, segment.targets).loss(segment.labels, segment.weights), state
        nothing = encoded.aux.new_zeros(())
        return SegmentLoss(nothing, nothing, encoded.aux, nothing.expand(segment.targets.shape)), state

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        state: State = None,
        lengths: Tensor | None = None,
        *,
        bptt_segments: int | None = None,
        checkpointed: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean nats per token of whole texts, (B, N) int64, of which each row has `lengths` (B,) real tokens.

        Each segment is predicted from the one before it and the memory; `labels` (B, N) are the tokens themselves with
        -100 where one is not asked for, and without them all are asked for.
        """
        state = self.init_state(len(tokens)) if state is None else state
        segments = self.continuations(tokens, labels, lengths)
        return self.unroll(
            segments, state, bptt_segments=bptt_segments, checkpointed=checkpointed, generator=generator
        ).loss

    def continuations(
        self, tokens: Tensor, labels: Tensor | None = None, lengths: Tensor | None = None
    ) -> list[Seq2SeqBatch]:
        """Texts (B, N) as pairs of a segment and the one that follows it; the last may be shorter.

        The first segment's source is the start token of the backbone's targets; the last segment is nobody's source.
        """
        if tokens.dim() != 2 or not tokens.shape[1] or (labels is not None and labels.shape != tokens.shape):
            given = None if labels is None else tuple(labels.shape)
            raise ValueError(f"tokens {tuple(tokens.shape)} and labels {given} must be equal (rows, tokens)")
        size, num_tokens = self.segment_len, tokens.shape[1]
        labels = tokens if labels is None else labels
        if lengths is not None:
            padding = torch.arange(num_tokens, device=tokens.device) >= lengths[:, None]
            labels = labels.masked_fill(padding, IGNORED)
        source = torch.full_like(tokens[:, :1], self.backbone.start_token)
        source_lengths = None if lengths is None else lengths.clamp(0, 1)
        segments = []
        for start, part, asked in zip(
            range(0, num_tokens, size), tokens.split(size, 1), labels.split(size, 1), strict=True
        ):
            segments.append(Seq2SeqBatch(source, part, asked, source_lengths))
            source, source_lengths = part, None if lengths is None else (lengths - start).clamp(0, part.shape[1])
        return segments


def build_seq2seq(config: Seq2SeqConfig | None = None, **settings: Any) -> Seq2SeqModel:
    """The encoder-decoder of a configuration, or of its fields as keywords: `build_seq2seq(backbone=..., memory=...)`.

    Weights come from the backbone's directory, or are random (seed them with `torch.manual_seed`). The model is in
    evaluation mode: call `train()` for dropout. Raises ValueError where the parts do not fit each other.
    """
    config = configured(Seq2SeqConfig, config, settings)
    dtype = DTYPES[config.dtype]
    backbone = EncoderDecoder(load_lm(config.backbone, dtype))
    memory = build_memory(config.memory, backbone.dimensions).to(dtype)
    return Seq2SeqModel(backbone, memory, on_its_own(config, FAMILIES)).eval()
