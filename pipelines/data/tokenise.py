"""Tokenizers that give a text back exactly, and the tokenising of a document as a stream.

Tokens are int32 arrays. `bytes` is the tokenizer that needs no file: ids 0 to 255 are the bytes of the UTF-8
text, 256 is `<eos>`. Anything else is a Hugging Face `tokenizer.json`, read by the `tokenizers` library alone:
no code is loaded, no special tokens are added; truncation, padding and dropout that the file asks for are switched off.
"""

import codecs
import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import tokenizers

from pipelines import storage
from pipelines.config import InputError, canonical_json, fingerprint
from pipelines.data import pieces
from pipelines.data.pieces import Difference, Joining, LossyTextError, difference
from pipelines.data.words import BYTE_CHARACTERS, words_of

__all__ = ["ByteTokenizer", "JsonTokenizer", "LossyTextError", "Tokenizer", "encode_chunks", "load_tokenizer"]

# Pre-tokenizers that find where words end by a few characters there; a pattern of `Split` may count, too.
_LOCAL = {"ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation", "Split", "Whitespace"}
_COUNTED_DIGITS = r"\p{N}{1,3}"
# Normalizers that rewrite characters; others only mark where words begin.
_REWRITE = {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Strip", "StripAccents"}
EOS_NAMES = ("<eos>", "</s>", "<|endoftext|>", "<|im_end|>", "<|end_of_text|>")


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int  # ids are below it
    eos_id: int | None
    fingerprint: str  # equal for tokenizers that give equal ids
    own_names: Sequence[str]  # texts that become tokens with a meaning of their own, such as `<|im_end|>`
    cuts_texts: bool  # whether texts may be cut at all: not where tokens are counted off from a text's start

    def encode(self, text: str) -> np.ndarray: ...  # (T,) int32
    def encode_inside(self, text: str) -> np.ndarray: ...  # of a text that stands inside of another, (T,) int32
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...
    def cuts_between(self, left: str, right: str) -> bool: ...  # two characters of one kind
    def difference(self, text: str, ids: np.ndarray, before: np.ndarray) -> Difference | None: ...
    def remedy(self) -> str: ...  # what to do about texts that come back changed
    def save_pretrained(self, directory: str | Path) -> None: ...  # tokenizer.json and tokenizer_config.json


class Chat(NamedTuple):
    """What a model's tokenizer says of chats: not used here, but saved again, so that a trained model has it too."""

    template: Any = None  # text, or several with names, as Hugging Face has them
    bos_token: str | None = None  # which a template may put first


NO_CHAT = Chat()


class ByteTokenizer:
    """One token a byte. The literal text `<eos>` is five bytes, never the token 256."""

    vocab_size = 257
    eos_id: int | None = 256
    own_names: Sequence[str] = ()
    cuts_texts = True

    def __init__(self) -> None:
        self.fingerprint = fingerprint(_byte_tokenizer_json())

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

    def encode_inside(self, text: str) -> np.ndarray:
        return self.encode(text)

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

    def cuts_between(self, left: str, right: str) -> bool:
        """Bytes stay what they are beside any other."""
        return True

    def difference(self, text: str, ids: np.ndarray, before: np.ndarray) -> Difference | None:
        """None: bytes give every text back."""
        return None

    def remedy(self) -> str:
        return "bytes give every text back"

    def save_pretrained(self, directory: str | Path) -> None:
        _write_files(Path(directory), _byte_tokenizer_json(), "<eos>")


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`.

    A space that a byte-level tokenizer would put before a text is switched off: with it, a text that begins
    with a space and one that does not would be the same tokens.
    """

    def __init__(self, content: dict[str, Any], eos_token: str | None, chat: Chat = NO_CHAT) -> None:
        content = _without_chance(_without_prefix_space({**content, "truncation": None, "padding": None}))
        self._content = content
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        inside = _without_mark(content)
        self._inside = None if inside == content else tokenizers.Tokenizer.from_str(json.dumps(inside))
        self._words = words_of(content, self._tokenizer)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        names = ([eos_token] if eos_token else []) + list(EOS_NAMES)
        self._eos_token = next((name for name in names if name in vocabulary), None)
        self.eos_id = vocabulary[self._eos_token] if self._eos_token is not None else None
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.fingerprint = fingerprint([content, self._eos_token])
        added = content.get("added_tokens") or []
        self.own_names: Sequence[str] = [
            token["content"] for token in added if token.get("special") and token["content"]
        ]
        self.cuts_texts = "FixedLength" not in _types(content.get("pre_tokenizer"))
        self._cuts_words, self._counts_digits = _cuts_words(content)
        self._chat = chat if chat.bos_token in vocabulary else chat._replace(bos_token=None)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_inside(self, text: str) -> np.ndarray:
        """Without the space that a tokenizer after SentencePiece puts before a text's first word."""
        if self._inside is None:
            return self.encode(text)
        return np.array(self._inside.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = [None if self._words is None else self._words.encode(text) for text in texts]
        others = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        encodings = iter(self._tokenizer.encode_batch_fast(others, add_special_tokens=False))
        return [np.array(next(encodings).ids, dtype=np.int32) if ids is None else ids for ids in found]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(_as_ids(ids).tolist(), skip_special_tokens=False)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The very bytes of a byte-level tokenizer, also of part of a character; else those of `decode`."""
        if self._token_bytes is None:
            return self.decode(ids).encode()
        return b"".join(self._token_bytes.take(_as_ids(ids)).tolist())

    def cuts_between(self, left: str, right: str) -> bool:
        """Whether a text may be cut between two such characters where the tokens around them are the same then.

        Not in numbers whose digits are counted: their tokens may not tell, and those that follow would be others.
        """
        counted = self._counts_digits and left.isnumeric() and right.isnumeric()
        return self._cuts_words and not counted and not left.isspace()

    def difference(self, text: str, ids: np.ndarray, before: np.ndarray) -> Difference | None:
        """Where decoding `ids` (T,) does not give `text` back; `before` are the tokens of what stands before it."""
        if self._token_bytes is None:
            # A decoder may treat the first token of all differently, so that of the text is never the first.
            lead, back = self.decode(before), self.decode(np.concatenate([before, ids]))
            return difference(text, back[len(lead) :] if back.startswith(lead) else back)
        data = self.decode_bytes(ids)
        return None if data == text.encode() else difference(text, data.decode(errors="replace"))

    def remedy(self) -> str:
        """What to do about texts that come back changed."""
        keep = "use a tokenizer that keeps every text as it is, such as bytes"
        names = [name for name in _types(self._content.get("normalizer")) if name in _REWRITE]
        if not names:
            return keep
        return f"bring the text into the tokenizer's own form ({', '.join(names)}) before preparing it, or {keep}"

    @functools.cached_property
    def _token_bytes(self) -> np.ndarray | None:
        """(V,) the bytes of each token of a byte-level tokenizer: what the library decodes. None for others."""
        if (self._content.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        byte_of = {char: byte for byte, char in enumerate(BYTE_CHARACTERS)}
        table = np.full(self.vocab_size, b"", dtype=object)
        for token, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            known = all(char in byte_of for char in token)
            table[number] = bytes(byte_of[char] for char in token) if known else token.encode()
        return table

    def save_pretrained(self, directory: str | Path) -> None:
        _write_files(Path(directory), self._content, self._eos_token, self._chat)


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
        template_file = storage.join(storage.absolute(directory), "chat_template.jinja")
        template = config.get("chat_template") if isinstance(config, dict) else None
        if storage.exists(template_file):
            template = storage.read_bytes(template_file).decode()
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"tokenizer {spec} cannot be read: {error}") from error
    if content == _byte_tokenizer_json():
        return ByteTokenizer()
    try:
        return JsonTokenizer(content, _token(config, "eos_token"), Chat(template, _token(config, "bos_token")))
    except Exception as error:  # the library raises plain Exception for a file that it does not understand
        raise InputError(f"tokenizer {spec} is not a Hugging Face tokenizer.json: {error}") from error


def encode_chunks(tokenizer: Tokenizer, chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
    """The tokens, (T,) int32 a part, of one UTF-8 text that comes in chunks cut anywhere.

    Equal to the tokens of the whole text, in memory of a few pieces. Raises UnicodeDecodeError where the bytes
    are not UTF-8 (its `reason` says at which byte) and LossyTextError where decoding would not give the text back.
    """
    joining = Joining(tokenizer)
    for piece in pieces.cut(tokenizer, decoded(chunks)):
        (encoded,) = pieces.encode(tokenizer, [piece])
        if (ids := joining.add(piece, encoded)) is not None:
            yield ids
    if (ids := joining.end()) is not None:
        yield ids


def decoded(chunks: Iterable[bytes]) -> Iterator[str]:
    """UTF-8 text in parts, of bytes cut anywhere; UnicodeDecodeError, whose `reason` says at which byte."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    num_bytes = 0
    for chunk in chunks:
        yield _decode(decoder, chunk, num_bytes, final=False)
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


# --- files ------------------------------------------------------------------------------------------


def _as_ids(ids: Iterable[int]) -> np.ndarray:
    return np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64).reshape(-1)


def _token(config: Any, name: str) -> str | None:
    token = config.get(name) if isinstance(config, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _without_prefix_space(content: dict[str, Any]) -> dict[str, Any]:
    def fixed(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        part = {k: [fixed(p) for p in v] if k == "pretokenizers" else v for k, v in part.items()}
        return {**part, "add_prefix_space": False} if part.get("type") == "ByteLevel" else part

    return {**content, "pre_tokenizer": fixed(content.get("pre_tokenizer"))}


_DROP_SPACES = {"WhitespaceSplit", "Whitespace", "BertPreTokenizer", "Strip"}  # so that marks stand for them


def _without_mark(content: dict[str, Any]) -> dict[str, Any]:
    """Without the mark of a space that is put before a text; what takes it away again in decoding is left there.

    Unchanged where spaces are dropped, and every word is marked in their place.
    """
    if _DROP_SPACES.intersection([*_types(content.get("normalizer")), *_types(content.get("pre_tokenizer"))]):
        return content
    return {**content, **{name: _unmarked(content.get(name)) for name in ("normalizer", "pre_tokenizer")}}


def _unmarked(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Sequence":
        parts = {name: map(_unmarked, value) for name, value in part.items() if isinstance(value, list)}
        return {**part, **{name: [one for one in value if one is not None] for name, value in parts.items()}}
    if part.get("type") == "Prepend":
        return None
    if part.get("type") != "Metaspace":
        return part
    return {name: value for name, value in part.items() if name != "add_prefix_space"} | {"prepend_scheme": "never"}


def _without_chance(content: dict[str, Any]) -> dict[str, Any]:
    """Without BPE dropout, under which the same text is other tokens each time."""
    model = content.get("model")
    return (
        {**content, "model": {**model, "dropout": None}}
        if isinstance(model, dict) and model.get("dropout")
        else content
    )


def _types(part: Any) -> list[str]:
    """The names of a tokenizer.json's part and of the parts that it consists of."""
    if not isinstance(part, dict):
        return []
    if part.get("type") == "Sequence":
        return [name for value in part.values() if isinstance(value, list) for one in value for name in _types(one)]
    return [str(part.get("type"))]


def _cuts_words(content: dict[str, Any]) -> tuple[bool, bool]:
    """(whether words, but for numbers, may be cut: of byte-pair encoding, where none ends by its length; whether the
    digits of numbers are counted)."""
    before = content.get("pre_tokenizer")
    patterns = _patterns(before)
    counts = any(re.search(r"\{\d+(,\d*)?\}", pattern.replace(_COUNTED_DIGITS, "")) for pattern in patterns)
    is_bpe = (content.get("model") or {}).get("type") == "BPE"
    is_local = _LOCAL.issuperset(_types(before)) and not counts
    return is_bpe and is_local, any(_COUNTED_DIGITS in pattern for pattern in patterns)


def _patterns(part: Any) -> list[str]:
    """The regular expressions of a pre-tokenizer and of those that it consists of."""
    if not isinstance(part, dict):
        return []
    within = [pattern for one in part.get("pretokenizers") or [] for pattern in _patterns(one)]
    return [*within, *([part["pattern"]["Regex"]] if "Regex" in (part.get("pattern") or {}) else [])]


def _byte_tokenizer_json() -> dict[str, Any]:
    """The byte tokenizer in Hugging Face's format; `<eos>` is in the vocabulary but never matched in a text."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {char: byte for byte, char in enumerate(BYTE_CHARACTERS)}
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


def _write_files(directory: Path, content: dict[str, Any], eos_token: str | None, chat: Chat = NO_CHAT) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    said = {"eos_token": eos_token, "bos_token": chat.bos_token, "chat_template": chat.template}
    config |= {name: value for name, value in said.items() if value is not None}
    if content == _byte_tokenizer_json():
        config["split_special_tokens"] = True  # the text "<eos>" stays five bytes
    for name, value in (("tokenizer.json", content), ("tokenizer_config.json", config)):
        storage.write_bytes(str(directory / name), (canonical_json(value) + "\n").encode())
