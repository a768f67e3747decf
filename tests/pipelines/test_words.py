"""Words that are remembered give the ids that the `tokenizers` library gives, or leave a text to it."""

import json
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st

from pipelines.data import words
from pipelines.data.books import embedded_books
from pipelines.data.tokenise import JsonTokenizer

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern: str, **changes: Any) -> dict[str, Any]:
    first = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False, **changes}
    return {"type": "Sequence", "pretokenizers": [first, {**GPT2, "use_regex": False}]}


PRE_TOKENIZERS = {"gpt2": GPT2, "llama3": split(HEAD + r"\p{N}{1,3}" + TAIL), "qwen2": split(HEAD + r"\p{N}" + TAIL)}
BOOK = next(iter(embedded_books("heldout").values()))[:200_000]


def content_of(pre_tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json of 1,000 tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(BOOK.splitlines(keepends=True), trainer)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return {**json.loads(tokenizer.to_str()), "pre_tokenizer": pre_tokenizer}


class Both:
    """The library's tokenizer, and the words of it."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.library = tokenizers.Tokenizer.from_str(json.dumps(content))
        found = words.words_of(content, self.library)
        assert found is not None
        self.words = found

    def check(self, text: str) -> bool:
        """Whether the words know the text; then their ids are the library's."""
        ids = self.words.encode(text)
        if ids is None:
            return False
        assert ids.dtype == np.int32
        assert ids.tolist() == self.library.encode(text, add_special_tokens=False).ids, repr(text)
        return True


@pytest.fixture(scope="module", params=PRE_TOKENIZERS)
def both(request: pytest.FixtureRequest) -> Both:
    return Both(content_of(PRE_TOKENIZERS[request.param]))


def test_a_book_has_the_librarys_ids(both: Both) -> None:
    assert both.check(BOOK)
    assert both.check(BOOK), "with its words known"


def test_a_thread_beside_others_has_the_same_ids(both: Both) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(both.check, BOOK).result()


PARTS = ["'s", "'LL", "'", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "a", "Don", "\u00e9", "e\u0301", "\u0416"]
PARTS += [
    "12",
    "1234",
    "\u00bd",
    "\u2167",
    "\u4f60\u597d",
    ".",
    "...",
    "\u2014",
    "\u017f",
    "\u212a",
    "\0",
    "\x1c",
    "\x85",
]
PARTS += ["\u200b", "\ufeff", "\U0001f40b", "\U0001d7d8", "<eos", ">", "\u0e01\u0e33", "\u0301"]


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(text=st.lists(st.sampled_from(PARTS), max_size=12).map("".join) | st.text(max_size=20))
def test_any_text_has_the_librarys_ids_or_is_left_to_it(both: Both, text: str) -> None:
    both.check(text)


def characters(step: int) -> Iterator[str]:
    return (chr(code) for code in range(0, sys.maxunicode + 1, step) if not 0xD800 <= code < 0xE000)


@pytest.mark.parametrize("step", [97, pytest.param(7, marks=pytest.mark.long)])
def test_every_character_among_others_has_the_librarys_ids(both: Both, step: int) -> None:
    """In blocks, so that one character that is left to the library takes only its neighbours along."""
    every = list(characters(step))
    both.words.encode("".join(every))  # the engines are asked once, not for every block
    texts = ["".join(f"a{c}1 {c}  {c}'s{c}\n {c}{c}" for c in every[i : i + 40]) for i in range(0, len(every), 40)]
    known = sum(map(both.check, texts))
    assert known > 0.9 * len(texts)


def test_names_of_tokens_are_left_to_the_library(both: Both) -> None:
    assert both.words.encode("before <eos> after") is None
    assert both.words.encode("before <eos after") is not None
    ids = JsonTokenizer(both.content, "<eos>").encode_batch(["plain", "one <eos> two", "plain"])
    library = both.library.encode_batch(["plain", "one <eos> two", "plain"], add_special_tokens=False)
    assert [found.tolist() for found in ids] == [encoding.ids for encoding in library]


def test_characters_that_the_engines_class_otherwise_are_left_to_the_library(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "_CLASSES", (r"[^q]", r"q"))
    assert words._alike("pq") == {"p", "q"}

    class Other:
        """An engine for which q is in no class."""

        @staticmethod
        def fullmatch(pattern: str, char: str) -> bool:
            return char != "q" and pattern == r"[^q]"

    monkeypatch.setattr(words, "regex", Other)
    assert words._alike("pq") == {"p"}
    monkeypatch.setattr(both.words, "_odd", {"w"})
    monkeypatch.setattr(both.words, "_alike", set("helo"))
    assert both.words.encode("hello") is not None
    assert both.words.encode("how") is None


def test_what_is_remembered_is_bounded(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Both(both.content)
    monkeypatch.setattr(words, "_MOST_WORDS", 10)
    assert fresh.check(BOOK[:5000])
    assert fresh.check("x" * 1000 + " " * 500)
    assert len(fresh.words._ids) == 10


def test_it_travels_with_what_it_knows(both: Both) -> None:
    twin = pickle.loads(pickle.dumps(both.words))
    assert np.array_equal(twin.encode(BOOK[:1000] + " qzx"), both.words.encode(BOOK[:1000] + " qzx"))


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": None},
        {"pre_tokenizer": {**GPT2, "add_prefix_space": True}},
        {"pre_tokenizer": {**GPT2, "use_regex": False}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": split(r"\w+")},
        {"pre_tokenizer": split(HEAD + r"\p{N}" + TAIL, behavior="Removed")},
        {"pre_tokenizer": split(HEAD + r"\p{N}" + TAIL, invert=True)},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2]}},
        {"normalizer": {"type": "NFC"}},
        {"model": {"dropout": 0.1}},
        {"model": {"end_of_word_suffix": "</w>"}},
        {"model": {"byte_fallback": True}},
        {"model": {"type": "Unigram"}},
        {"model": {"vocab": {"a": 0}}},
    ],
    ids=str,
)
def test_other_tokenizers_are_left_to_the_library(changes: dict[str, Any]) -> None:
    content = content_of(GPT2)
    model = {**content["model"], **changes.get("model", {})}
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    assert words.words_of({**content, **changes, "model": model}, library) is None
