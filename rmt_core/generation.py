"""Reading prompts and writing text, past a segment's end, at constant memory.

A segment is closed, which updates the memory, by one `step` over it when it is full: exactly what training does. Until
then its tokens are open: the memory is read, never written, and their keys and values are kept so that a further token
costs one row. Rows of a batch may have any lengths.

Axes: B rows, N tokens of a prompt, T tokens of a segment, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import state as states
from .open_segments import OpenSegments
from .recurrent import RecurrentModel
from .state import State


class Session(NamedTuple):
    """What a reader knows after the tokens so far; one row a document."""

    state: State  # after the closed segments
    tokens: Tensor  # (B, T) int64, the open segment's tokens, padding behind them
    lengths: Tensor  # (B,) int64, how many are open, 0 to T - 1
    hidden: Tensor  # (B, D) at the last token read: its head gives the next token's logits
    num_read: Tensor  # (B,) int64, all tokens read


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the likeliest; `top_p` keeps the fewest tokens of that mass."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1]")


class Generation(NamedTuple):
    """What was written."""

    tokens: list[list[int]]  # a row's new tokens, without the stop token
    finish_reasons: list[str]  # "stop": a stop token came; "length": max_new_tokens were written
    session: Session  # after all that was written


def open_session(model: RecurrentModel, batch_size: int) -> Session:
    """A reader that has read nothing."""
    if not model.sees_segments_alone:
        raise ValueError("full attention has no sessions; write with FullContext.write")
    weight = model.backbone.lm.get_input_embeddings().weight
    nothing = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
    return Session(
        state=states.detach(model.init_state(batch_size)),
        tokens=nothing[:, None].repeat(1, model.segment_len),
        lengths=nothing,
        hidden=weight.new_zeros(batch_size, model.backbone.dimensions.width),
        num_read=nothing,
    )


@torch.no_grad()
def read(model: RecurrentModel, session: Session, tokens: Tensor, lengths: Tensor | None = None) -> Session:
    """The session after further tokens (B, N) int64, of which each row has `lengths` (B,) real ones."""
    return _Decoder(model, session).read(tokens, lengths).session()


@torch.no_grad()
def generate(
    model: RecurrentModel,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    *,
    session: Session | None = None,
    sampling: Sampling = Sampling(),
    stop_tokens: Sequence[int] = (),
    seeds: Sequence[int] | None = None,
) -> Generation:
    """Continue each prompt by up to `max_new_tokens` tokens.

    A row's result depends on its prompt, session and seed alone, not on the rows beside it, up to rounding: in half
    precision that can tip the choice between two tokens. `seeds` (one a row, default 0, 1, ...: the same at every
    call) matter where the temperature is above 0. Without a session each row starts a document and its prompt must
    hold a token.
    """
    rows = [torch.as_tensor(prompt, dtype=torch.long) for prompt in prompts]
    if not rows:
        raise ValueError("generate needs at least one prompt")
    if any(row.dim() != 1 for row in rows):
        raise ValueError(f"a prompt has shape {tuple(rows[0].shape)}; give a list of prompts, each a list of tokens")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    session = open_session(model, len(rows)) if session is None else session
    if len(session.tokens) != len(rows):
        raise ValueError(f"{len(rows)} prompts for a session of {len(session.tokens)} rows; give one a row")
    device = session.tokens.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    if bool((session.num_read + lengths == 0).any()):
        raise ValueError("an empty prompt has no next token; give at least one token or a session that has read some")
    decoder = _Decoder(model, session)
    if int(lengths.max()):
        decoder.read(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), lengths)
    seeds = range(len(rows)) if seeds is None else seeds
    if len(seeds) != len(rows):
        raise ValueError(f"{len(seeds)} seeds for {len(rows)} prompts; give one a row")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    written: list[list[int]] = [[] for _ in rows]
    reasons = ["length"] * len(rows)
    alive = torch.ones(len(rows), dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        chosen = sample(model.backbone.head(decoder.hidden), sampling, generators)
        for i in alive.nonzero().flatten().tolist():
            if int(chosen[i]) in stop_tokens:
                alive[i], reasons[i] = False, "stop"
            else:
                written[i].append(int(chosen[i]))
        if not bool(alive.any()):
            break
        decoder.append(chosen.to(device), alive)
    return Generation(written, reasons, decoder.session())


def sample(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """One token a row from logits (B, V): (B,) int64 on the CPU. Ties of a greedy choice go to the lowest token."""
    if sampling.temperature == 0:
        return logits.argmax(-1).cpu()
    wide = logits.double().cpu()
    wide = wide - wide.amax(-1, keepdim=True)  # before the division: the likeliest stays 0 at any temperature
    probabilities = (wide / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # the mass before a token is enough without it
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(beyond, 0))
    drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators, strict=True)]
    return torch.cat(drawn)


class _Decoder:
    """A session in motion: the open segment's keys and values are made when a token is first appended."""

    def __init__(self, model: RecurrentModel, session: Session) -> None:
        if session.tokens.shape[1] != model.segment_len:
            raise ValueError(
                f"the session has segments of {session.tokens.shape[1]} tokens, the model of {model.segment_len}; open "
                "one for this model"
            )
        self.model = model
        self.state, self.tokens, self.lengths, self.hidden, self.num_read = session
        self.tokens = self.tokens.clone()  # edited in place below; the caller's session stays as it was
        self.within = self.state  # as it runs within the open segment, of memories that have such a state
        self.open_segments = OpenSegments(model, len(self.lengths))
        self.stale = torch.ones_like(self.lengths, dtype=torch.bool)  # rows whose keys and values are not there

    def session(self) -> Session:
        return Session(self.state, self.tokens.clone(), self.lengths, self.hidden, self.num_read)

    def read(self, tokens: Tensor, lengths: Tensor | None = None) -> "_Decoder":
        """Append tokens (B, N), closing segments as they fill; then `hidden` is that of the last token."""
        left = torch.full_like(self.lengths, tokens.shape[1]) if lengths is None else lengths.clone()
        self.num_read = self.num_read + left
        self.stale |= left > 0
        done = torch.zeros_like(left)
        touched = left > 0
        while bool((left > 0).any()):
            count = torch.minimum(left, self.model.segment_len - self.lengths)
            at = torch.arange(self.model.segment_len, device=tokens.device)
            fresh = (at >= self.lengths[:, None]) & (at < (self.lengths + count)[:, None])  # (B, T)
            source = (at - self.lengths[:, None] + done[:, None]).clamp(0, tokens.shape[1] - 1)
            self.tokens = torch.where(fresh, tokens.gather(1, source), self.tokens)
            self.lengths, left, done = self.lengths + count, left - count, done + count
            self._close_full()
        still_open = (touched & (self.lengths > 0)).nonzero().flatten()
        if len(still_open):
            self._open(still_open)
        return self

    def append(self, tokens: Tensor, alive: Tensor) -> None:
        """One more token (B,) for the rows that are `alive` (B,); `hidden` becomes that of the token."""
        rows = alive.nonzero().flatten()
        full = self.lengths[rows] == self.model.segment_len - 1  # these close at once: no need to run them before
        stale = self.stale[rows]
        self.tokens[rows, self.lengths[rows]] = tokens[rows]
        if len(extended := rows[~full & ~stale]):
            self._extend(extended)
        self.lengths = self.lengths + alive
        self.num_read = self.num_read + alive
        if len(opened := rows[~full & stale]):
            self._open(opened)
        self._close_full()

    def _close_full(self) -> None:
        """One step over the segments that are full."""
        rows = (self.lengths == self.model.segment_len).nonzero().flatten()
        if not len(rows):
            return
        out, state = self.model.step(self.tokens[rows], states.select(self.state, rows))
        self.state = states.place(self.state, rows, state)
        self.hidden = self.hidden.index_copy(0, rows, out.hidden[:, -1])
        self.lengths = self.lengths.index_fill(0, rows, 0)
        self.stale[rows] = True

    def _open(self, rows: Tensor) -> None:
        """Run the open tokens of some rows, at least one each, keeping keys and values."""
        lengths = self.lengths[rows]
        self.stale[rows] = False
        hidden, within = self.open_segments.open(
            rows, self.tokens[rows, : int(lengths.max())], lengths, states.select(self.state, rows)
        )
        self._keep_within(rows, within)
        self.hidden = self.hidden.index_copy(0, rows, hidden)

    def _extend(self, rows: Tensor) -> None:
        """Run one token of some rows, already put at the end of their open tokens."""
        lengths = self.lengths[rows]
        state = self.within if self.model.memory.runs_within else self.state
        hidden, within = self.open_segments.extend(
            rows, self.tokens[rows, lengths], lengths, states.select(state, rows)
        )
        self._keep_within(rows, within)
        self.hidden = self.hidden.index_copy(0, rows, hidden)

    def _keep_within(self, rows: Tensor, within: State) -> None:
        if self.model.memory.runs_within:
            self.within = states.place(self.within, rows, within)
