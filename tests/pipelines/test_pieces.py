"""Pieces of a text have, joined, the tokens of the whole: for tokenizers of every build, and where windows mislead."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from pipelines.data import pieces, tokenise
from pipelines.data.pieces import Joining, LossyTextError, Piece
from pipelines.data.tokenise import ByteTokenizer, JsonTokenizer, encode_chunks


def book(num_words: int, seed: int = 0) -> str:
    """Prose-like text: words of random letters, sentences, lines, numbers, other scripts."""
    random = np.random.default_rng(seed)
    letters = "etaoinshrdlu"
    stems = ["".join(random.choice(list(letters), random.integers(1, 9))) for _ in range(60)]
    stems += ["Ahab's", "1851", "20202", "caf\u00e9", "\u4f60\u597d", "\U0001f40b", "\uac00\uac01", "x--y", "don't"]
    joints = [" ", " ", " ", " ", ", ", ".\n", "  ", "\r\n\r\n", "\u2014", "'ll ", " ... "]
    picks = zip(random.integers(len(stems), size=num_words), random.integers(len(joints), size=num_words), strict=True)
    return "".join(stems[stem] + joints[joint] for stem, joint in picks)


TEXT = book(4000)


def trained(tokenizer: tokenizers.Tokenizer, special: list[str], **options: Any) -> JsonTokenizer:
    kind = trainers.UnigramTrainer if isinstance(tokenizer.model, models.Unigram) else trainers.BpeTrainer
    trainer = kind(vocab_size=700, special_tokens=special, show_progress=False, **options)
    tokenizer.train_from_iterator([book(50, seed) for seed in range(60)], trainer)
    return JsonTokenizer(json.loads(tokenizer.to_str()), None)


def byte_level(*before: Any, normalizer: Any = None, added: str | None = None) -> JsonTokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not before)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last])
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if added is not None:
        tokenizer.add_special_tokens([added])
    return trained(tokenizer, ["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def like_llama_3() -> JsonTokenizer:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return byte_level(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"))


def like_llama_2() -> JsonTokenizer:
    """SentencePiece's byte-pair encoding: no pre-tokenizer, a mark before the text, bytes for unknown characters."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")  # for training only: words are not to cross lines
    found = trained(tokenizer, ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])
    return JsonTokenizer({**found._content, "pre_tokenizer": None}, None)


def metaspace(scheme: str) -> JsonTokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = sorted({char for char in TEXT + book(500, 1) if char != " "})
    return trained(tokenizer, ["<unk>"], unk_token="<unk>", initial_alphabet=alphabet)


BUILDS: dict[str, Callable[[], Any]] = {
    "bytes": ByteTokenizer,
    "byte_level": byte_level,
    "llama_3": like_llama_3,
    "llama_2": like_llama_2,
    "metaspace_always": lambda: metaspace("always"),
    "metaspace_first": lambda: metaspace("first"),
    "nfc": lambda: byte_level(normalizer=normalizers.NFC()),
    "digits": lambda: byte_level(pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.Punctuation()),
    "added": lambda: byte_level(added=". "),
    "scripts": lambda: byte_level(pre_tokenizers.UnicodeScripts()),
}


@pytest.fixture(params=BUILDS)
def tokenizer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(pieces, "PIECE_CHARS", 3000)
    monkeypatch.setattr(pieces, "_SEARCH_CHARS", 1000)
    return BUILDS[request.param]()


@pytest.mark.parametrize("size", [7, 10_000])
def test_pieces_have_the_tokens_of_the_whole(tokenizer: Any, size: int) -> None:
    data = TEXT.encode()
    parts = list(encode_chunks(tokenizer, (data[start : start + size] for start in range(0, len(data), size))))
    assert len(parts) >= len(TEXT) // 4000
    assert np.array_equal(np.concatenate(parts), tokenizer.encode(TEXT))


def test_tokenizers_that_mark_a_beginning_mark_that_of_the_text_alone() -> None:
    tokenizer = like_llama_2()
    assert tokenizer.decode(tokenizer.encode("x")) == "x"
    (piece,) = pieces.encode(tokenizer, [Piece(" the", "on", (), ())])
    assert piece.difference is None
    assert tokenizer.decode(np.concatenate([tokenizer.encode("on"), piece.ids])) == "on the"


@pytest.mark.parametrize("build", [like_llama_2, lambda: metaspace("always"), lambda: metaspace("first")])
def test_inside_of_a_text_no_beginning_is_marked(build: Callable[[], Any]) -> None:
    """Words that are encoded apart are what the whole text's tokens are, and give the text back."""
    tokenizer = build()
    first, *others = book(40).split()[:12]
    text = " ".join([first, *others])
    parts = [tokenizer.encode(first), *(tokenizer.encode_inside(f" {word}") for word in others)]
    assert tokenizer.decode(np.concatenate(parts)) == text
    if build is not like_llama_2:  # whose tokens are not of single words
        assert np.array_equal(np.concatenate(parts), tokenizer.encode(text))
    assert not np.array_equal(tokenizer.encode_inside(first), tokenizer.encode(first))


def after_white_space() -> JsonTokenizer:
    """T5's and XLM-R's form: words are split at spaces, which marks stand for, one before each word."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = sorted({char for char in book(500, 1) if not char.isspace()})
    return trained(tokenizer, ["<unk>"], unk_token="<unk>", initial_alphabet=alphabet)


def test_marks_that_stand_for_spaces_stay_inside_of_a_text() -> None:
    tokenizer = after_white_space()
    words = " ".join(book(40).split()[:12])
    for text in (words, f" {words}", f"\n{words}\n"):
        assert tokenizer.decode(tokenizer.encode_inside(text)).split() == words.split()
        assert np.array_equal(tokenizer.encode_inside(text), tokenizer.encode(text))


def test_byte_level_tokenizers_mark_no_beginning_anywhere() -> None:
    for tokenizer in (byte_level(), like_llama_3(), ByteTokenizer()):
        for text in ("home", " home", "\nhome", ""):
            assert np.array_equal(tokenizer.encode_inside(text), tokenizer.encode(text))


def test_pieces_of_fixed_length_are_never_cut_out_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tokens around a cut are alike they do not tell which step they keep: such texts are not cut."""
    monkeypatch.setattr(pieces, "PIECE_CHARS", 2000)
    tokenizer = byte_level(pre_tokenizers.FixedLength(4))
    assert len(list(pieces.cut(tokenizer, [TEXT]))) == 1
    inside = byte_level(pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.FixedLength(4)]))
    assert not inside.cuts_texts
    parts = list(encode_chunks(tokenizer, [TEXT.encode()]))
    assert np.array_equal(np.concatenate(parts), tokenizer.encode(TEXT))


def pairs(merges: list[tuple[str, str]], alphabet: str) -> JsonTokenizer:
    """A byte-level BPE of these merges, with no pre-tokenizer: what stands far away can matter."""
    content = tokenise._byte_tokenizer_json()
    vocabulary = {char: number for number, char in enumerate(dict.fromkeys([*alphabet, *(a + b for a, b in merges)]))}
    content["model"] |= {"vocab": vocabulary, "merges": [list(merge) for merge in merges]}
    return JsonTokenizer(content, None)


def test_a_window_that_misses_what_decides_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairs of a long run are counted from its start, which no window sees."""
    tokenizer = pairs([("a", "b"), ("ab", "ab"), ("ab", ".")], "ab.,")
    text = "," + "ab" * 1001 + "." + "ab" * 1000 + ".," * 300
    monkeypatch.setattr(pieces, "PIECE_CHARS", text.index("."))
    assert pieces._joint(tokenizer, text, text.index(".")) is not None  # its window is fooled
    assert tokenizer.encode("ab" * 255 + ".").tolist()[-1] == tokenizer._tokenizer.token_to_id("ab.")
    joined = []
    monkeypatch.setattr(Joining, "add", lambda *args, add=Joining.add: joined.append(add(*args)) or joined[-1])
    parts = list(encode_chunks(tokenizer, [text.encode()]))
    assert np.array_equal(np.concatenate(parts), tokenizer.encode(text))
    assert len(joined) > len(parts)  # pieces became one


@pytest.mark.parametrize("seed", range(40))
def test_any_merges_on_any_text_with_windows_that_see_little(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARS", 60)
    monkeypatch.setattr(pieces, "_WINDOW_CHARS", 12)
    monkeypatch.setattr(pieces, "_SEARCH_CHARS", 40)
    random = np.random.default_rng(seed)
    alphabet, tokens, merges = "ab.,1", list("ab.,1"), []
    for _ in range(25):
        pair = tuple(tokens[i] for i in random.integers(len(tokens), size=2))
        if sum(map(len, pair)) < 9 and "".join(pair) not in tokens:
            merges.append(pair)
            tokens.append("".join(pair))
    tokenizer = pairs(merges, alphabet)
    runs = ["".join(random.choice(list(alphabet), random.integers(1, 4))) * random.integers(1, 12) for _ in range(150)]
    text = "".join(runs)
    parts = list(encode_chunks(tokenizer, [text.encode()]))
    assert np.array_equal(np.concatenate(parts), tokenizer.encode(text))


def one_word(num_letters: int) -> str:
    """A text of one kind of characters."""
    return "".join(np.random.default_rng(0).choice(list("etao"), num_letters))


@pytest.mark.parametrize("build", ["bytes", "byte_level", "llama_3", "llama_2"])
def test_a_word_without_an_end_is_cut_too(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARS", 3000)
    tokenizer, text = BUILDS[build](), one_word(30_000)
    found = list(pieces.cut(tokenizer, [text[:20_000], text[20_000:]]))
    assert "".join(piece.text for piece in found) == text
    assert max(len(piece.text) for piece in found) <= 3000 + pieces._WINDOW_CHARS
    parts = list(encode_chunks(tokenizer, [text.encode()]))
    assert len(parts) == len(found)
    assert np.array_equal(np.concatenate(parts), tokenizer.encode(text))


@pytest.mark.parametrize("build", ["byte_level", "llama_3", "llama_2"])
def test_runs_whose_words_are_counted_keep_their_tokens(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number is cut into threes from its beginning: where few threes are tokens, a window does not tell."""
    monkeypatch.setattr(pieces, "PIECE_CHARS", 700)
    monkeypatch.setattr(pieces, "_WINDOW_CHARS", 64)
    tokenizer = BUILDS[build]()
    for letters in ("0123456789", "\n ", "-=.", "e\u0301a"):
        text = "".join(np.random.default_rng(0).choice(list(letters), 9000))
        parts = list(encode_chunks(tokenizer, [text.encode()]))
        assert np.array_equal(np.concatenate(parts), tokenizer.encode(text)), letters


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("pre_tokenizer", "allowed"),
    [
        (None, {"ab", "12", "1a"}),
        ({"type": "Digits", "individual_digits": False}, {"ab", "12", "1a"}),
        (split(r"\p{N}+|\p{L}+"), {"ab", "12", "1a"}),
        (split(r"\p{N}{1,3}|\p{L}+"), {"ab", "1a"}),
        (split(r"\p{N}{1,3}|\p{L}{1,9}"), set()),
        ({"type": "FixedLength", "length": 4}, set()),
        ({"type": "UnicodeScripts"}, set()),
    ],
)
def test_words_are_cut_where_nothing_is_counted(pre_tokenizer: Any, allowed: set[str]) -> None:
    base = tokenise._byte_tokenizer_json()
    parts = [part for part in (pre_tokenizer, base["pre_tokenizer"]) if part is not None]
    tokenizer = JsonTokenizer({**base, "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}, None)
    assert {pair for pair in ("ab", "12", "1a", " a", "  ") if tokenizer.cuts_between(*pair)} == allowed


def test_bytes_are_cut_at_any_character(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARS", 3000)
    assert ByteTokenizer().cuts_between(" ", " ")
    text = "\U0001f40b" * 10_000
    parts = list(encode_chunks(ByteTokenizer(), [text.encode()]))
    assert [len(part) for part in parts] == [12_000, 12_000, 12_000, 4000]
    assert ByteTokenizer().decode(np.concatenate(parts)) == text


@pytest.mark.parametrize("build", ["run", "metaspace_always"])
def test_a_text_without_a_place_to_cut_is_tokenised_whole(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the pairs of a run begin only its first letter tells; the best words of a text, all of it."""
    monkeypatch.setattr(pieces, "PIECE_CHARS", 1000)
    is_run = build == "run"
    tokenizer = pairs([("a", "a"), ("aa", "aa")], "ab") if is_run else BUILDS[build]()
    text = "b" + "a" * 10_000 if is_run else "t" + one_word(10_000)
    assert [piece.text for piece in pieces.cut(tokenizer, [text])] == [text]
    parts = list(encode_chunks(tokenizer, [text.encode()]))
    assert len(parts) == 1
    assert np.array_equal(parts[0], tokenizer.encode(text))


def test_pieces_that_never_fit_are_not_tokenised_again_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every window sees an even number of pairs, where there is an odd one."""
    tokenizer = pairs([("a", "b"), ("ab", "ab"), ("ab", ".")], "ab.")
    part = "." + "ab" * 101
    monkeypatch.setattr(pieces, "PIECE_CHARS", len(part))
    monkeypatch.setattr(pieces, "_WINDOW_CHARS", 64)
    monkeypatch.setattr(pieces, "_SEARCH_CHARS", 1)
    num_chars = 0

    def counted(tokenizer: Any, found: list[Piece], encode: Any = pieces.encode) -> Any:
        nonlocal num_chars
        num_chars += sum(len(piece.text) for piece in found)
        return encode(tokenizer, found)

    monkeypatch.setattr(pieces, "encode", counted)
    text = part * 100
    (whole,) = encode_chunks(tokenizer, [text.encode()])
    assert np.array_equal(whole, tokenizer.encode(text))
    assert num_chars < 6 * len(text)


def test_a_special_token_across_words_is_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARS", 600)
    base = tokenizers.Tokenizer.from_str(json.dumps(tokenise._byte_tokenizer_json()))
    base.add_special_tokens(["the end of all"])
    tokenizer = JsonTokenizer(json.loads(base.to_str()), None)
    text = "the end of all" * 500
    parts = list(encode_chunks(tokenizer, [text.encode()]))
    assert np.concatenate(parts).tolist() == [257] * 500


def test_a_text_that_would_come_back_changed_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    content = {**tokenise._byte_tokenizer_json(), "normalizer": {"type": "Lowercase"}}
    with pytest.raises(LossyTextError, match=r"from character 3 on: 'D' comes back as 'd'; .*Lowercase.* bytes"):
        list(encode_chunks(JsonTokenizer(content, None), [b"abcD"]))
    monkeypatch.setattr(pieces, "PIECE_CHARS", 1000)
    text = book(800).lower() + "E\u0301 and more"
    nfc = byte_level(normalizer=normalizers.NFC())
    with pytest.raises(LossyTextError, match=rf"character {len(text) - 11} on: .*own form \(NFC\)"):
        list(encode_chunks(nfc, [text.encode()]))
    with pytest.raises(LossyTextError, match=r"character 0 on: ' x' comes back as 'x'; use a tokenizer that keeps"):
        list(encode_chunks(metaspace("always"), [b" x"]))


def test_the_bytes_of_tokens_are_what_the_library_decodes() -> None:
    tokenizer = byte_level(added="caf\u00e9 \u4f60 <x>")
    random = np.random.default_rng(0)
    for _ in range(200):
        ids = random.integers(tokenizer.vocab_size, size=random.integers(1, 12))
        library = tokenizer._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        assert tokenizer.decode_bytes(ids).decode(errors="replace") == library


def test_chance_is_switched_off() -> None:
    content = byte_level()._content
    dropping = {**content, "model": {**content["model"], "dropout": 0.5}}
    assert np.array_equal(JsonTokenizer(dropping, None).encode(TEXT), JsonTokenizer(content, None).encode(TEXT))
