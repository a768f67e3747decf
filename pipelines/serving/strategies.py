"""The strategies by name, and what a job has to know to use one.

memory       a model with recurrent memory reads the text segment by segment, then writes
rolling      an instruct model reads it in pieces, its summary so far before each
map_reduce   an instruct model summarises pieces, then summaries, until one is left
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

import rmt_core
from pipelines import storage
from pipelines.config import InputError
from pipelines.data.batch_requests import Request
from pipelines.data.read import UnreadableError
from pipelines.data.tokenise import LossyTextError, Tokenizer, encode_chunks, load_tokenizer
from pipelines.serving import instruct
from pipelines.serving.asking import Asking
from pipelines.serving.batch import BatchEngine, Document, Writing
from pipelines.serving.documents import DocumentError, Strategy, Style, Summary, Text
from pipelines.serving.instruct import InstructModel
from pipelines.serving.rereading import DEFAULT_PIECE_LEN, INSTRUCTION

MEMORY = "memory"
STRATEGIES = (MEMORY, "rolling", "map_reduce")
_PROMPT = "\n\nSummary: "
_EVERY = {MEMORY: 128}  # segments between stored states: about a minute's worth of a small model
_EVERY_PIECE = 1  # of the others, whose pieces take seconds


class Settings(NamedTuple):
    """What a worker needs to know."""

    model: str  # URI of the model's directory
    strategy: str
    prompt: str
    style: Style
    batch_size: int  # documents read side by side
    segment_len: int | None  # tokens of a piece; None where the model decides
    device: str


class Subject(NamedTuple):
    """A model as a strategy uses it."""

    model: str  # fingerprints
    tokenizer: str
    prompt: str  # the strategy's own where none was given
    segment_len: int | None


class Loaded(NamedTuple):
    """A model with memory and its tokenizer."""

    model: rmt_core.RecurrentModel
    tokenizer: Tokenizer
    fingerprint: str


def look_at(settings: Settings, prompt: str | None) -> Subject:
    """What a strategy is used with; InputError where the model cannot serve it."""
    _check_kind(settings)
    if settings.strategy == MEMORY:
        loaded = load(settings.model)
        own = prompt if prompt is not None else _PROMPT
        return Subject(loaded.fingerprint, loaded.tokenizer.fingerprint, own, None)
    own = prompt if prompt is not None else INSTRUCTION
    model = InstructModel(settings.model)
    asking = Asking(model, settings.strategy, own, settings.segment_len, 1)
    asking.check(settings.style.max_new_tokens)
    return Subject(*model.fingerprints, own, settings.segment_len or DEFAULT_PIECE_LEN)


def _check_kind(settings: Settings) -> None:
    plain = instruct.is_plain(settings.model)
    if settings.strategy == MEMORY and plain:
        raise InputError(
            f"model {settings.model} is a plain Hugging Face model, which has no memory; use --strategy rolling or "
            "map_reduce, or train one with memory from it"
        )
    if settings.strategy != MEMORY and not plain:
        raise InputError(
            f"--strategy {settings.strategy} needs the Hugging Face directory of an instruct model; {settings.model} "
            "is a model with memory: use --strategy memory"
        )
    if settings.strategy == MEMORY and settings.segment_len is not None:
        raise InputError("--segment-len is for rolling and map_reduce; a model with memory has its own segments")


def open_strategy(settings: Settings) -> tuple[Strategy, str]:
    """The strategy, ready to read, and its model's fingerprint."""
    if settings.strategy == MEMORY:
        loaded = load(settings.model, settings.device)
        return MemoryStrategy(loaded, settings), loaded.fingerprint
    model = InstructModel(settings.model, settings.device)
    asking = Asking(model, settings.strategy, settings.prompt, settings.segment_len, settings.batch_size)
    return asking, model.fingerprints.model


def style_of(style: Style, request: Request | None) -> Style:
    """The job's style with what a batch request says of its own."""
    if request is None:
        return style
    sampling = style.sampling
    temperature = sampling.temperature if request.temperature is None else request.temperature
    top_p = sampling.top_p if request.top_p is None else request.top_p
    return Style(
        max_new_tokens=request.max_new_tokens or style.max_new_tokens,
        sampling=rmt_core.Sampling(temperature, top_p),
        seed=style.seed if request.seed is None else request.seed,
    )


def default_every(strategy: str) -> int:
    """Segments between stored states."""
    return _EVERY.get(strategy, _EVERY_PIECE)


# --- memory -----------------------------------------------------------------------------------------


def load(uri: str, device: str = "cpu") -> Loaded:
    """The model in a directory on disk or S3, with its tokenizer; InputError where they are not there or do not fit."""
    with storage.local_directory(uri) as directory:
        try:
            model = rmt_core.load(directory, device)
        except Exception as error:  # a damaged file raises whatever its library likes
            raise InputError(f"model {uri} cannot be loaded: {error}") from error
        try:
            tokenizer = load_tokenizer(str(directory))
        except InputError as error:
            raise InputError(f"model {uri} needs its tokenizer beside it: {error}") from error
    vocab_size = model.backbone.lm.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"model {uri} has {vocab_size} token embeddings, its tokenizer {tokenizer.vocab_size} tokens; save the "
            "model with the tokenizer that it was trained with"
        )
    return Loaded(model, tokenizer, rmt_core.fingerprint(model))


class MemoryStrategy:
    """The batch engine over texts."""

    def __init__(self, loaded: Loaded, settings: Settings) -> None:
        self.num_rows = settings.batch_size
        self._tokenizer = loaded.tokenizer
        self._prompt = loaded.tokenizer.encode(settings.prompt).tolist()
        self._engine = BatchEngine(loaded.model, loaded.tokenizer, self._writing(settings.style), settings.batch_size)

    def summarise(self, documents: Iterable[Text]) -> Iterator[Summary]:
        """One summary a document, in the documents' order."""
        return self._engine.summarise(
            Document(text.doc_id, _tokens(self._tokenizer, text.chunks), self._writing(text.style), text.keeper)
            for text in documents
        )

    def _writing(self, style: Style) -> Writing:
        return Writing(self._prompt, style.max_new_tokens, style.sampling, style.seed)


def _tokens(tokenizer: Tokenizer, chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
    try:
        yield from encode_chunks(tokenizer, chunks)
    except (UnreadableError, LossyTextError) as error:
        raise DocumentError(str(error)) from error


def describe_style(style: Style) -> dict[str, Any]:
    """The style as JSON values."""
    return {
        "max_new_tokens": style.max_new_tokens,
        "temperature": style.sampling.temperature,
        "top_p": style.sampling.top_p,
        "seed": style.seed,
    }
