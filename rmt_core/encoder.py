"""Classification of long documents by an encoder with a recurrent memory (arXiv:2304.11062, section 2).

A segment is read as `[CLS] memory [SEP] segment [SEP]`, the memory in positions 1 to M; what comes out of the last
layer at the memory's rows is the next segment's memory, and the last segment's [CLS] gives the class. Without memory
rows the first [SEP] is left out too: that is the ordinary input of the family.

Axes: B rows, T tokens of a segment, M memory rows, S positions that a layer sees, D width, K segments of the longest
document, L labels.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from . import state as states
from .backbone_config import config_from, supported
from .build import build_memory, configured, on_its_own
from .config import DTYPES, NOT_KEPT, BackboneSource, memory_settings, memory_to_json
from .encoder_backbone import ENCODER_FAMILIES, EncoderBackbone, load_encoder_lm, special_tokens
from .memory import MEMORIES
from .memory.base import Memory, Segment, append_rows
from .recurrent import check_bptt, check_rows
from .state import State

ALIGNMENTS = ("right", "left")
LOSSES = ("last", "mean")

Documents = Sequence[Sequence[int]] | Sequence[Tensor] | Tensor  # token ids of text, without special tokens


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """An encoder, its memory and the segments it reads."""

    backbone: BackboneSource
    """A directory saved by Hugging Face (its weights are taken), or a configuration (random weights): a transformers
    config object or its dictionary with `model_type`."""

    memory: Any = "none"
    """A kind for encoders ("rmt"), or a dictionary of a kind and its settings ({"kind": "rmt", "num_tokens": 10})."""

    segment_len: int = 499
    """Text tokens of a segment, without memory and the three special tokens: 499 with 10 memory tokens fill 512."""

    num_labels: int = 2
    """Classes."""

    alignment: str = "right"
    """Which segment of a document is the short one: with "right" the first, with "left" the last."""

    loss: str = "last"
    """Cross entropy on the last segment ("last"), or its mean over all segments of a document ("mean")."""

    cls_token_id: int | None = None
    """The id of [CLS] (<s>); None: that of the tokenizer in the backbone's directory."""

    sep_token_id: int | None = None
    """The id of [SEP] (</s>); None: that of the tokenizer in the backbone's directory."""

    dtype: str = "float32"
    """Type of the parameters: float32, bfloat16, float16 or float64."""

    def __post_init__(self) -> None:
        for name, minimum in (("segment_len", 1), ("num_labels", 2)):
            value = getattr(self, name)
            if type(value) is not int or value < minimum:
                raise ValueError(f"{name} is {value!r}; it must be a whole number, at least {minimum}")
        for name, allowed in (("alignment", ALIGNMENTS), ("loss", LOSSES), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        memory = memory_settings(self.memory)
        fitting = [kind for kind, memory_class in MEMORIES.items() if memory_class.for_encoders]
        if len(memory) > 1 or memory[0]["kind"] not in fitting:
            kinds = " with ".join(settings["kind"] for settings in memory)
            raise ValueError(f"an encoder has no memory {kinds!r}; it takes one of: {', '.join(fitting)}")
        object.__setattr__(self, "memory", memory)
        backbone = config_from(self.backbone, ENCODER_FAMILIES)
        supported(backbone.model_type, ENCODER_FAMILIES)
        for name, found in zip(("cls_token_id", "sep_token_id"), special_tokens(self.backbone), strict=True):
            value = found if getattr(self, name) is None else getattr(self, name)
            if type(value) is not int or not 0 <= value < backbone.vocab_size:
                raise ValueError(f"{name} is {value!r}; give the token's id, 0 to {backbone.vocab_size - 1}")
            object.__setattr__(self, name, value)

    @property
    def special_tokens(self) -> tuple[int, int]:
        """The ids of [CLS] and [SEP]."""
        assert self.cls_token_id is not None  # found when the configuration was made
        assert self.sep_token_id is not None
        return self.cls_token_id, self.sep_token_id

    def to_json(self) -> dict[str, Any]:
        """The configuration as JSON values; a backbone directory becomes the configuration found in it."""
        backbone = config_from(self.backbone, ENCODER_FAMILIES).to_dict()
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        kept = {key: value for key, value in backbone.items() if key not in NOT_KEPT}
        return {**own, "backbone": kept, "memory": memory_to_json(self.memory)}


class EncoderOutput(NamedTuple):
    """What a step gives. At padding, and at rows of length 0, values are finite and without meaning."""

    logits: Tensor  # (B, L) of the [CLS] row
    first: Tensor  # (B, D) the [CLS] row after the last layer
    hidden: Tensor  # (B, T, D) the text after the last layer


class DocumentSegment(NamedTuple):
    """One segment of each document."""

    tokens: Tensor  # (B, T) int64, padding behind a row's tokens
    lengths: Tensor | None  # (B,) int64; None where all are equal
    active: Tensor  # (B,) bool: false before a document's first segment


class Classified(NamedTuple):
    """What reading documents gives; all of them end with the last segment."""

    logits: Tensor  # (B, L) after the last segment
    logits_by_segment: Tensor  # (B, K, L), without meaning where not active
    active: Tensor  # (B, K) bool
    state: State  # after the last segment


class EncoderModel(nn.Module):
    """An encoder with a memory. Parameters only: the state comes in and goes out."""

    def __init__(self, backbone: EncoderBackbone, memory: Memory, config: EncoderConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.memory = memory
        self.config = config
        extra = memory.rows_before + (3 if memory.rows_before else 2)
        room = backbone.max_positions - extra
        if config.segment_len > room:
            raise ValueError(
                f"segment_len {config.segment_len} + {extra} memory and special tokens exceeds the backbone's "
                f"{backbone.max_positions} positions; use "
                + (f"at most {room}" if room > 0 else "a smaller memory, which leaves no room for text")
            )

    @property
    def segment_len(self) -> int:
        return self.config.segment_len

    def init_state(self, batch_size: int) -> State:
        """The state before a document's first segment, for `batch_size` rows."""
        return self.memory.init_state(batch_size)

    def step(
        self,
        tokens: Tensor,
        state: State,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        active: Tensor | None = None,
    ) -> tuple[EncoderOutput, State]:
        """Read one segment of each row: text tokens (B, T) int64, T <= segment_len, without special tokens.

        `lengths` (B,): real tokens of each row; what follows is padding and touches nothing. A row of length 0 keeps
        its state. `reset` (B,) bool: the row starts anew before this segment. `active` (B,) bool: an inactive row
        keeps its state, whatever else is said of it.
        """
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= self.segment_len:
            raise ValueError(f"tokens are {tuple(tokens.shape)}; a step takes (rows, 1 to {self.segment_len} tokens)")
        check_rows(tokens, state, lengths)
        given = state
        if reset is not None:
            state = states.where(reset, self.init_state(len(tokens)), given)
        out, new = self._read(tokens, state, lengths)
        if lengths is not None:
            new = states.where(lengths > 0, new, state)
        if active is not None:
            new = states.where(active, new, given)
        return out, new

    def _read(self, tokens: Tensor, state: State, lengths: Tensor | None) -> tuple[EncoderOutput, State]:
        """All hooks and layers over tokens (B, T)."""
        backbone, memory = self.backbone, self.memory
        cls, sep = (backbone.embed(torch.full_like(tokens[:, :1], token)) for token in self.config.special_tokens)
        x = append_rows(backbone.embed(tokens), sep, lengths)
        num_lead = 1 if memory.rows_before else 0  # the [SEP] between memory and text
        if num_lead:
            x = torch.cat([sep, x], dim=1)
        ends = None if lengths is None else lengths + (x.shape[1] - tokens.shape[1])  # of the text with its [SEP]s
        segment = Segment(x.shape[1], ends, 1 + memory.rows_before)
        h = backbone.place(torch.cat([cls, memory.enter(x, state, segment)], dim=1))  # (B, S, D)
        for layer, block in enumerate(backbone.blocks(present(h, segment))):
            h = memory.encode(layer, h, block, segment)
        first = h[:, 0]
        text, new = memory.leave(h[:, 1:], state, segment)
        hidden = text[:, num_lead : num_lead + tokens.shape[1]]
        return EncoderOutput(backbone.classify(first), first, hidden), new

    def read(self, documents: Documents, *, bptt_segments: int | None = None, checkpointed: bool = False) -> Classified:
        """Read whole documents, of any lengths of at least one token.

        A document of fewer segments than the longest starts later, so that all end together. The gradient crosses no
        edge between windows of `bptt_segments` segments, counted from the end; None lets it cross all. With
        `checkpointed`, a segment's activations are computed again in the backward pass instead of kept.
        """
        check_bptt(bptt_segments)
        segments = self.cut(documents)
        state, logits = self.init_state(len(documents)), []
        for i, segment in enumerate(segments):
            if bptt_segments is not None and i and (len(segments) - i) % bptt_segments == 0:
                state = states.detach(state)
            arguments = (segment.tokens, state, segment.lengths, None, segment.active)
            if checkpointed:
                out, state = checkpoint(self.step, *arguments, use_reentrant=False)
            else:
                out, state = self.step(*arguments)
            logits.append(out.logits)
        active = torch.stack([segment.active for segment in segments], dim=1)
        return Classified(logits[-1], torch.stack(logits, dim=1), active, state)

    def forward(
        self,
        documents: Documents,
        labels: Tensor | Sequence[int],
        *,
        bptt_segments: int | None = None,
        checkpointed: bool = False,
    ) -> Tensor:
        """Mean cross entropy of the documents' labels (B,), nats, as the configuration's `loss` says."""
        read = self.read(documents, bptt_segments=bptt_segments, checkpointed=checkpointed)
        wanted = torch.as_tensor(labels, dtype=torch.long, device=read.logits.device)
        if self.config.loss == "last":
            return F.cross_entropy(_at_least_float32(read.logits), wanted)
        num_segments = read.active.shape[1]
        logits = _at_least_float32(read.logits_by_segment).flatten(0, 1)
        nats = F.cross_entropy(logits, wanted.repeat_interleave(num_segments), reduction="none").view(-1, num_segments)
        return ((nats * read.active).sum(1) / read.active.sum(1)).mean()

    def cut(self, documents: Documents) -> list[DocumentSegment]:
        """The documents' segments, the earliest first; all documents have one in the last."""
        device = self.backbone.lm.get_input_embeddings().weight.device
        texts = [torch.as_tensor(document, dtype=torch.long, device=device) for document in documents]
        for i, text in enumerate(texts):
            if text.dim() != 1:
                raise ValueError(f"document {i} has shape {tuple(text.shape)}; give documents, each a list of tokens")
            if not len(text):
                raise ValueError(f"document {i} is empty; a document needs at least one token")
        if not texts:
            raise ValueError("there are no documents; give at least one")
        pieces = [self._pieces(text) for text in texts]
        num_segments = max(map(len, pieces))
        found = []
        for k in range(num_segments):
            row = [parts[at] if (at := k - num_segments + len(parts)) >= 0 else parts[0][:0] for parts in pieces]
            lengths = torch.tensor([len(part) for part in row], device=device)
            is_ragged = len(set(map(len, row))) > 1
            tokens = nn.utils.rnn.pad_sequence(row, batch_first=True)
            found.append(DocumentSegment(tokens, lengths if is_ragged else None, lengths > 0))
        return found

    def _pieces(self, text: Tensor) -> list[Tensor]:
        """A document (N,) in segments: all but the first ("right") or the last ("left") are full."""
        short = len(text) % self.segment_len
        if self.config.alignment == "left" or not short:
            return list(text.split(self.segment_len))
        return [text[:short], *(text[short:].split(self.segment_len) if len(text) > short else ())]


def present(h: Tensor, segment: Segment) -> Tensor | None:
    """Which rows of h (B, S, D) are no padding, (B, S) bool; None where all are."""
    if segment.lengths is None:
        return None
    return torch.arange(h.shape[1], device=h.device) < (segment.text_start + segment.lengths)[:, None]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def build_encoder(config: EncoderConfig | None = None, **settings: Any) -> EncoderModel:
    """The encoder of a configuration, or of its fields as keywords: `build_encoder(backbone=..., memory="rmt", ...)`.

    Weights come from the backbone's directory, or are random (seed them with `torch.manual_seed`); a classification
    head that the directory lacks is random. The model is in evaluation mode: call `train()` for dropout. Raises
    ValueError where the parts do not fit each other.
    """
    config = configured(EncoderConfig, config, settings)
    dtype = DTYPES[config.dtype]
    backbone = EncoderBackbone(load_encoder_lm(config.backbone, config.num_labels, dtype))
    memory = build_memory(config.memory, backbone.dimensions).to(dtype)
    return EncoderModel(backbone, memory, on_its_own(config, ENCODER_FAMILIES)).eval()
