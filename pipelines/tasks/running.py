"""Running one task at one length, wherever it is sent: the model is loaded where it is used."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

import rmt_core
from pipelines import storage
from pipelines.config import InputError
from pipelines.data.tokenise import Tokenizer, load_tokenizer
from pipelines.tasks import TASKS
from pipelines.tasks.base import DOES_NOT_FIT, Figure, Material
from pipelines.tasks.cost import Meter
from pipelines.tasks.tally import Teller
from rmt_core import DoesNotFitError, FullContext, RecurrentModel


class Full(NamedTuple):
    """Reading with full attention."""

    max_bytes: int  # that keys and values of the texts read at once may take
    segment_len: int | None = None  # of the segments by which facts are placed; None: the model's


@dataclass(frozen=True)
class Run:
    """A task to be run: which, at which length, with which model, on which device."""

    task: str
    length: int  # tokens
    model: str  # URI of its directory
    device: str
    seed: int  # of what is drawn
    full: Full | None = None  # None: segment by segment


def measure(run: Run, material: Material, tally: Any = None) -> list[Figure]:
    """The figures of a run, and what it cost once the model was there; or why the texts do not fit.

    `tally`, the handle of an actor of `Tally`, is told how many tokens are read.
    """
    if tally is not None:
        material = replace(material, on_read=Teller(partial(tally.tell.remote, run)))
    model, _ = load(run.model, run.device)
    reader = reading(model, run.full)
    task = TASKS[run.task]
    background = material.background if "background" in task.settings else None
    meter = Meter(run.device)
    try:
        figures = task.measure(reader, run.length, replace(material, seed=run.seed))
    except DoesNotFitError as error:
        return [Figure(DOES_NOT_FIT, float(error.num_bytes), reason=str(error), background=background)]
    figures = [figure._replace(background=background) for figure in figures]
    num_texts = _num_texts(figures, run.length)
    costs = [figure._replace(num_texts=num_texts, background=background) for figure in meter.figures()]
    return [*figures, *costs]


def check_compiler() -> None:
    """InputError where this machine cannot compile: torch would tell so in the middle of a text."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise InputError(
            "--compile needs a C++ compiler on the path (g++, or what CXX names); install one, or leave it out"
        )


def reading(model: RecurrentModel, full: Full | None) -> RecurrentModel:
    """The model as it reads. Raises ValueError where it cannot with full attention."""
    return model if full is None else FullContext(model, **full._asdict())


def _num_texts(figures: Sequence[Figure], length: int) -> float:
    """How many were read: samples, or, as documents end anywhere, what held-out text makes in texts of this length."""
    first = figures[0]
    if first.num_read is not None:
        return first.num_read / length
    assert first.num_samples is not None
    return first.num_samples


def load(uri: str, device: str = "cpu") -> tuple[RecurrentModel, Tokenizer]:
    """A model and the tokenizer saved with it; InputError where they cannot be read or do not fit."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no GPU here; use --device cpu")
    if not storage.is_directory(uri):
        raise InputError(f"--model {uri}: there is no such directory; give one written by train or rmt_core.save")
    with storage.local_directory(uri) as directory:
        try:
            model = rmt_core.load(directory, device)
        except (ValueError, SafetensorError) as error:
            raise InputError(f"--model {uri}: {str(error).replace(str(directory), uri)}") from error
        tokenizer = load_tokenizer(str(directory))
    size = model.backbone.vocab_size
    if tokenizer.vocab_size > size:  # a model may have more ids than its tokenizer: padding
        raise InputError(
            f"--model {uri}: its tokenizer has {tokenizer.vocab_size} ids, its vocabulary {size}; save the model "
            "with its own tokenizer"
        )
    return model, tokenizer
