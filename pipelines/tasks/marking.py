"""Marks in [0, 1] for what a model wrote freely, by one expected text.

They are those of LongBench (Bai et al. 2023, arXiv:2308.14508, and its published code) and of SCROLLS (Shaham et al.
2022, arXiv:2201.03533), which have F1 of words from SQuAD. Deviations: Chinese is cut into characters, not into words,
and loses all punctuation that Unicode has, not that of a list; ROUGE is counted by rouge-score, as SCROLLS counts it;
edit similarity is difflib's.
"""

import difflib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def first_line(written: str) -> str:
    """The first line that is not empty."""
    return written.strip().split("\n", 1)[0]


def token_f1(written: str, expected: str) -> float:
    """Harmonic mean of precision and recall of words, in lower case without articles and ASCII's punctuation."""
    return _f1(_words(written), _words(expected))


def character_f1(written: str, expected: str) -> float:
    """The same of characters without blanks and punctuation, for texts without spaces between words."""
    return _f1(_characters(written), _characters(expected))


def exact_match(written: str, expected: str) -> float:
    """Whether the words of `token_f1` are the same, in their order."""
    return float(_words(written) == _words(expected))


def character_exact_match(written: str, expected: str) -> float:
    """Whether the characters of `character_f1` are the same, in their order."""
    return float(_characters(written) == _characters(expected))


def rouge_1(written: str, expected: str) -> float:
    """F1 of words, which are runs of ASCII's letters and digits in lower case. This and the others need rouge-score."""
    return _rouge("rouge1", written, expected)


def rouge_2(written: str, expected: str) -> float:
    """F1 of pairs of words that follow one another."""
    return _rouge("rouge2", written, expected)


def rouge_l(written: str, expected: str) -> float:
    """F1 of the longest common subsequence of words."""
    return _rouge("rougeL", written, expected)


def character_rouge_l(written: str, expected: str) -> float:
    """`rouge_l` of the characters of `character_f1`."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"], tokenizer=_Characters()).score(expected, written)["rougeL"].fmeasure)


def class_share(written: str, expected: str, classes: Sequence[str]) -> float:
    """1 over the number of classes named, where the right one is among them; none is named by being part of it."""
    named = [one for one in classes if one in written and (one == expected or one not in expected)]
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


def _rouge(measure: str, written: str, expected: str) -> float:
    """Without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer([measure]).score(expected, written)[measure].fmeasure)


def _f1(written: Sequence[str], expected: Sequence[str]) -> float:
    ours, theirs = Counter(written), Counter(expected)
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0  # of two empty texts too, as published


def _words(text: str) -> list[str]:
    return re.sub(r"\b(?:a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split()


class _Characters:
    """As rouge-score wants a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return _characters(text)


def _characters(text: str) -> list[str]:
    return [char for char in text.lower() if not char.isspace() and not _is_punctuation(char)]


def _is_punctuation(char: str) -> bool:
    """In Unicode, or in ASCII, where `+` and `~` are some, in their wide forms too."""
    return unicodedata.category(char)[0] == "P" or unicodedata.normalize("NFKC", char) in string.punctuation
