"""Tokenizers that give a text back exactly, and the tokenising of a document as a stream.

Tokens are int32 arrays. `bytes` is the tokenizer that needs no file: ids 0 to 255 are the bytes of the UTF-8
text, 256 is `<eos>`. Anything else is a Hugging Face `tokenizer.json`, read by the `tokenizers` library alone:
no code is loaded, no special tokens are added, truncation and padding that the file asks for are switched off.
"""

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from pipelines import storage
from pipelines.config import InputError, canonical_json, fingerprint

EOS_NAMES = ("<eos>", "</s>", "<|endoftext|>", "<|im_end|>", "<|end_of_text|>")
PIECE_CHARS = 2**19  # text tokenised at once: the `tokenizers` library needs about 100 bytes a character
_WINDOW_CHARS = 512  # context on each side in which a cut is verified
_SEARCH_CHARS = 2**14  # how far back from a piece's end a cut is looked for
_TRIES = 32


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int  # ids are below it
    eos_id: int | None
    fingerprint: str  # equal for tokenizers that give equal ids

    def encode(self, text: str) -> np.ndarray: ...  # (T,) int32
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...
    def save_pretrained(self, directory: str | Path) -> None: ...  # tokenizer.json and tokenizer_config.json


class ByteTokenizer:
    """One token a byte. The literal text `<eos>` is five bytes, never the token 256."""

    vocab_size = 257
    eos_id: int | None = 256

    def __init__(self) -> None:
        self.fingerprint = fingerprint(_byte_tokenizer_json())

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD, 256 becomes `<eos>`."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The very bytes, `<eos>` for 256; ValueError for other ids."""
        array = _as_ids(ids)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            raise ValueError(f"ids from {array.min()} to {array.max()} are not all in 0..{self.vocab_size - 1}")
        parts = np.split(array, np.flatnonzero(array == self.eos_id))
        head, *rest = (part[part != self.eos_id].astype(np.uint8).tobytes() for part in parts)
        return head + b"".join(b"<eos>" + part for part in rest)

    def save_pretrained(self, directory: str | Path) -> None:
        _write_files(Path(directory), _byte_tokenizer_json(), "<eos>")


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`.

    A space that a byte-level tokenizer would put before a text is switched off: with it, a text that begins
    with a space and one that does not would be the same tokens.
    """

    def __init__(self, content: dict[str, Any], eos_token: str | None) -> None:
        content = _without_prefix_space({**content, "truncation": None, "padding": None})
        self._content = content
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        names = ([eos_token] if eos_token else []) + list(EOS_NAMES)
        self._eos_token = next((name for name in names if name in vocabulary), None)
        self.eos_id = vocabulary[self._eos_token] if self._eos_token is not None else None
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.fingerprint = fingerprint([content, self._eos_token])

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(_as_ids(ids).tolist(), skip_special_tokens=False)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.decode(ids).encode()

    def save_pretrained(self, directory: str | Path) -> None:
        _write_files(Path(directory), self._content, self._eos_token)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names: "bytes", a directory with a tokenizer.json, or that file; on disk or S3.

    Raises InputError where there is none or the file is not a tokenizer.
    """
    if spec == "bytes":
        return ByteTokenizer()
    try:
        directory = spec if storage.is_directory(spec) else storage.absolute(spec).rpartition("/")[0]
        file = storage.join(storage.absolute(spec), "tokenizer.json") if directory == spec else spec
        if not storage.exists(file):
            raise InputError(
                f"tokenizer {spec}: {file} does not exist; give `bytes`, a tokenizer.json, or the directory "
                "that holds one"
            )
        content = storage.read_json(file)
        config_file = storage.join(storage.absolute(directory), "tokenizer_config.json")
        config = storage.read_json(config_file) if storage.exists(config_file) else {}
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"tokenizer {spec} cannot be read: {error}") from error
    if content == _byte_tokenizer_json():
        return ByteTokenizer()
    try:
        return JsonTokenizer(content, _eos_token(config))
    except Exception as error:  # the library raises plain Exception for a file that it does not understand
        raise InputError(f"tokenizer {spec} is not a Hugging Face tokenizer.json: {error}") from error


def encode_chunks(tokenizer: Tokenizer, chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
    """The tokens, (T,) int32 a part, of one UTF-8 text that comes in chunks cut anywhere.

    Equal to the tokens of the whole text, in memory of a few pieces. Raises UnicodeDecodeError where the bytes
    are not UTF-8 (its `reason` says at which byte) and LossyTextError where decoding would not give the text back.
    """
    if isinstance(tokenizer, ByteTokenizer):
        for chunk, _ in _decoded(chunks):
            if chunk:
                yield np.frombuffer(chunk, dtype=np.uint8).astype(np.int32)
        return
    num_chars = 0
    for piece in _pieces(tokenizer, (text for _, text in _decoded(chunks))):
        ids = tokenizer.encode(piece)
        back = tokenizer.decode(ids)
        if back != piece:
            raise LossyTextError(num_chars + _first_difference(back, piece))
        num_chars += len(piece)
        yield ids


class LossyTextError(ValueError):
    """The tokenizer does not give this text back exactly."""

    def __init__(self, position: int) -> None:
        super().__init__(f"the tokenizer does not give the text back exactly, from character {position} on")


# --- streaming --------------------------------------------------------------------------------------


def _decoded(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, str]]:
    """(chunk, text that became complete with it); the texts joined are the whole."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    num_bytes = 0
    for chunk in chunks:
        yield chunk, _decode(decoder, chunk, num_bytes, final=False)
        num_bytes += len(chunk)
    _decode(decoder, b"", num_bytes, final=True)


def _decode(decoder: codecs.IncrementalDecoder, chunk: bytes, num_bytes: int, *, final: bool) -> str:
    pending = len(decoder.getstate()[0])
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        place = num_bytes - pending + error.start
        reason = f"not UTF-8 at byte {place} ({error.reason})"
        raise UnicodeDecodeError("utf-8", error.object, error.start, error.end, reason) from None


def _pieces(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[str]:
    """The text in pieces whose tokens, joined, are those of the whole.

    A piece ends only where tokenising the text on both sides apart and together is found to be equal; where no
    such place is found near the wanted size, the piece grows and the search goes on further down.
    """
    buffer, wanted = "", PIECE_CHARS
    for text in texts:
        buffer += text
        while len(buffer) >= wanted + _WINDOW_CHARS:
            cut = _find_cut(tokenizer, buffer, wanted)
            if cut is None:
                wanted += PIECE_CHARS
                continue
            yield buffer[:cut]
            buffer, wanted = buffer[cut:], PIECE_CHARS
    if buffer:
        yield buffer


def _find_cut(tokenizer: Tokenizer, text: str, end: int) -> int | None:
    """The last verified place to cut before `end`; None where none of those tried is one."""
    begin = max(1, end - _SEARCH_CHARS)
    tries = 0
    for wants_space in (True, False):  # before white space after a word, else between other kinds of characters
        for cut in range(end, begin, -1):
            left, right = _kind(text[cut - 1]), _kind(text[cut])
            if left == right or left == " " or (right == " ") != wants_space:
                continue
            if _is_safe(tokenizer, text, cut):
                return cut
            tries += 1
            if tries % _TRIES == 0:
                break
    return None


def _kind(char: str) -> str:
    if char.isspace():
        return " "
    return "a" if char.isalpha() else "0" if char.isnumeric() else "."


def _is_safe(tokenizer: Tokenizer, text: str, cut: int) -> bool:
    left, right = text[max(0, cut - _WINDOW_CHARS) : cut], text[cut : cut + _WINDOW_CHARS]
    both, first, second = tokenizer.encode_batch([left + right, left, right])
    return np.array_equal(both, np.concatenate([first, second]))


def _first_difference(a: str, b: str) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# --- files ------------------------------------------------------------------------------------------


def _as_ids(ids: Iterable[int]) -> np.ndarray:
    return np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64).reshape(-1)


def _eos_token(config: Any) -> str | None:
    token = config.get("eos_token") if isinstance(config, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _without_prefix_space(content: dict[str, Any]) -> dict[str, Any]:
    def fixed(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        part = {k: [fixed(p) for p in v] if k == "pretokenizers" else v for k, v in part.items()}
        return {**part, "add_prefix_space": False} if part.get("type") == "ByteLevel" else part

    return {**content, "pre_tokenizer": fixed(content.get("pre_tokenizer"))}


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (the GPT-2 table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def _byte_tokenizer_json() -> dict[str, Any]:
    """The byte tokenizer in Hugging Face's format; `<eos>` is in the vocabulary but never matched in a text."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {char: byte for byte, char in enumerate(_byte_characters())}
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {**vocabulary, "<eos>": 256},
        "merges": [],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }


def _write_files(directory: Path, content: dict[str, Any], eos_token: str | None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if eos_token is not None:
        config["eos_token"] = eos_token
    if content == _byte_tokenizer_json():
        config["split_special_tokens"] = True  # the text "<eos>" stays five bytes
    for name, value in (("tokenizer.json", content), ("tokenizer_config.json", config)):
        storage.write_bytes(str(directory / name), (canonical_json(value) + "\n").encode())
