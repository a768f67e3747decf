"""Reading with the whole text in context: full attention through the keys and values of all tokens so far.

What a memory is compared with at inference, where `blockwise` is for training: of each layer and token the keys and
values are kept, once, and nothing else; a text is read in pieces, with the same result as at once.

Axes: B rows, N tokens of a text, n tokens of a step, C tokens so far, L layers, H heads, G heads of keys and values,
D width, d of a head.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from .backbone import Backbone, Placement
from .memory.base import Attention, Heads
from .recurrent import Output, RecurrentModel
from .state import State

_STEP_TOKENS = 512  # of a step, or one segment: enough to keep matrix products efficient


class DoesNotFitError(MemoryError):
    """The text is too long for full attention: its keys and values for the memory, or itself for the positions."""

    def __init__(self, message: str, num_bytes: int) -> None:
        super().__init__(message)
        self.num_bytes = num_bytes  # of the keys and values that it needs


class KeysAndValues(NamedTuple):
    """What full attention carries: of every layer and token so far, with room for those to come."""

    keys: tuple[Tensor, ...]  # L x (B, G, N, d)
    values: tuple[Tensor, ...]  # L x (B, G, N, d)
    num_read: int  # C: the first C of the N are filled


class FullContext(RecurrentModel):
    """A model without memory whose steps see the whole text before them; the answers are Hugging Face's own.

    Its state grows with the text: `init_state` makes room once, and steps fill it in place. So a state that a step was
    given shares its room with the one that came out, and going on from it overwrites what came after. All rows begin
    together; padding is behind a row's end, where nothing real sees it. For inference only.

    `segment_len` (None: the model's) is no limit of what is seen: it says only where tasks put their facts. A step
    takes up to `step_len` tokens. Rotary positions run on beyond those that the backbone was made for, to whatever they
    are worth there; learned positions and sliding windows end a text. `max_bytes` limits keys and values.
    """

    sees_segments_alone = False

    def __init__(self, model: RecurrentModel, *, max_bytes: int | None = None, segment_len: int | None = None) -> None:
        if [settings["kind"] for settings in model.config.memory] != ["none"]:
            raise ValueError("full attention is for models of memory none: others were made to read segment by segment")
        super().__init__(model.backbone, model.memory, model.config)
        self.eval()
        self.max_bytes = max_bytes
        self._segment_len = segment_len or model.segment_len

    @property
    def segment_len(self) -> int:
        return self._segment_len

    @property
    def step_len(self) -> int:
        return self.segment_len * max(1, _STEP_TOKENS // self.segment_len)

    @torch.no_grad()
    def init_state(self, batch_size: int, num_tokens: int | None = None) -> State:
        """Room for so many tokens (None: the positions that the backbone was made for). Raises DoesNotFitError."""
        backbone = self.backbone
        size = backbone.max_positions if num_tokens is None else num_tokens
        num_bytes = batch_size * size * floats_per_token(backbone) * _like(backbone).element_size()
        most = most_positions(backbone)
        if most is not None and size > most:
            raise DoesNotFitError(f"{size:,} tokens exceed the backbone's {most:,} positions", num_bytes)
        needs = f"keys and values of {batch_size} x {size:,} tokens need {num_bytes:,} bytes"
        if self.max_bytes is not None and num_bytes > self.max_bytes:
            raise DoesNotFitError(f"{needs}; {self.max_bytes:,} are allowed", num_bytes)
        shape = (batch_size, _num_kv_heads(backbone), size, backbone.dimensions.head_width)
        try:
            made = [_like(backbone).new_empty(shape) for _ in range(2 * backbone.dimensions.num_layers)]
        except RuntimeError as error:  # what allocators raise
            raise DoesNotFitError(f"{needs}: {str(error).splitlines()[0]}", num_bytes) from error
        return KeysAndValues(tuple(made[::2]), tuple(made[1::2]), 0)

    @torch.no_grad()
    def step(
        self,
        tokens: Tensor,
        state: State,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        active: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Output, State]:
        """Read tokens (B, n) int64 behind those so far. `lengths` (B,) say what is padding, which changes nothing."""
        if reset is not None or active is not None:
            raise ValueError("rows of full attention begin and go on together; give neither reset nor active")
        start, end, size = state.num_read, state.num_read + tokens.shape[1], state.keys[0].shape[2]
        if end > size:
            raise ValueError(f"{end} tokens exceed the {size} that there is room for")
        backbone = self.backbone
        # The last place tells rotary positions that depend on the text's length how long it gets.
        positions = torch.tensor([*range(start, end), size - 1], device=tokens.device)
        placement = Placement(positions[None])
        try:
            h = backbone.place(backbone.embed(tokens), placement)
            for layer, block in enumerate(backbone.blocks(h, placement)):
                h = block(h, attention=_attention(state.keys[layer], state.values[layer], start))
            hidden = backbone.norm(h)
        except torch.OutOfMemoryError as error:
            num_bytes = sum(part.nbytes for part in (*state.keys, *state.values))
            raise DoesNotFitError(f"beside {num_bytes:,} bytes of keys and values: {error}", num_bytes) from error
        return Output(hidden, hidden.new_zeros(()), backbone.head), state._replace(num_read=end)

    @torch.no_grad()
    def write(
        self, state: KeysAndValues, row: int, read: tuple[int, Tensor], max_new_tokens: int, stops: Sequence[int] = ()
    ) -> list[int]:
        """What greedy decoding writes in a row behind tokens that were read, up to a stop token, which is left out.

        `read` is how many tokens of the row that is, and the hidden state (D,) at the last of them. There must be
        room for `max_new_tokens` behind them. The state is left as it was.
        """
        num_read, hidden = read
        kept = [part[row : row + 1] for part in (*state.keys, *state.values)]
        room = slice(num_read, num_read + max_new_tokens)
        before = [part[:, :, room].clone() for part in kept]
        num_layers = len(state.keys)
        own: State = KeysAndValues(tuple(kept[:num_layers]), tuple(kept[num_layers:]), num_read)
        written: list[int] = []
        while len(written) < max_new_tokens:
            token = self.backbone.head(hidden).argmax()
            if int(token) in stops:
                break
            written.append(int(token))
            if len(written) < max_new_tokens:
                out, own = self.step(token[None, None], own)
                hidden = out.hidden[0, 0]
        for part, was in zip(kept, before, strict=True):
            part[:, :, room] = was
        return written


def floats_per_token(backbone: Backbone) -> int:
    """Numbers that full attention carries for each token of a text."""
    sizes = backbone.dimensions
    return 2 * sizes.num_layers * _num_kv_heads(backbone) * sizes.head_width


def most_positions(backbone: Backbone) -> int | None:
    """The longest text that the backbone can have in context: learned positions and windows end; None: any."""
    if backbone.family.has_relative_positions:
        return backbone.family.window(backbone.lm.config)
    return backbone.max_positions


def _num_kv_heads(backbone: Backbone) -> int:
    num: int = getattr(backbone.lm.config, backbone.family.kv_heads_name)
    return num


def _like(backbone: Backbone) -> Tensor:
    """A tensor of the type and on the device of the weights."""
    weight: Tensor = backbone.lm.get_input_embeddings().weight
    return weight.detach()


def _attention(keys: Tensor, values: Tensor, start: int) -> Attention:
    """Attention of n rows to all C so far, (B, G, C, d) of what is kept, once their own are put there."""

    def attend(heads: Heads) -> Tensor:
        queries = heads.queries
        groups, end = queries.shape[1] // keys.shape[1], start + queries.shape[2]
        keys[:, :, start:end], values[:, :, start:end] = heads.keys[:, ::groups], heads.values[:, ::groups]
        return _causal(queries, keys[:, :, :end], values[:, :, :end], heads.scale)

    return attend


def _causal(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attention of the last n of C rows, (B, H, n, d), to the rows up to each, (B, G, C, d).

    On a CPU the fast kernel takes this only as a mask, which would be n x C numbers. With the queries in reverse, row i
    sees column j where i + j < C: so the mask is a view of n + C numbers.
    """
    num_rows, num_seen = queries.shape[2], keys.shape[2]
    attend = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=queries.shape[1] > keys.shape[1])
    if num_rows == 1:
        return attend(queries, keys, values)
    if queries.is_cuda:
        return attend(queries, keys, values, attn_mask=causal_lower_right(num_rows, num_seen))
    line = queries.new_zeros(num_rows + num_seen - 1)
    line[num_seen:] = -torch.inf
    mask = line.as_strided((num_rows, num_seen), (1, 1))
    return attend(queries.flip(2), keys, values, attn_mask=mask).flip(2)
