"""The strategies by name, and what a job has to know to use one.

memory       a model with recurrent memory reads the text segment by segment, then writes
rolling      an instruct model reads it in pieces, its summary so far before each
map_reduce   an instruct model summarises pieces, then summaries, until one is left
"""

from typing import Any, NamedTuple

import rmt_core
from pipelines.config import InputError
from pipelines.data.batch_requests import Request
from pipelines.serving.loading import load
from pipelines.summarising import instruct
from pipelines.summarising.asking import Asking
from pipelines.summarising.documents import Strategy, Style
from pipelines.summarising.instruct import InstructModel
from pipelines.summarising.memory import MemoryStrategy
from pipelines.summarising.rereading import DEFAULT_PIECE_LEN, INSTRUCTION

MEMORY = "memory"
STRATEGIES = (MEMORY, "rolling", "map_reduce")
PROMPT = "\n\nSummary: "  # of the strategy `memory`
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


def look_at(settings: Settings, prompt: str | None) -> Subject:
    """What a strategy is used with; InputError where the model cannot serve it."""
    _check_kind(settings)
    if settings.strategy == MEMORY:
        loaded = load(settings.model)
        own = prompt if prompt is not None else PROMPT
        return Subject(loaded.fingerprint, loaded.tokenizer.fingerprint, own, None)
    own = prompt if prompt is not None else INSTRUCTION
    model = InstructModel(settings.model)
    asking = Asking(model, settings.strategy, own, settings.segment_len, 1)
    asking.check(settings.style.max_new_tokens)
    return Subject(*model.fingerprints, own, settings.segment_len or DEFAULT_PIECE_LEN)


def default_strategy(model: str) -> str:
    """Of a model's directory: `memory` where it has one, else `rolling`. InputError where it holds no model."""
    return "rolling" if instruct.is_plain(model) else MEMORY


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
        return MemoryStrategy(loaded, settings.prompt, settings.batch_size), loaded.fingerprint
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


def describe_style(style: Style) -> dict[str, Any]:
    """The style as JSON values."""
    return {
        "max_new_tokens": style.max_new_tokens,
        "temperature": style.sampling.temperature,
        "top_p": style.sampling.top_p,
        "seed": style.seed,
    }
