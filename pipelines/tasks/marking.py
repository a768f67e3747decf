"""Marks in [0, 1] for what a model wrote freely, by one expected text.

They are those of LongBench (Bai et al. 2023, arXiv:2308.14508, and its published code). Deviations: answers to
questions are marked by their first line for every data set; Chinese is cut into characters, not into words; ROUGE-L is
counted by rouge-score; edit similarity is difflib's.
"""

import difflib
import re
from collections import Counter
from collections.abc import Sequence


def first_line(written: str) -> str:
    """The first line that is not empty."""
    return written.strip().split("\n", 1)[0]


def token_f1(written: str, expected: str) -> float:
    """Harmonic mean of precision and recall of words, in lower case without articles and punctuation (SQuAD)."""
    return _f1(_words(first_line(written)), _words(expected))


def character_f1(written: str, expected: str) -> float:
    """The same of characters, for texts without spaces between words."""
    return _f1(_characters(first_line(written)), _characters(expected))


def exact_match(written: str, expected: str) -> float:
    """Whether the words are the same."""
    return float(_words(first_line(written)) == _words(expected))


def rouge_l(written: str, expected: str) -> float:
    """F1 of the longest common subsequence of words. Needs rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"]).score(expected, written)["rougeL"].fmeasure)


def rouge_l_of_line(written: str, expected: str) -> float:
    """The same of the first line."""
    return rouge_l(first_line(written), expected)


def character_rouge_l(written: str, expected: str) -> float:
    """`rouge_l` of characters. Needs rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"], tokenizer=_Characters()).score(expected, written)["rougeL"].fmeasure)


def class_share(written: str, expected: str, classes: Sequence[str]) -> float:
    """1 over the number of classes named, where the right one is among them; none is named by being part of it."""
    line = first_line(written)
    named = [one for one in classes if one in line and (one == expected or one not in expected)]
    return 1 / len(named) if expected in named else 0.0


def number_share(written: str, expected: str) -> float:
    """The share of the numbers named that are the first one expected."""
    found, wanted = (re.findall(r"\d+", text) for text in (written, expected))
    return found.count(wanted[0]) / len(found) if found and wanted else 0.0


def edit_similarity(written: str, expected: str) -> float:
    """How much the first line of code is like the expected one; 0 where every line has a comment or a backtick."""
    lines = written.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return difflib.SequenceMatcher(None, line, expected, autojunk=False).ratio()


def _f1(written: Sequence[str], expected: Sequence[str]) -> float:
    ours, theirs = Counter(written), Counter(expected)
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0  # of two empty texts too, as published


def _words(text: str) -> list[str]:
    kept = "".join(char for char in text.lower() if char.isalnum() or char.isspace())
    return [word for word in kept.split() if word not in ("a", "an", "the")]


class _Characters:
    """As rouge-score wants a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return _characters(text)


def _characters(text: str) -> list[str]:
    return [char for char in text.lower() if char.isalnum()]
