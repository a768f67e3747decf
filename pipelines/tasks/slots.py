"""What each memory token or slot holds over time: how long it keeps what it wrote when a fact was read, and whether the
fact can be read from it alone.

Texts begin with their facts. Three things are recorded behind every segment, or, of long texts, behind some of them
that are evenly spaced, up to the one in which an answer stands:

    kept      cosine similarity of a token to itself right behind the fact
    moved     how far the segment moved it, as a share of its own length before
    read-out  accuracy of a linear classifier of the fact, given this token alone, or all of them

A read-out is fitted by ridge regression to other texts' tokens at the same distance from the fact: each quarter of the
texts is classified by what was fitted to the other three. A fact that those do not hold cannot be read: such texts are
counted, as wrong, and where they are more than half of all there is no read-out.

Axes: B texts, M memory tokens or slots, D width, K recorded segments, P segments of read-outs, C different facts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.config import InputError
from pipelines.data.tokenise import Tokenizer
from pipelines.tasks import placed
from pipelines.tasks.base import batch_sizes, device_of, segments
from pipelines.tasks.samples import Sample, Scene, Wanted
from pipelines.tasks.texts import Background
from rmt_core import RecurrentModel

KINDS = ("rmt", "memformer")  # whose state is one vector a token or slot

_MAX_COLUMNS = 256  # of a heat map
_NUM_FOLDS = 4
_RIDGE = 1.0  # on tokens with mean 0 and variance 1


class Texts(NamedTuple):
    """Texts of one task that begin with their facts."""

    samples: list[Sample]
    facts: np.ndarray  # (B,) int64: which answer the fact is, of C
    num_fact_tokens: int  # the most that any fact takes


class Trace(NamedTuple):
    """What was recorded; segment 0 is the one in which the facts end."""

    at: np.ndarray  # (K,) segments since the fact
    kept: np.ndarray  # (B, K, M)
    moved: np.ndarray  # (B, K, M)
    probed_at: np.ndarray  # (P,) segments since the fact: 0, 1, 2, 4, 8, ...
    states: Tensor  # (B, P, M, D) float64


class ReadOut(NamedTuple):
    """Shares of texts of which the fact was read."""

    tokens: np.ndarray  # (P, M): from each token alone
    together: np.ndarray  # (P,): from all of them
    chance: float  # of the fact that is most frequent
    num_unseen: int  # texts whose fact none of the others has, that read-outs are fitted to


def check(model: RecurrentModel) -> None:
    """InputError for a memory that is not rows of vectors."""
    kinds = [settings["kind"] for settings in model.config.memory]
    state = model.init_state(1)
    if len(kinds) != 1 or kinds[0] not in KINDS or not isinstance(state, Tensor) or not state.numel():
        raise InputError(
            f"slots: memory {' with '.join(kinds)} is not one vector a token or slot; use {' or '.join(KINDS)} alone, "
            "without past memories"
        )


def make_texts(
    task: str, tokenizer: Tokenizer, background: Background, wanted: Wanted, num: int, seed: int = 0
) -> Texts:
    """`num` texts of the wanted length with the facts at their start. InputError where the task cannot."""
    scene = Scene(tokenizer, background)
    samples, later = (
        [placed.draw(task, scene, wanted._replace(depth=depth), seed, i) for i in range(num)] for depth in (0.0, 1.0)
    )
    answers = [tuple(sample.answers[0].tokens.tolist()) for sample in samples]
    known = {answer: number for number, answer in enumerate(sorted(set(answers)))}
    most = max(len(placed.facts_of(first.stream, second.stream)) for first, second in zip(samples, later, strict=True))
    return Texts(samples, np.array([known[answer] for answer in answers]), most)


def check_facts(texts: Texts) -> None:
    """InputError where facts have no end, or most are those of a single text, so that no read-out could be right."""
    if not texts.num_fact_tokens:
        raise InputError("slots: the facts have one place only; use a longer --length")
    num, num_unseen = len(texts.facts), int(_unseen(texts.facts).sum())
    if 2 * num_unseen > num:
        raise InputError(
            f"slots: of {num} texts {num_unseen} have a fact that none of the others has, which cannot be read out; "
            "use more --num-texts, or a --task that asks for few different answers, such as detect"
        )


# --- recording --------------------------------------------------------------------------------------


@torch.inference_mode()
def record(model: RecurrentModel, texts: Texts, batch_size: int) -> Trace:
    """Reads all texts, so many at once."""
    size = model.segment_len
    first = (texts.num_fact_tokens - 1) // size  # the segment in which the longest fact ends
    num = min(sample.answers[0].at for sample in texts.samples) // size - first  # segments since then, it among them
    if num < 2:
        raise InputError(
            f"slots: no whole segment of {size} tokens lies between the facts and the answer; use a longer --length"
        )
    at = np.unique(np.linspace(0, num - 1, min(num, _MAX_COLUMNS)).round().astype(np.int64))
    probed_at = np.array([0, *(2**i for i in range((num - 1).bit_length()) if 2**i < num)])
    traces, start = [], 0
    for rows in batch_sizes(len(texts.samples), batch_size):
        batch = texts.samples[start : start + rows]
        traces.append(_record_batch(model, batch, first, at, probed_at))
        start += rows
    kept, moved, states = (torch.cat(parts) for parts in zip(*traces, strict=True))
    return Trace(at, kept.numpy(), moved.numpy(), probed_at, states)


def _record_batch(
    model: RecurrentModel, samples: Sequence[Sample], first: int, at: np.ndarray, probed_at: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """kept (B, K, M), moved (B, K, M) and states (B, P, M, D), on the CPU in float64."""
    recorded, probed = set(at.tolist()), set(probed_at.tolist())
    kept, moved, states = [], [], []
    before = written = model.init_state(len(samples)).double()
    for since, state in _states(model, samples, first):
        if since > at[-1]:
            break
        if since == 0:
            written = state  # right behind the fact
        if since in recorded:
            kept.append(torch.cosine_similarity(state, written, dim=-1))
            moved.append((state - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-12))
        if since in probed:
            states.append(state)
        before = state
    kept_, moved_, states_ = (torch.stack(parts, 1).cpu() for parts in (kept, moved, states))
    return kept_, moved_, states_


def _states(model: RecurrentModel, samples: Sequence[Sample], first: int) -> Iterator[tuple[int, Tensor]]:
    """The state (B, M, D) float64 behind every segment, and how many segments that is since number `first`."""
    state = model.init_state(len(samples))
    for index, part in enumerate(
        segments([sample.stream() for sample in samples], model.segment_len, device_of(model))
    ):
        _, state = model.step(part.tokens, state, part.lengths)
        yield index - first, state.double()


# --- reading out ------------------------------------------------------------------------------------


def read_out(trace: Trace, facts: np.ndarray) -> ReadOut:
    """The read-outs at each probed distance. facts (B,) int64."""
    states = trace.states
    num_probes, num_tokens = states.shape[1:3]
    alone = [[accuracy(states[:, p, m], facts) for m in range(num_tokens)] for p in range(num_probes)]
    together = [accuracy(states[:, p].flatten(1), facts) for p in range(num_probes)]
    chance = float(np.bincount(facts).max() / len(facts))
    return ReadOut(np.array(alone), np.array(together), chance, int(_unseen(facts).sum()))


def accuracy(features: Tensor, labels: np.ndarray) -> float:
    """The share of labels (B,) that a linear read-out of features (B, F) has right, none of its own texts seen."""
    right = 0
    for test in _folds(len(labels)):
        chosen = _classifier(features[~test], torch.from_numpy(labels[~test]))(features[test])
        right += int((chosen.numpy() == labels[test]).sum())
    return right / len(labels)


def _folds(num: int) -> Iterator[np.ndarray]:
    """Which of so many texts are classified by what is fitted to the others, (B,) bool each."""
    return (np.arange(num) % _NUM_FOLDS == fold for fold in range(_NUM_FOLDS))


def _unseen(facts: np.ndarray) -> np.ndarray:
    """Which texts (B,) have a fact that is in none that their read-out is fitted to, (B,) bool."""
    found = np.zeros(len(facts), dtype=bool)
    for test in _folds(len(facts)):
        found |= test & ~np.isin(facts, facts[~test])
    return found


def _classifier(features: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Ridge regression of one-hot labels on standardised features (N, F), in its dual form: N equations."""
    mean, std = features.mean(0), features.std(0).clamp_min(1e-12)
    x = (features - mean) / std
    targets = torch.nn.functional.one_hot(labels, int(labels.max()) + 1).to(x.dtype)
    offset = targets.mean(0)
    weights = x.T @ torch.linalg.solve(x @ x.T + _RIDGE * torch.eye(len(x), dtype=x.dtype), targets - offset)  # (F, C)
    return lambda others: ((others - mean) / std @ weights + offset).argmax(-1)
