"""Recall: one fact somewhere in a long text, asked for at its end.

The text is prose from a book, or noise for tiny models. The fact is a sentence of its own, `The secret key is K.`, with
one of 16 letters; the text ends with the sentence's beginning, and what must follow is the letter. A model that forgot
can do no better than guess among the letters. The scheme is the "memorise" and "detect and memorise" tasks of
Bulatov et al. 2023 (arXiv:2304.11062, section 4) put into real text, as in BABILong (arXiv:2406.10149).

Axes: n tokens of a text, a tokens of an answer.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

LETTERS = "ABCDEFGHIJKLMNOP"
FACT = "\nThe secret key is {}.\n"
QUESTION = "\nThe secret key is"
ANSWER = " {}"
NOISE = "abcdefghijklmnopqrstuvwxyz "

Background = Callable[[int, np.random.Generator], np.ndarray]  # (num tokens, generator) -> (num tokens,) int32


class Encodes(Protocol):
    """The part of a tokenizer that a task needs."""

    def encode(self, text: str) -> np.ndarray: ...


class RecallSample(NamedTuple):
    """A text that ends in a question, and its answer."""

    tokens: np.ndarray  # (n,) int32: the text with the fact in it, and the question at its end
    answer: np.ndarray  # (a,) int32: what must follow
    num_choices: int  # chance is 1 / num_choices
    fact_at: int  # the token at which the fact begins


def prose(tokens: np.ndarray) -> Background:
    """Excerpts of a text (N,), at random places; texts longer than it start over at its beginning."""
    if not len(tokens):
        raise ValueError("prose needs a text of at least one token")

    def draw(num: int, generator: np.random.Generator) -> np.ndarray:
        start = int(generator.integers(len(tokens)))
        return tokens[(start + np.arange(num)) % len(tokens)].astype(np.int32)

    return draw


def noise(tokenizer: Encodes) -> Background:
    """Lower-case letters and spaces, each equally likely."""
    alphabet = np.unique(np.concatenate([tokenizer.encode(letter) for letter in NOISE]))

    def draw(num: int, generator: np.random.Generator) -> np.ndarray:
        return generator.choice(alphabet, num).astype(np.int32)

    return draw


def shortest_text(tokenizer: Encodes) -> int:
    """The fewest tokens that hold a fact and the question."""
    return max(len(tokenizer.encode(FACT.format(letter))) for letter in LETTERS) + len(tokenizer.encode(QUESTION))


def longest_answer(tokenizer: Encodes) -> int:
    """Tokens of the longest answer."""
    return max(len(tokenizer.encode(ANSWER.format(letter))) for letter in LETTERS)


def samples(
    tokenizer: Encodes, background: Background, *, length: int, num: int, seed: int, latest: int | None = None
) -> Iterator[RecallSample]:
    """`num` texts of `length` tokens each, question included, the same ones for the same seed.

    The fact stands at a uniformly random place before the question, whose beginning it leaves free; with `latest` it
    begins before token `latest`. Raises ValueError where `length` cannot hold fact and question.
    """
    facts = [tokenizer.encode(FACT.format(letter)) for letter in LETTERS]
    answers = [tokenizer.encode(ANSWER.format(letter)) for letter in LETTERS]
    question = tokenizer.encode(QUESTION)
    need = shortest_text(tokenizer)
    if length < need:
        raise ValueError(f"recall needs texts of at least {need} tokens for fact and question; length is {length}")
    for index in range(num):
        generator = np.random.default_rng((seed, index))
        letter = int(generator.integers(len(LETTERS)))
        fact = facts[letter]
        text = background(length - len(question) - len(fact), generator)
        end = len(text) + 1 if latest is None else min(len(text) + 1, max(latest, 1))
        at = int(generator.integers(end))
        tokens = np.concatenate([text[:at], fact, text[at:], question]).astype(np.int32)
        yield RecallSample(tokens, answers[letter], len(LETTERS), at)
