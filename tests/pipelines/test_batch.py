"""The batch engine: rows are refilled, a document gives the same alone and beside others, a bad one fails alone."""

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

import rmt_core
from pipelines.data.tokenise import ByteTokenizer
from pipelines.serving.batch import BatchEngine, Document, DocumentError, Writing

SEGMENT_LEN = 16
PROMPT = list(b"\n\nSummary: ")


def tiny_model(memory: object, seed: int = 0) -> rmt_core.RecurrentModel:
    torch.manual_seed(seed)
    backbone = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.5,  # so large that what is written depends on what was read
    )
    return rmt_core.build(backbone=backbone, memory=memory, segment_len=SEGMENT_LEN, dtype="float64").eval()


@pytest.fixture(scope="module")
def model() -> rmt_core.RecurrentModel:
    return tiny_model({"kind": "rmt", "num_tokens": 2})


def engine(model: rmt_core.RecurrentModel, num_rows: int, temperature: float = 0.0, **settings: object) -> BatchEngine:
    writing = Writing(
        settings.get("prompt", PROMPT),
        settings.get("max_new_tokens", 20),
        rmt_core.Sampling(temperature, 0.9),
        settings.get("seed", 0),
    )
    return BatchEngine(model, settings.get("tokenizer", ByteTokenizer()), writing, num_rows)


def document(i: int, num_tokens: int) -> Document:
    tokens = np.random.default_rng(i).integers(97, 123, num_tokens).astype(np.int32)
    parts = [tokens[start : start + 7] for start in range(0, num_tokens, 7)]
    return Document(f"document-{i}", parts)


LENGTHS = [5, 100, 16, 1, 33, 64, 17, 48, 15, 200, 3, 80]  # below, at and past the ends of segments


def documents() -> list[Document]:
    return [document(i, num_tokens) for i, num_tokens in enumerate(LENGTHS)]


def reference(model: rmt_core.RecurrentModel, text: Document, max_new_tokens: int = 20) -> str:
    """What the document gives by the core's own session: all its tokens read, then the prompt, then greedily on."""
    tokens = torch.as_tensor(np.concatenate(list(text.tokens)), dtype=torch.long)
    session = rmt_core.read(model, rmt_core.open_session(model, 1), tokens[None])
    written = rmt_core.generate(model, [PROMPT], max_new_tokens, session=session, stop_tokens=[256])
    return ByteTokenizer().decode(written.tokens[0])


@pytest.mark.parametrize(
    "memory", ["none", {"kind": "rmt", "num_tokens": 2}, {"kind": "xl", "cache_len": 8}, ["xl", "rmt"]]
)
def test_a_document_gives_what_a_session_of_its_own_gives(memory: object) -> None:
    model = tiny_model(memory)
    summaries = list(engine(model, 3).summarise(documents()))
    assert [summary.text for summary in summaries] == [reference(model, text) for text in documents()]
    assert len({summary.text for summary in summaries}) > len(summaries) / 2  # it depends on the document


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_rows", [3, 20])
def test_refilled_batches_equal_documents_alone(
    model: rmt_core.RecurrentModel, temperature: float, num_rows: int
) -> None:
    together = list(engine(model, num_rows, temperature).summarise(documents()))
    alone = [next(engine(model, 1, temperature).summarise([text])) for text in documents()]
    assert together == alone
    assert [summary.doc_id for summary in together] == [text.doc_id for text in documents()]
    assert [summary.num_tokens for summary in together] == LENGTHS
    assert [summary.num_segments for summary in together] == [-(-n // SEGMENT_LEN) for n in LENGTHS]


def test_seeds_follow_the_document_and_the_setting(model: rmt_core.RecurrentModel) -> None:
    first, again = (list(engine(model, 4, 1.0).summarise(documents())) for _ in range(2))
    other = list(engine(model, 4, 1.0, seed=1).summarise(documents()))
    same_text = Document("another id", document(1, 100).tokens)
    assert first == again
    assert first != other
    assert next(engine(model, 4, 1.0).summarise([same_text])).text != first[1].text


def test_a_freed_row_is_given_to_the_next_document(
    model: rmt_core.RecurrentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    step = type(model).step

    def counted(self: rmt_core.RecurrentModel, tokens: torch.Tensor, *args: object, **kwargs: object) -> object:
        batches.append(len(tokens))
        return step(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(model), "step", counted)
    lengths = [10 * SEGMENT_LEN, *[SEGMENT_LEN] * 9]  # the long one keeps its row, the other row sees nine documents
    texts = [document(i, num_tokens) for i, num_tokens in enumerate(lengths)]
    list(engine(model, 2, max_new_tokens=1, prompt=[]).summarise(texts))
    assert batches[:9] == [2] * 9


def test_documents_are_opened_only_when_a_row_is_free(model: rmt_core.RecurrentModel) -> None:
    opened = 0

    def texts() -> Iterator[Document]:
        nonlocal opened
        for i in range(50):
            opened += 1
            yield document(i, 40)

    summaries = engine(model, 4).summarise(texts())
    next(summaries)
    assert opened <= 8


class PoisonError(Exception):
    pass


def poison_step(model: rmt_core.RecurrentModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that fails over any batch that holds the byte `!`."""
    read = type(model).read

    def checked(self: rmt_core.RecurrentModel, tokens: torch.Tensor, *args: object, **kwargs: object) -> object:
        if bool((tokens == ord("!")).any()):
            raise PoisonError("the model\nrefuses")
        return read(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(model), "read", checked)


@pytest.mark.parametrize("at", [2, 20, 39])  # alone in a segment, in the middle, in the rest read with the prompt
def test_a_document_on_which_the_model_fails_fails_alone(
    model: rmt_core.RecurrentModel, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    texts = [document(i, 40) for i in range(6)]
    clean = list(engine(model, 3).summarise(texts))
    poisoned = np.concatenate(list(texts[2].tokens))
    poisoned[at] = ord("!")
    poison_step(model, monkeypatch)
    summaries = list(engine(model, 3).summarise([*texts[:2], Document("bad", [poisoned]), *texts[3:]]))
    assert summaries[:2] + summaries[3:] == clean[:2] + clean[3:]
    assert (summaries[2].doc_id, summaries[2].text) == ("bad", "")
    assert summaries[2].error == "PoisonError: the model refuses"


def failing(after: int, error: Exception) -> Iterable[np.ndarray]:
    yield np.full(after, 97, np.int32)
    raise error


def test_a_document_whose_tokens_fail_fails_alone(model: rmt_core.RecurrentModel) -> None:
    good = [document(i, 40) for i in range(4)]
    clean = list(engine(model, 3).summarise(good))
    bad = [
        Document("first", failing(0, DocumentError("no text here"))),
        Document("late", failing(50, RuntimeError("tokenizer broke"))),
        Document("utf-8", failing(20, UnicodeDecodeError("utf-8", b"\xff", 0, 1, "not UTF-8 at byte 20"))),
        Document("empty", []),
    ]
    texts = [text for pair in zip(bad, good, strict=True) for text in pair]
    summaries = list(engine(model, 3).summarise(texts))
    assert summaries[1::2] == clean
    reasons = ["no text here", "RuntimeError: tokenizer broke", "not UTF-8 at byte 20", "the document is empty"]
    assert [summary.error for summary in summaries[::2]] == reasons
    assert summaries[2].num_tokens == 50


def test_values_that_are_not_finite_are_an_error_of_their_document(model: rmt_core.RecurrentModel) -> None:
    model = tiny_model({"kind": "rmt", "num_tokens": 2})
    with torch.no_grad():
        model.backbone.lm.get_input_embeddings().weight[ord("!")] = float("nan")
    texts = [document(0, 40), Document("whole", [np.full(40, 33)]), Document("rest", [np.full(3, 33)]), document(3, 9)]
    summaries = list(engine(model, 4).summarise(texts))
    finite = "the model's values are not finite"
    assert [summary.error for summary in summaries] == ["", finite, finite, ""]


class FailingDecoder(ByteTokenizer):
    def decode(self, ids: Iterable[int]) -> str:
        raise OSError("cannot decode")


def test_a_tokenizer_that_cannot_decode_gives_error_rows(model: rmt_core.RecurrentModel) -> None:
    summaries = list(engine(model, 2, tokenizer=FailingDecoder()).summarise(documents()[:3]))
    assert [summary.error for summary in summaries] == ["OSError: cannot decode"] * 3


class EndsWithEveryToken(ByteTokenizer):
    eos_id: int | None = None

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(str(i) for i in ids)


def test_an_end_token_ends_the_summary(model: rmt_core.RecurrentModel) -> None:
    text, tokenizer = documents()[1], EndsWithEveryToken()
    free = next(engine(model, 1, tokenizer=tokenizer).summarise([text])).text.split()
    assert len(free) == 20
    tokenizer.eos_id = int(free[7])
    ended = next(engine(model, 1, tokenizer=tokenizer).summarise([text]))
    assert ended.text.split() == free[: free.index(free[7])]
    assert ended.num_written == free.index(free[7])


class Kept:
    """A keeper in memory."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.data: bytes | None = None

    def load(self) -> bytes | None:
        return self.data

    def keep(self, data: bytes) -> None:
        self.data = data


class Killed(BaseException):
    pass


def dying(model: rmt_core.RecurrentModel, monkeypatch: pytest.MonkeyPatch, alive: float) -> list[int]:
    """Makes the model die after so many steps; the list grows by the rows of each step."""
    rows: list[int] = []
    step = type(model).step

    def counted(self: rmt_core.RecurrentModel, tokens: torch.Tensor, *args: object, **kwargs: object) -> object:
        if len(rows) >= alive:
            raise Killed
        rows.append(len(tokens))
        return step(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(model), "step", counted)
    return rows


@pytest.mark.parametrize("memory", ["none", {"kind": "rmt", "num_tokens": 2}, "armt", ["xl", "rmt"]])
@pytest.mark.parametrize("alive", [2, 9, 29])
def test_a_document_goes_on_from_its_last_state_and_ends_the_same(
    monkeypatch: pytest.MonkeyPatch, memory: object, alive: int
) -> None:
    model = tiny_model(memory)
    texts = [document(0, 25 * SEGMENT_LEN + 3), document(1, 5 * SEGMENT_LEN)]
    uninterrupted = list(engine(model, 2).summarise(texts))
    keepers = [Kept(4), Kept(4)]
    texts = [text._replace(keeper=keeper) for text, keeper in zip(texts, keepers, strict=True)]
    with monkeypatch.context() as patch:
        dying(model, patch, alive)
        if alive < 25:
            with pytest.raises(Killed):
                list(engine(model, 2).summarise(texts))
        else:
            list(engine(model, 2).summarise(texts))  # its states are there, its summary was lost
    with monkeypatch.context() as patch:
        rows = dying(model, patch, float("inf"))
        resumed = list(engine(model, 2).summarise(texts))
    assert resumed == uninterrupted
    kept = [min(alive, 25) // 4 * 4, min(alive, 5) // 4 * 4]
    read_again = sum(rows[: 25 - kept[0]])
    assert read_again == (25 - kept[0]) + (5 - kept[1])


def test_an_altered_state_is_not_believed(model: rmt_core.RecurrentModel) -> None:
    keeper = Kept(4)
    text = document(0, 10 * SEGMENT_LEN)._replace(keeper=keeper)
    clean = list(engine(model, 1).summarise([text]))
    assert keeper.data is not None
    keeper.data = keeper.data[:-1] + bytes([keeper.data[-1] ^ 1])
    assert list(engine(model, 1).summarise([text])) == clean


def test_a_text_that_is_shorter_than_what_was_read_of_it_is_an_error(model: rmt_core.RecurrentModel) -> None:
    keeper = Kept(4)
    list(engine(model, 1).summarise([document(0, 10 * SEGMENT_LEN)._replace(keeper=keeper)]))
    (found,) = engine(model, 1).summarise([document(0, 5 * SEGMENT_LEN)._replace(keeper=keeper)])
    assert found.error == "its text ends before the 8 segments that were read of it before"


def test_what_cannot_be_stored_ends_the_run(model: rmt_core.RecurrentModel) -> None:
    class Full(Kept):
        def keep(self, data: bytes) -> None:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        list(engine(model, 1).summarise([document(0, 90)._replace(keeper=Full(1))]))


def test_documents_may_be_written_about_each_in_its_way(model: rmt_core.RecurrentModel) -> None:
    ways = [Writing(PROMPT, 5, rmt_core.Sampling(), 0), Writing(PROMPT, 20, rmt_core.Sampling(1.0), 3), None]
    texts = [document(i, 40)._replace(writing=ways[i % 3]) for i in range(6)]
    together = list(engine(model, 6).summarise(texts))
    assert together == [next(engine(model, 1).summarise([text])) for text in texts]
    assert [summary.num_written for summary in together[::3]] == [5, 5]


def test_no_documents_give_no_summaries(model: rmt_core.RecurrentModel) -> None:
    assert list(engine(model, 2).summarise([])) == []
