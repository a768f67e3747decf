"""Memory Transformer (Burtsev et al. 2020, arXiv:2006.11527, section 3): memory without recurrence, on an encoder.

Axes: B rows, T text rows, M memory rows, S rows that a layer sees, D width.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..state import State
from .base import Dimensions, EncoderBlock, LearnedRows, Memory, Segment, at_least

VARIANTS = ("mem", "ctrl", "bottleneck")


@dataclass(frozen=True)
class MemoryTransformerConfig:
    """Settings of the Memory Transformer."""

    num_tokens: int = 10  # memory tokens; 0 is the plain backbone
    variant: str = "mem"  # mem (MemTransformer), ctrl (MemCtrl) or bottleneck (MemBottleneck)

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"memory.variant is {self.variant!r}; allowed: {', '.join(VARIANTS)}")
        at_least(1 if self.variant == "bottleneck" else 0, self, "num_tokens")  # a bottleneck of 0 sees nothing


class MemoryTransformerMemory(Memory):
    """M learned rows among the text's, the same for each segment; the state is empty.

    `mem`: they pass through the backbone's layers with the text. `ctrl`: in each layer they have attention and
    feed-forward weights of their own, and both kinds of rows attend to all rows. `bottleneck`: memory rows, with
    weights of their own, attend to all rows first; then text rows attend to the updated memory rows and to nothing
    else.

    Own weights begin as copies of the backbone's layer (the paper trains from scratch), so that `ctrl` begins as `mem`.
    What comes out of the last layer at memory rows is read by nobody: there `ctrl` has no layer of its own and leaves
    these rows as they are. The paper puts memory before the whole sequence; here it follows [CLS].
    """

    Config = MemoryTransformerConfig
    has_rows_only = True
    for_encoders = True

    def __init__(self, config: MemoryTransformerConfig, dimensions: Dimensions) -> None:
        super().__init__(config, dimensions)
        if dimensions.encoder_layers is None:
            raise ValueError(
                "memory 'memory_transformer' needs an encoder (rmt_core.build_encoder): in a causal backbone memory "
                "before the text sees nothing of it and memory after the text is read by nobody"
            )
        self.rows_before = config.num_tokens
        self.rows = LearnedRows(config.num_tokens, dimensions.width, dimensions.embedding_std)
        num_own = {"mem": 0, "ctrl": dimensions.num_layers - 1, "bottleneck": dimensions.num_layers}[config.variant]
        copied = list(dimensions.encoder_layers)[: num_own if config.num_tokens else 0]
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in copied)

    def enter(self, x: Tensor, state: State, segment: Segment) -> Tensor:
        return torch.cat([self.rows(len(x)), x], dim=1)

    def encode(self, layer: int, h: Tensor, block: EncoderBlock, segment: Segment) -> Tensor:
        m = self.rows_before
        if self.config.variant == "mem" or not m:
            return block(h)
        at, end = torch.arange(h.shape[1], device=h.device), segment.text_start
        start = end - m
        memory, before, after = at[start:end], at[:start], at[end:]
        new = h[:, start:end]
        if layer < len(self.layers):
            new = block(h, rows=memory, layer=self.layers[layer])
        text = torch.cat([before, after])
        if self.config.variant == "ctrl":
            others = block(h, rows=text)
        else:
            updated = torch.cat([h[:, :start], new, h[:, end:]], dim=1)
            others = block(updated, rows=text, seen=memory)
        return torch.cat([others[:, :start], new, others[:, start:]], dim=1)

    def leave(self, h: Tensor, state: State, segment: Segment) -> tuple[Tensor, State]:
        return h[:, self.rows_before :], state
