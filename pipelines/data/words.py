"""Byte-level BPE by words that are remembered: the ids of the `tokenizers` library in a fraction of its time.

Byte-pair encoding works within the words that a pre-tokenizer's pattern cuts a text into, and most words of a text are
few. So each word is encoded by the library's model once, and texts are cut by the package `regex`, which runs the same
pattern. The two engines may be of different versions of Unicode: characters that they do not class alike are found by
asking both, and a text that holds one goes to the library whole, as one with a special token's name in it does.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import regex
import tokenizers

_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {_BYTE_LEVEL, _HEAD + r"\p{N}{1,3}" + _TAIL, _HEAD + r"\p{N}" + _TAIL}  # also Llama 3's, and Qwen 2's
_CLASSES = (r"\p{L}", r"\p{N}", r"\s", r"[\r\n]", r"(?i:[strevmld])")  # all that the patterns ask of a character
_MOST_WORDS, _LONGEST_WORD = 2**17, 64
_AT_ONCE = 2**17  # characters or words that are worked on without a pause: some milliseconds


class Words:
    """The words of one tokenizer that are known so far."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, pattern: str, added: Sequence[str]) -> None:
        self._pattern = regex.compile(pattern)
        self._added = added  # names that are one token wherever they stand
        self._ids = _Ids(tokenizer.model)
        self._alike: set[str] = set()  # characters of whose classes both engines think the same
        self._odd: set[str] = set()

    def encode(self, text: str) -> np.ndarray | None:
        """(T,) int32; None for a text that the library has to read itself."""
        chars: set[str] = set()
        for start in range(0, len(text), _AT_ONCE):  # between slices other threads may go on
            chars.update(text[start : start + _AT_ONCE])
        if new := chars - self._alike - self._odd:
            alike = _alike("".join(sorted(new)))
            self._alike |= alike
            self._odd |= new - alike
        if not chars.isdisjoint(self._odd) or any(name in text for name in self._added):
            return None
        is_alone = threading.current_thread() is threading.main_thread()  # then no lock is given back at every word
        words, ids = self._pattern.findall(text, concurrent=not is_alone), bytearray()
        for start in range(0, len(words), _AT_ONCE):
            ids += b"".join(map(self._ids.__getitem__, words[start : start + _AT_ONCE]))
        return np.frombuffer(ids, dtype=np.int32)


class _Ids(dict[str, bytes]):
    """The ids of words, as the bytes of int32 numbers; words are added as they are asked for."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def __missing__(self, word: str) -> bytes:
        in_bytes = "".join(map(BYTE_CHARACTERS.__getitem__, word.encode()))
        ids = np.array([token.id for token in self._model.tokenize(in_bytes)], dtype=np.int32).tobytes()
        if len(self) < _MOST_WORDS and len(word) <= _LONGEST_WORD:
            self[word] = ids
        return ids


def words_of(content: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> Words | None:
    """For a tokenizer.json of byte-level BPE whose pattern is known here; None for others."""
    model, pattern = content.get("model") or {}, _pattern(content.get("pre_tokenizer"))
    is_plain = not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    if model.get("type") != "BPE" or content.get("normalizer") is not None or pattern is None or not is_plain:
        return None
    if model.get("byte_fallback") or not set(BYTE_CHARACTERS) <= model["vocab"].keys():
        return None
    return Words(tokenizer, pattern, [token["content"] for token in content.get("added_tokens") or []])


def _pattern(pre_tokenizer: Any) -> str | None:
    """What a pre-tokenizer cuts at, where it is `ByteLevel`, alone or behind one `Split`."""
    parts = (
        pre_tokenizer.get("pretokenizers") if pre_tokenizer and "pretokenizers" in pre_tokenizer else [pre_tokenizer]
    )
    *before, last = [part or {} for part in parts]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(before) > 1:
        return None
    if not before:
        return _BYTE_LEVEL if last.get("use_regex", True) else None
    (first,) = before
    split = first.get("pattern", {}).get("Regex")
    is_whole = first.get("type") == "Split" and first.get("behavior") == "Isolated" and not first.get("invert")
    return split if is_whole and split in _PATTERNS and not last.get("use_regex", True) else None


def _alike(chars: str) -> set[str]:
    """Those of some different characters that both engines put into the same classes."""
    found = set(chars)
    for pattern in _CLASSES:
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "removed")
        outside = {char for part, _ in split.pre_tokenize_str(chars) for char in part}
        found -= {char for char in chars if (char in outside) == bool(regex.fullmatch(pattern, char))}
    return found


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (the GPT-2 table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
