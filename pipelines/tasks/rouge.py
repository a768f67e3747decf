"""ROUGE of summaries against references, beside what needs no model: the lead and random sentences.

A summary's score is that of the reference that it agrees with best, for each measure alone. Intervals are bootstrapped
over documents. ROUGE: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004), as rouge-score counts it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

MEASURES = ("rouge1", "rouge2", "rougeL")
LEAD, RANDOM = "lead", "random sentences"
_RESAMPLES = 10_000
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+")


class Pair(NamedTuple):
    """A document and what people wrote about it."""

    doc_id: str
    text: str
    references: list[str]


class Score(NamedTuple):
    """A mean over documents with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def scores(pairs: Sequence[Pair], summaries: Mapping[str, str]) -> np.ndarray:
    """F1 of each measure, (documents, measures); of a document without summary 0."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(MEASURES), use_stemmer=True)
    found = np.zeros((len(pairs), len(MEASURES)))
    for n, pair in enumerate(pairs):
        each = [scorer.score(reference, summaries.get(pair.doc_id) or "") for reference in pair.references]
        found[n] = [max(score[measure].fmeasure for score in each) for measure in MEASURES]
    return found


def lead(pair: Pair, num_words: int) -> str:
    """The first words of a document."""
    return " ".join(pair.text.split()[:num_words])


def random_sentences(pair: Pair, num_words: int, seed: int) -> str:
    """Sentences of a document in their order, of about so many words."""
    sentences = [" ".join(sentence.split()) for sentence in _SENTENCE_END.split(pair.text) if sentence.strip()]
    order = np.random.default_rng(seed).permutation(len(sentences))
    chosen, length = [], 0
    for index in order:
        if length >= num_words:
            break
        chosen.append(int(index))
        length += len(sentences[index].split())
    return " ".join(sentences[index] for index in sorted(chosen))


def reference_words(pair: Pair) -> int:
    """Words of a reference on average."""
    return round(float(np.mean([len(reference.split()) for reference in pair.references])))


def mean(values: np.ndarray, seed: int = 0) -> Score:
    """Of values (documents,), with a bootstrapped interval."""
    draws = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return Score(float(values.mean()), float(low), float(high))
