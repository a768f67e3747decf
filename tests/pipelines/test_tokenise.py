"""Tokenizers give texts back exactly, and say where bytes are no text."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers

from pipelines.config import InputError
from pipelines.data.tokenise import ByteTokenizer, Tokenizer, encode_chunks, load_tokenizer
from pipelines.serving.chat import load_chat_format
from pipelines.serving.openai_schema import Message

HARD_TEXTS = [
    "",
    " leading and trailing  ",
    "\0\x01\x7f\r\n\r\n\t\v\f",
    "\ufeffbom, na\u00efve e\u0301 \u1e9b\u0323 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u4f60\u597d\u3002",
    "special <eos> and </s> and <|endoftext|> inside",
]


def _book(num_words: int) -> str:
    """Prose-like text: words, sentences, lines, numbers, and some of everything else."""
    random = np.random.default_rng(0)
    stems = ["whale", "sea", "the", "of", "Ahab's", "and", "running", "1851", "caf\u00e9", "\u4f60\u597d", "\U0001f40b"]
    joints = [" ", " ", " ", ", ", ".\n", "  ", "\r\n\r\n", "\u2014", "'ll "]
    picks = zip(random.integers(len(stems), size=num_words), random.integers(len(joints), size=num_words), strict=True)
    return "".join(stems[stem] + joints[joint] for stem, joint in picks)


@pytest.fixture(scope="module")
def bpe_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE as people train them: prefix space left on, truncation asked for, its own end token."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<stop>", "<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_book(5000)], trainer)
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    directory = tmp_path_factory.mktemp("bpe")
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    return directory


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe_directory: Path) -> Tokenizer:
    return load_tokenizer("bytes" if request.param == "bytes" else str(bpe_directory))


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert np.array_equal(tokenizer.encode_batch(["x", text])[1], ids)


def test_bytes_need_not_be_text() -> None:
    tokenizer = ByteTokenizer()
    every = np.arange(256)
    assert tokenizer.decode_bytes(every) == bytes(range(256))
    assert tokenizer.decode_bytes([256, 104, 256, 256, 105]) == b"<eos>h<eos><eos>i"
    assert tokenizer.decode([0xC3]) == "\ufffd"
    for wrong in ([257], [-1]):
        with pytest.raises(ValueError, match=r"0\.\.256"):
            tokenizer.decode_bytes(wrong)


def test_the_byte_tokenizer_is_a_standard_file(tmp_path: Path) -> None:
    own = ByteTokenizer()
    own.save_pretrained(tmp_path / "a")
    own.save_pretrained(tmp_path / "b")
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    standard = tokenizers.Tokenizer.from_str(files[0].decode())
    for text in [*HARD_TEXTS, "".join(map(chr, range(256)))]:
        assert standard.encode(text, add_special_tokens=False).ids == own.encode(text).tolist()
        assert standard.decode(own.encode(text).tolist(), skip_special_tokens=False) == text
    assert standard.token_to_id("<eos>") == own.eos_id
    assert standard.get_vocab_size() == own.vocab_size
    assert isinstance(load_tokenizer(str(tmp_path / "a")), ByteTokenizer)
    assert load_tokenizer(str(tmp_path / "a" / "tokenizer.json")).fingerprint == own.fingerprint


def test_a_saved_tokenizer_is_the_same(bpe_directory: Path, tmp_path: Path) -> None:
    first = load_tokenizer(str(bpe_directory))
    first.save_pretrained(tmp_path)
    second = load_tokenizer(str(tmp_path))
    assert second.fingerprint == first.fingerprint
    assert (second.eos_id, second.vocab_size) == (first.eos_id, first.vocab_size)
    assert first.eos_id == 0  # the one that tokenizer_config.json names


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_saved_tokenizer_keeps_how_its_model_chats(bpe_directory: Path, tmp_path: Path, place: str) -> None:
    turn = "<{{ message.role }}>{{ message.content }}{{ eos_token }}"
    template = "{{ bos_token }}{% for message in messages %}" + turn + "{% endfor %}"
    given = tmp_path / "given"
    config: dict[str, Any] = {"eos_token": {"content": "<stop>"}, "bos_token": "<eos>"}
    shutil.copytree(bpe_directory, given)
    if place == "chat_template.jinja":
        (given / place).write_text(template)
    else:
        config["chat_template"] = template
    (given / "tokenizer_config.json").write_text(json.dumps(config))
    load_tokenizer(str(given)).save_pretrained(tmp_path / "store")  # as prepare does, and then train
    load_tokenizer(str(tmp_path / "store")).save_pretrained(tmp_path / "model")
    said = [Message(role="user", content="Hi")]
    assert load_chat_format(str(tmp_path / "model"), ()).prompt(said) == "<eos><user>Hi<stop>"
    assert load_tokenizer(str(tmp_path / "model")).fingerprint == load_tokenizer(str(bpe_directory)).fingerprint
    standard = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert standard.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<eos><user>Hi<stop>"
    assert len(standard) == load_tokenizer(str(given)).vocab_size


def test_nothing_is_truncated_padded_or_put_before(bpe_directory: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_directory))
    text = _book(200)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a")) == 1


def _chunks(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


@pytest.mark.parametrize(
    ("data", "place"), [(b"\xff", 0), (b"abc\xc3(", 3), (b"abcdefg\xe2\x82", 7), (b"ab\xed\xa0\x80", 2)]
)
def test_invalid_utf8_is_found_however_it_is_chunked(tokenizer: Tokenizer, data: bytes, place: int) -> None:
    for size in (1, 2, 100):
        with pytest.raises(UnicodeDecodeError) as caught:
            list(encode_chunks(tokenizer, _chunks(data, size)))
        assert f"not UTF-8 at byte {place} " in caught.value.reason


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    (tmp_path / "other.json").write_text("not JSON")
    for spec in (tmp_path / "nowhere", tmp_path, tmp_path / "other.json"):
        with pytest.raises(InputError) as caught:
            load_tokenizer(str(spec))
        assert str(spec) in str(caught.value)
