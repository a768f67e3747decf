"""How likely texts are as continuations of others, and continuations written, read in one stream of any length.

Nothing is truncated: a context is read from its first token to its last, segment by segment, at constant memory.
Contexts that are asked about several times are read once.

Axes: B rows, T tokens of a segment, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import rmt_core
from pipelines.data.tokenise import Tokenizer
from pipelines.tasks.base import Part, device_of, logits_in_pieces, segments
from rmt_core import RecurrentModel, Sampling, Session
from rmt_core.state import State

_WRITTEN_AT_ONCE = 32  # tokens between looks whether a text is at an end

Tokens = Sequence[int]


class Asked(NamedTuple):
    """A text of at least one token, and what may follow it."""

    context: Tokens
    continuation: Tokens


class Score(NamedTuple):
    """What a continuation is worth."""

    log_likelihood: float  # nats, summed over its tokens
    is_greedy: bool  # each of its tokens is the likeliest at its place


@torch.inference_mode()
def score(model: RecurrentModel, asked: Sequence[Asked], batch_size: int = 8) -> list[Score]:
    """The score of each continuation, which does not depend on the others."""
    places: dict[tuple[int, ...], list[int]] = {}  # context -> which ask about it
    for number, one in enumerate(asked):
        if not len(one.context):
            raise ValueError("nothing predicts the first token of a text; give a context of at least one token")
        places.setdefault(tuple(one.context), []).append(number)
    found: dict[int, Score] = {}
    for contexts in _batches(sorted(places, key=len), batch_size):
        heads = [context[: _closed(len(context), model.segment_len)] for context in contexts]
        state = _read(model, heads)
        forks = [(row, number) for row, context in enumerate(contexts) for number in places[context]]
        for part in _batches(forks, batch_size):
            rows = [row for row, _ in part]
            tails = [
                Asked(asked[number].context[len(heads[row]) :], asked[number].continuation) for row, number in part
            ]
            scores = _scores(model, tails, rmt_core.state.select(state, torch.tensor(rows, device=device_of(model))))
            found |= dict(zip((number for _, number in part), scores, strict=True))
    return [found[number] for number in range(len(asked))]


def _closed(num_tokens: int, segment_len: int) -> int:
    """Tokens of the segments before the one whose last token read predicts the next token."""
    return (num_tokens - 1) // segment_len * segment_len


def _batches(items: Sequence, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _parts(model: RecurrentModel, texts: Sequence[Tokens]) -> Iterator[Part]:
    return segments([[np.asarray(text, dtype=np.int64)] for text in texts], model.segment_len, device_of(model))


def _read(model: RecurrentModel, texts: Sequence[Tokens]) -> State:
    """The states after texts of whole segments."""
    state, skimmer = model.init_state(len(texts)), rmt_core.Skimmer(model)
    for part in _parts(model, texts):
        state = skimmer.after(part.tokens, state, part.lengths)
    return state


def _scores(model: RecurrentModel, asked: Sequence[Asked], state: State) -> list[Score]:
    """Scores from the states that the texts so far have left, one a row."""
    texts = [[*one.context, *one.continuation] for one in asked]
    nats, greedy = np.zeros(len(asked)), np.ones(len(asked), dtype=bool)
    for part in _parts(model, [text[:-1] for text in texts]):
        out, state = model.step(part.tokens, state, part.lengths)
        rows, places, labels = _labels(asked, texts, part.start, part.start + part.tokens.shape[1])
        if not len(rows):
            continue
        hidden = out.hidden[
            torch.from_numpy(rows).to(out.hidden.device), torch.from_numpy(places).to(out.hidden.device)
        ]
        for piece, logits in logits_in_pieces(model, hidden):
            wanted = torch.from_numpy(labels[piece]).to(logits.device)
            np.add.at(nats, rows[piece], _log_probabilities(logits, wanted))
            wrong = (logits.argmax(-1) != wanted).cpu().numpy()
            greedy[rows[piece][wrong]] = False
    return [Score(float(total), bool(right)) for total, right in zip(nats, greedy, strict=True)]


def _labels(asked: Sequence[Asked], texts: Sequence[Tokens], start: int, stop: int) -> tuple[np.ndarray, ...]:
    """Tokens of continuations that tokens start .. stop-1 predict: rows, places behind `start`, labels."""
    found = [
        (row, place - start, text[place + 1])
        for row, (one, text) in enumerate(zip(asked, texts, strict=True))
        for place in range(max(start, len(one.context) - 1), min(stop, len(text) - 1))
    ]
    table = np.array(found, dtype=np.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def _log_probabilities(logits: Tensor, wanted: Tensor) -> np.ndarray:
    """Of wanted (n,) tokens by logits (n, V): (n,) float64."""
    return logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double().cpu().numpy()


class Writing(NamedTuple):
    """How continuations are written."""

    max_new_tokens: int
    stops: Sequence[str] = ()  # texts before which writing ends
    sampling: Sampling = Sampling()


def write(
    model: RecurrentModel, tokenizer: Tokenizer, contexts: Sequence[Tokens], writing: Writing, batch_size: int = 8
) -> list[str]:
    """What follows each context, up to a stop, the tokenizer's end token or so many tokens."""
    found = []
    for batch in _batches(range(len(contexts)), batch_size):
        found += _write(model, tokenizer, {number: contexts[number] for number in batch}, writing)
    return found


def _write(model: RecurrentModel, tokenizer: Tokenizer, contexts: dict[int, Tokens], writing: Writing) -> list[str]:
    """Of one batch; the numbers of the contexts seed what is drawn."""
    ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    written: dict[int, list[int]] = {number: [] for number in contexts}
    alive, session = list(contexts), rmt_core.open_session(model, len(contexts))
    prompts: list[Tokens] = list(contexts.values())
    num_written = 0
    while alive and num_written < writing.max_new_tokens:
        size = min(_WRITTEN_AT_ONCE, writing.max_new_tokens - num_written)
        seeds = [_seed(number, num_written) for number in alive]
        made = rmt_core.generate(
            model, prompts, size, session=session, sampling=writing.sampling, stop_tokens=ends, seeds=seeds
        )
        num_written += size
        going = []
        for row, number in enumerate(alive):
            written[number] += made.tokens[row]
            if made.finish_reasons[row] == "length" and not _has_stop(tokenizer.decode(written[number]), writing.stops):
                going.append(row)
        alive, prompts = [alive[row] for row in going], [[] for _ in going]
        session = _rows(made.session, going)
    return [_cut(tokenizer.decode(tokens), writing.stops) for tokens in written.values()]


def _rows(session: Session, rows: Sequence[int]) -> Session:
    """The session of some rows alone."""
    state = rmt_core.state.select(session.state, rows)
    return Session(state, *(part[list(rows)] for part in session[1:]))


def _seed(number: int, num_written: int) -> int:
    return int(np.random.SeedSequence((number, num_written)).generate_state(1)[0])


def _has_stop(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops)


def _cut(text: str, stops: Sequence[str]) -> str:
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
