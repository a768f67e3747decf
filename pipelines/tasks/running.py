"""Running one task at one length, wherever it is sent: the model is loaded where it is used."""

from dataclasses import dataclass, replace

from safetensors import SafetensorError

import rmt_core
from pipelines import storage
from pipelines.config import InputError
from pipelines.data.tokenise import Tokenizer, load_tokenizer
from pipelines.tasks import TASKS
from pipelines.tasks.base import Figure, Material
from pipelines.tasks.cost import Meter
from rmt_core import RecurrentModel


@dataclass(frozen=True)
class Run:
    """A task to be run: which, at which length, with which model, on which device."""

    task: str
    length: int  # tokens
    model: str  # URI of its directory
    device: str
    seed: int  # of what is drawn


def measure(run: Run, material: Material) -> list[Figure]:
    """The figures of a run, and what it cost once the model was there."""
    model, _ = load(run.model, run.device)
    meter = Meter(run.device)
    figures = TASKS[run.task].measure(model, run.length, replace(material, seed=run.seed))
    return [*figures, *meter.figures()]


def load(uri: str, device: str = "cpu") -> tuple[RecurrentModel, Tokenizer]:
    """A model and the tokenizer saved with it; InputError where they cannot be read or do not fit."""
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
