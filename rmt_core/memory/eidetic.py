"""B'MOJO: attention over recent tokens, a fading memory and tokens kept because they surprised
(Zancato et al. 2024, arXiv:2407.06324; the released layer without the last, hybrid-model-factory).

Axes: B rows, S positions that a layer sees, T tokens, N positions from the first token on (T and what memories put
behind it), M memory rows before the text, w window, E eidetic tokens, D width, H heads, d = D / H,
G groups of the state space, p = D / G, n size of its state, C chunks of Q positions.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..state import State
from .base import Block, Dimensions, Heads, LayerMemory, LayerwiseMemory, Segment, at_least, take

CHUNK = 64  # positions whose mutual decays are written out at once: more cost memory, fewer cost steps


@dataclass(frozen=True)
class BMojoConfig:
    """Settings of B'MOJO."""

    window: int = 128  # tokens that are seen as they are, and fading ones before them; 0 is the plain backbone
    state_size: int = 16  # numbers that the state space keeps for each number of the width
    num_eidetic: int = 0  # tokens kept for as long as no worse predicted ones come; 0 is B'MOJO-F

    def __post_init__(self) -> None:
        at_least(0, self, "window", "num_eidetic")
        at_least(1, self, "state_size")


class Faded(NamedTuple):
    """What the fading path makes of N positions."""

    rows: Tensor  # (B, N, D)
    state: Tensor  # (B, G, n, p), after them
    innovations: Tensor  # (B, N), without a gradient


class StateSpace(nn.Module):
    """The fading path: a selective state space with one decay a group (Mamba-2, Dao and Gu 2024, arXiv:2405.21060).

    `s_t = a_t s_{t-1} + step_t k_t v_t'` and `y_t = skip x_t + W norm(q_t' s_t)` with `a_t = exp(-step_t rate)`, where
    k, q, v and the step are linear in x; without Mamba's short convolution and gate. `W` starts at zero: at first the
    fading rows are the tokens themselves, and attention is one over a window of twice the size.
    """

    def __init__(self, width: int, num_groups: int, state_size: int, tests: bool) -> None:
        super().__init__()
        self.tests = tests
        self.sizes = [width, state_size, state_size, num_groups]
        self.num_groups = num_groups
        self.inputs = nn.Linear(width, sum(self.sizes), bias=False)
        self.output = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.output.weight)
        self.skip = nn.Parameter(torch.ones(width))
        self.rate = nn.Parameter(torch.zeros(num_groups))  # logarithm
        steps = torch.logspace(-3, -1, num_groups)  # as Mamba's: groups that keep 10 to 1,000 tokens
        self.step = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # through softplus

    def forward(self, x: Tensor, state: Tensor, real: Tensor) -> Faded:
        """The fading rows of x (B, N, D); only positions that are `real` (B, N) enter the state.

        A token's innovation is the fraction of its v that no multiple of `k_t' s_{t-1}` explains, what the state holds
        under the token's own key, mean over groups: 1 for what is wholly new, 0 for what came before. Where it is not
        asked for it is 1.
        """
        values, keys, queries, step = self.inputs(x).to(state.dtype).split(self.sizes, dim=-1)
        values = values.unflatten(-1, (self.num_groups, -1)).transpose(1, 2)  # (B, G, N, p)
        step = (F.softplus(step + self.step.to(state.dtype)) * real[..., None]).transpose(1, 2)  # (B, G, N)
        log_decay = -step * self.rate.to(state.dtype).exp()[:, None]
        update = step[..., None] * values
        read, new = scan(log_decay, keys, update, queries, state)
        read = F.rms_norm(read.transpose(1, 2).flatten(2), x.shape[-1:], eps=1e-6).to(x.dtype)
        fading = self.skip * x + self.output(read)
        if not self.tests:
            return Faded(fading, new, torch.ones_like(step[:, 0]))
        with torch.no_grad():
            known, _ = scan(log_decay, keys, update, keys, state, own=False)
            explained = F.cosine_similarity(known, values, dim=-1).square()  # (B, G, N)
            return Faded(fading, new, 1 - explained.mean(1))


def scan(
    log_decay: Tensor, keys: Tensor, values: Tensor, queries: Tensor, state: Tensor, own: bool = True
) -> tuple[Tensor, Tensor]:
    """`q_t' s_t` (B, G, N, p) with `s_t = exp(log_decay_t) s_{t-1} + k_t v_t'`, and the last s (B, G, n, p).

    log_decay (B, G, N) at most 0, values (B, G, N, p), keys and queries (B, N, n). Without `own`, a position reads the
    state that it has decayed and not yet added to. Positions of a chunk see one another through their decays, and
    earlier chunks through the state at the chunk's start; the cost is linear in N, with no loop over it.
    """
    size = min(CHUNK, log_decay.shape[2])
    rest = -log_decay.shape[2] % size
    log_decay = F.pad(log_decay, (0, rest)).unflatten(2, (-1, size))  # (B, G, C, Q)
    values = F.pad(values, (0, 0, 0, rest)).unflatten(2, (-1, size))  # (B, G, C, Q, p)
    keys, queries = (F.pad(x, (0, 0, 0, rest)).unflatten(1, (-1, size))[:, None] for x in (keys, queries))
    since_start = log_decay.cumsum(-1)
    between = _decays(since_start, since_start, 0 if own else -1)  # (B, G, C, Q, Q)
    inside = (queries @ keys.transpose(-1, -2) * between) @ values
    to_end = (since_start[..., -1:] - since_start).exp()
    added = keys.transpose(-1, -2) @ (to_end[..., None] * values)  # (B, G, C, n, p), by each chunk
    ends = F.pad(since_start[..., -1].cumsum(-1), (1, 0))  # (B, G, C + 1)
    sources = torch.cat([state[:, :, None], added], dim=2)
    states = torch.einsum("bgce,bgenp->bgcnp", _decays(ends, ends, 0), sources)  # at each chunk's start, and the end
    before = since_start.exp()[..., None] * (queries @ states[:, :, :-1])
    read = (inside + before).flatten(2, 3)
    return read[:, :, : read.shape[2] - rest], states[:, :, -1]


def _decays(to: Tensor, since: Tensor, diagonal: int) -> Tensor:
    """exp(to_i - since_j) for j <= i + diagonal, else 0: (..., I, J)."""
    difference = to[..., :, None] - since[..., None, :]
    seen = torch.ones_like(difference, dtype=torch.bool).tril(diagonal)
    return difference.masked_fill(~seen, -torch.inf).exp()


class BMojoLayer(LayerMemory):
    """One layer's window, fading rows, state space and eidetic tokens."""

    def __init__(self, config: BMojoConfig, dimensions: Dimensions) -> None:
        super().__init__()
        self.window, self.state_size, self.num_eidetic = config.window, config.state_size, config.num_eidetic
        self.width, self.num_groups = dimensions.width, math.gcd(dimensions.width, dimensions.num_heads)
        if config.window:
            self.space = StateSpace(dimensions.width, self.num_groups, config.state_size, config.num_eidetic > 0)

    def init_state(self, batch_size: int) -> State:
        if not self.window:
            return ()
        anchor, exact = self.anchor, torch.promote_types(self.anchor.dtype, torch.float32)
        state = {
            "recent": anchor.new_zeros(batch_size, self.window - 1, self.width),
            "fading": anchor.new_zeros(batch_size, 2 * self.window - 1, self.width),
            "space": anchor.new_zeros(
                batch_size, self.num_groups, self.state_size, self.width // self.num_groups, dtype=exact
            ),
            "filled": torch.zeros(batch_size, dtype=torch.long, device=anchor.device),
        }
        if self.num_eidetic:
            state["innovations"] = anchor.new_zeros(batch_size, self.window - 1, dtype=exact)
            state["eidetic"] = anchor.new_zeros(batch_size, self.num_eidetic, self.width)
            state["eidetic_innovations"] = anchor.new_zeros(batch_size, self.num_eidetic, dtype=exact)
        return state

    def forward(self, h: Tensor, block: Block, state: State, segment: Segment) -> tuple[Tensor, State]:
        if not self.window:
            return block(h), state
        rows = h if segment.stage == "extend" else h[:, segment.text_start :]  # (B, N, D)
        length = torch.full_like(state["filled"], segment.text_len) if segment.lengths is None else segment.lengths
        real = torch.arange(rows.shape[1], device=h.device) < length[:, None]
        faded: Faded = self.space(F.rms_norm(rows, rows.shape[-1:], eps=1e-6), state["space"], real)
        fading = torch.cat([state["fading"], faded.rows.to(state["fading"].dtype)], dim=1)  # (B, 2w - 1 + N, D)

        def attention(heads: Heads) -> Tensor:
            return self._attend(heads, fading, state, segment)

        out = block(h, attention=attention)
        recent = torch.cat([state["recent"], rows.detach().to(state["recent"].dtype)], dim=1)
        at = torch.arange(2 * self.window - 1, device=h.device) + length[:, None]
        new = {
            "recent": take(recent, at[:, : self.window - 1]),
            "fading": take(fading, at),
            "space": faded.state,
            "filled": (state["filled"] + length).clamp(max=2 * self.window - 1),
        }
        if self.num_eidetic:
            innovations = torch.cat([state["innovations"], faded.innovations], dim=1)
            new["innovations"] = innovations.gather(1, at[:, : self.window - 1])
            new |= self._keep(recent, innovations, length, state, segment)
        return out, new

    def _attend(self, heads: Heads, fading: Tensor, state: State, segment: Segment) -> Tensor:
        """One softmax for each position over what it sees, (B, H, S, d). Memory rows before the text see themselves."""
        if segment.stage == "extend":  # of the keys that are kept, those of memory rows and of the token itself count
            assert heads.mask is not None
            start, at = segment.kept_start, heads.mask.sum(-1).flatten() - 1  # (B,)
            keys, values = (
                torch.cat([x[:, :, :start], x.gather(2, at.view(-1, 1, 1, 1).expand(-1, x.shape[1], 1, x.shape[3]))], 2)
                for x in (heads.keys, heads.values)
            )
            return self._windows(heads._replace(keys=keys, values=values), start, at[:, None], fading, state)
        start = segment.text_start
        at = torch.full((1, 1), start, device=fading.device)
        seen = self._windows(heads._replace(queries=heads.queries[:, :, start:]), start, at, fading, state)
        if not start:
            return seen
        queries, keys, values = (x[:, :, :start] for x in heads[:3])
        before = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, dropout_p=heads.dropout, scale=heads.scale
        )
        return torch.cat([before, seen], dim=2)

    def _windows(self, heads: Heads, num_before: int, at: Tensor, fading: Tensor, state: State) -> Tensor:
        """What positions from the first token on mix, (B, H, N, d), a block of at most w of them together.

        `heads` are of these, with keys and values of the M memory rows before the text too. The token at index t, which
        stands at `at` + t (1 or B, 1), sees those, the eidetic tokens, tokens t - w + 1 to t, and fading rows
        t - 2w + 1 to t - w. In a block of Q positions the a-th sees of the Q + w - 1 tokens up to the block's last, and
        of as many fading rows w before them, those from a to a + w - 1.
        """
        w, num_rows, device = self.window, heads.queries.shape[2], fading.device
        size = min(w, num_rows)
        num_blocks = -(-num_rows // size)
        padding = num_blocks * size - num_rows
        fading = fading[:, : num_blocks * size + w - 1]
        rows = [state["recent"], fading]
        recent_at = torch.arange(1 - w, 0, device=device)
        fading_at = torch.arange(fading.shape[1], device=device) - (2 * w - 1)
        places = at + torch.cat([recent_at, fading_at])
        if self.num_eidetic:
            rows.append(state["eidetic"])
            old = torch.full((len(at), self.num_eidetic), num_before - 2 * w, device=device)
            places = torch.cat([places, old], dim=1)
        assert heads.project is not None
        projected = heads.project(torch.cat(rows, dim=1), places)
        seen = []
        for carried, own in zip(projected, (heads.keys, heads.values), strict=True):
            recent, faded, old = carried.split([w - 1, fading.shape[1], self.num_eidetic], dim=2)
            recent = F.pad(torch.cat([recent, own[:, :, num_before:]], dim=2), (0, 0, 0, padding))
            windows = [x.unfold(2, size + w - 1, size).transpose(3, 4) for x in (recent, faded)]
            always = torch.cat([own[:, :, :num_before], old], dim=2)[:, :, None].expand(-1, -1, num_blocks, -1, -1)
            seen.append(torch.cat([always, *windows], dim=3).transpose(1, 2).flatten(0, 1))  # (B C, H, K, d)
        queries = F.pad(heads.queries, (0, 0, 0, padding)).unflatten(2, (num_blocks, size))
        queries, (keys, values) = queries.transpose(1, 2).flatten(0, 1), seen
        mask = self._mask(num_blocks, size, num_before, state)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, dropout_p=heads.dropout, scale=heads.scale
        )
        return mixed.unflatten(0, (-1, num_blocks)).transpose(1, 2).flatten(2, 3)[:, :, :num_rows]

    def _mask(self, num_blocks: int, size: int, num_before: int, state: State) -> Tensor:
        """Which keys of its block a position sees, (B C, 1, Q, K)."""
        w, filled, device = self.window, state["filled"], state["filled"].device
        key = torch.arange(size + w - 1, device=device)
        ahead = key - torch.arange(size, device=device)[:, None]
        band = (ahead >= 0) & (ahead < w)  # (Q, Q + w - 1)
        index = key + size * torch.arange(num_blocks, device=device)[:, None]  # (C, Q + w - 1), from the first carried
        parts = [torch.ones(len(filled), num_blocks, size, num_before, dtype=torch.bool, device=device)]
        if self.num_eidetic:
            there = state["eidetic_innovations"] > 0
            parts.append(there[:, None, None].expand(-1, num_blocks, size, -1))
        for carried in (w - 1, 2 * w - 1):
            there = index >= carried - filled.clamp(max=carried)[:, None, None]  # (B, C, Q + w - 1)
            parts.append(band & there[:, :, None])
        return torch.cat(parts, dim=3).flatten(0, 1)[:, None]

    def _keep(self, rows: Tensor, innovations: Tensor, length: Tensor, state: State, segment: Segment) -> State:
        """The eidetic tokens: when a segment closes, the worst predicted of them and of those that leave the window.

        These are the `length` (B,) oldest of rows (B, w - 1 + N, D). Of equals the older stay. An innovation of 0 is
        that of no token.
        """
        rows, scores = torch.cat([state["eidetic"], rows], dim=1), state["eidetic_innovations"]
        if not segment.writes:
            return {"eidetic": state["eidetic"], "eidetic_innovations": scores}
        leaves = torch.arange(innovations.shape[1], device=rows.device) < length[:, None]
        best, order = torch.cat([scores, innovations * leaves], dim=1).sort(dim=1, descending=True, stable=True)
        best, order = best[:, : self.num_eidetic], order[:, : self.num_eidetic]
        return {"eidetic": take(rows, order).masked_fill((best <= 0)[..., None], 0), "eidetic_innovations": best}


class BMojoMemory(LayerwiseMemory):
    """Each layer attends by one softmax to the last w tokens, to w fading rows before them, and to eidetic tokens.

    Token t sees its layer's inputs at tokens t - w + 1 to t, the outputs of a state space (`StateSpace`) at tokens
    t - 2w + 1 to t - w, wherever segments begin and end, and of the full form E tokens more: those that the state
    predicted worst. Keys and values of all of them are the layer's own, its norm included (tied, as in the released
    layer), at rotary positions that run through segment edges; eidetic tokens stand 2w before the segment, whatever
    their age. Memory rows of others that stand before the text are seen by all after them; those behind it see what a
    token there would; neither enters the state.

    A layer's state: `recent` (B, w - 1, D) inputs, outside the gradient, and `fading` (B, 2w - 1, D) rows, both with
    the last token at the end and zeros before the first; `space` (B, G, n, D / G), in float32 at least; `filled` (B,)
    tokens in `fading`. The full form adds `innovations` (B, w - 1) of the recent, `eidetic` (B, E, D) inputs, outside
    the gradient, and `eidetic_innovations` (B, E), 0 where there is none. `fading` and `space` carry a gradient, by
    which the state space learns even where segments are shorter than the window.

    Deviations. The paper lets the eidetic memory grow and leaves open how a token is predicted from the state; here it
    is capped, the best predicted tokens go first, and the innovation is that of `StateSpace.forward`, which needs no
    training. It is renewed when a segment closes, by the tokens that have left the window by then.
    """

    Config = BMojoConfig
    needs_relative_positions = True
    runs_within = True

    def __init__(self, config: BMojoConfig, dimensions: Dimensions) -> None:
        super().__init__(config, dimensions)
        self.context_len = 2 * config.window
        self.is_cache = self.computes_attention = config.window > 0
        self.layers = nn.ModuleList(BMojoLayer(config, dimensions) for _ in range(dimensions.num_layers))
