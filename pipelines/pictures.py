"""Draw what a model's memory holds, how attention reads, writes and processes it, and where a gate lets it be written.

    python pipelines/pictures.py --model DIR --task detect --background noise --length 4k --output DIR

Texts of the task begin with their facts, but for the last. slots.png and slots.md (memories rmt and memformer): what
each memory token or slot keeps, how it moves, and how well the fact can be read from it. attention.png,
attention_by_layer.png and attention.md (memories that are rows among the text's): where attention goes in the segment
that asks. writes.png and writes.md (rmt with a binary gate): which segments write the memory of texts whose facts stand
anywhere, how answers fare where others than those of the facts do, and how these begin. Earlier pictures in the same
directory are replaced.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the repository root, not from pipelines/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic
import torch

import rmt_core
from pipelines import storage
from pipelines.claim import refuse_runs
from pipelines.config import Config, Count, InputError, as_command, split_commas
from pipelines.data.tokenise import Tokenizer
from pipelines.job import run_job
from pipelines.origin import in_words, origin
from pipelines.tasks import TASKS, attention, slots, slots_picture, writes, writes_picture
from pipelines.tasks.base import MAX_LENGTH, device_of, segments
from pipelines.tasks.held_out import open_held_out
from pipelines.tasks.report import in_background
from pipelines.tasks.running import load
from pipelines.tasks.samples import Wanted, segment_start
from pipelines.tasks.slots_picture import Shown
from pipelines.tasks.texts import Background, cut, noise, prose
from rmt_core import RecurrentModel

log = logging.getLogger(__name__ if __name__ != "__main__" else "pipelines.pictures")

SLOTS = SLOTS_PLOT, SLOTS_TABLE = "slots.png", "slots.md"
ATTENTION = MAPS, BY_LAYER, ATTENTION_TABLE = "attention.png", "attention_by_layer.png", "attention.md"
WRITES = WRITES_PLOT, WRITES_TABLE = "writes.png", "writes.md"
TABLES = (SLOTS_TABLE, ATTENTION_TABLE, WRITES_TABLE)
OWN_NAMES = (*SLOTS, *ATTENTION, *WRITES)
_READ_OTHERWISE = "armt is read through associations, not by attention"


class PicturesConfig(Config):
    model: str = pydantic.Field(description="directory of a trained model, on disk or s3://")
    output: str = pydantic.Field(description="directory of the pictures and tables, on disk or s3://")
    pictures: Annotated[list[Literal["slots", "attention", "writes"]], pydantic.BeforeValidator(split_commas)] = (
        pydantic.Field([], description="what to draw: slots, attention, writes (none: what the model's memory allows)")
    )
    task: str = pydantic.Field("detect", description="task whose texts are read, with facts at chosen depths")
    length: Count = pydantic.Field(4096, ge=1, le=MAX_LENGTH, description="length of the texts in tokens (4k, 64k, 1m)")
    background: Literal["prose", "noise"] = pydantic.Field(
        "prose", description="text around a fact: prose (of the held-out text) or noise (random letters)"
    )
    data: str | None = pydantic.Field(
        None, description="held-out text: a segment store or a UTF-8 text file (none: the embedded book)"
    )
    num_texts: Count = pydantic.Field(256, ge=8, description="texts that are read, which read-outs are fitted to")
    batch_size: int = pydantic.Field(32, ge=2, description="texts read at once")
    seed: int = pydantic.Field(0, ge=0, description="seed of the texts")
    device: Literal["cpu", "cuda"] = pydantic.Field("cpu", description="where the model runs: cpu or cuda")

    @pydantic.model_validator(mode="after")
    def _nothing_ignored(self) -> "PicturesConfig":
        if not _has_background(self.task):
            for field in sorted(self.model_fields_set & {"background", "data"}):
                raise ValueError(f"--{field} is not read by {self.task}; leave it out")
        if self.data is not None and self.background == "noise":
            raise ValueError("--data is not read in noise; leave it out")
        return self


def _has_background(task: str) -> bool:
    return task not in TASKS or "background" in TASKS[task].settings


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__
    return run_job(draw, PicturesConfig, argv, prog="pictures", description=__doc__.splitlines()[0])


def draw(config: PicturesConfig) -> dict[str, Any]:
    """Reads texts and draws; where the pictures and tables are. Raises InputError."""
    uri, output = storage.absolute(config.model), storage.absolute(config.output)
    refuse_runs(output)
    model, tokenizer = load(uri, config.device)
    texts = _texts(config, model, tokenizer)
    chosen = _chosen(
        config,
        {
            "slots": lambda: _check_slots(model, texts),
            "attention": lambda: _check_attention(model, texts),
            "writes": lambda: _told(config, model, tokenizer),
        },
    )
    task = in_background(config.task, [config.background] if _has_background(config.task) else [])
    about = f"{uri.rpartition('/')[2]}: {task}, texts of {config.length:,} tokens"
    files: dict[str, bytes] = {}
    if "slots" in chosen:
        files |= _slots(config, model, texts, about)
    if "attention" in chosen:
        files |= _attention(config, model, texts, about)
    if "writes" in chosen:
        files |= _writes(config, model, chosen["writes"], tokenizer, about)
    end = _about_model(config, model, about).encode()
    for name, data in files.items():
        storage.write_bytes(storage.join(output, name), data + end if name in TABLES else data)
    for name in [name for name in storage.list_names(output) if name in OWN_NAMES and name not in files]:
        log.info("%s of earlier pictures is deleted", storage.join(output, name))
        storage.delete(storage.join(output, name))
    return {"output": output, "pictures": list(chosen), "files": [storage.join(output, name) for name in files]}


def _about_model(config: PicturesConfig, model: RecurrentModel, about: str) -> str:
    """The end of a page: of which model the pictures are, and what to type for them."""
    which = f"Model `{rmt_core.fingerprint(model)[:16]}`, {about}."
    return f"\n{which} {in_words(origin())}:\n\n    {as_command('pictures', config)}\n"


def _chosen(config: PicturesConfig, checks: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """What is drawn, with what its check has made. InputError where what was asked for, or anything, is not allowed."""
    made, refusals = {}, {}
    for name in config.pictures or checks:
        try:
            made[name] = checks[name]()
        except InputError as error:
            refusals[name] = str(error)
    if refusals and (config.pictures or not made):
        raise InputError("; ".join(refusals.values()))
    for reason in refusals.values():
        log.info("left out: %s", reason)
    return made


def _check_slots(model: RecurrentModel, texts: slots.Texts) -> None:
    slots.check(model)
    slots.check_facts(texts)


def _check_attention(model: RecurrentModel, texts: slots.Texts) -> None:
    kinds = " with ".join(settings["kind"] for settings in model.config.memory)
    if not model.memory.has_rows_only:
        raise InputError(f"attention: memory {kinds} is not rows among the text's; use rmt or armt")
    if not model.memory.rows_before and not model.memory.rows_after:
        raise InputError(f"attention: memory {kinds} has no rows to read or write; use rmt or armt")


def _told(config: PicturesConfig, model: RecurrentModel, tokenizer: Tokenizer) -> writes.Told:
    """Texts with their facts anywhere. InputError where the memory or the task do not allow it."""
    wanted = Wanted(config.length, model.segment_len)
    try:
        writes.check(model)
        return writes.make_texts(
            config.task, tokenizer, _background(config, tokenizer), wanted, config.num_texts, config.seed
        )
    except InputError as error:
        raise InputError(f"writes: {error}") from error


def _background(config: PicturesConfig, tokenizer: Tokenizer) -> Background:
    return noise(tokenizer) if config.background == "noise" else prose(open_held_out(config.data, tokenizer))


def _texts(config: PicturesConfig, model: RecurrentModel, tokenizer: Tokenizer) -> slots.Texts:
    wanted = Wanted(config.length, model.segment_len)
    background = _background(config, tokenizer)
    return slots.make_texts(config.task, tokenizer, background, wanted, config.num_texts, config.seed)


def _slots(config: PicturesConfig, model: RecurrentModel, texts: slots.Texts, about: str) -> dict[str, bytes]:
    trace = slots.record(model, texts, config.batch_size)
    found = slots.read_out(trace, texts.facts)
    shown = Shown(about, "slot" if model.config.memory[0]["kind"] == "memformer" else "token")
    return {
        SLOTS_PLOT: slots_picture.plot(trace, found, shown),
        SLOTS_TABLE: slots_picture.table(trace, found, shown).encode(),
    }


def _writes(
    config: PicturesConfig, model: RecurrentModel, told: writes.Told, tokenizer: Tokenizer, about: str
) -> dict[str, bytes]:
    found = writes.record(model, told, tokenizer, config.batch_size)
    return {
        WRITES_PLOT: writes_picture.plot(found, f"{about}: where the memory is written"),
        WRITES_TABLE: writes_picture.table(found).encode(),
    }


@torch.inference_mode()
def _attention(config: PicturesConfig, model: RecurrentModel, texts: slots.Texts, about: str) -> dict[str, bytes]:
    """Of the segment that asks, up to the answer, after all before it: maps of the first text, shares over those of the
    first batch that ask in the same segment as it.
    """
    samples = texts.samples[: config.batch_size]
    asking = [cut(sample.stream(), sample.answers[0].at) for sample in samples]
    last_start = segment_start(samples[0].answers[0].at, model.segment_len)
    state = model.init_state(len(samples))
    for part in segments(asking, model.segment_len, device_of(model)):
        if part.start == last_start:
            break
        state = model.step(part.tokens, state, part.lengths)[1]
    lengths = part.tokens.new_full((len(samples),), part.tokens.shape[1]) if part.lengths is None else part.lengths
    starts = [segment_start(sample.answers[0].at, model.segment_len) for sample in samples]
    rows = [row for row, start in enumerate(starts) if start == last_start]
    before, tokens, lengths = rmt_core.state.select(state, rows), part.tokens[rows], lengths[rows]
    masses = rmt_core.mean_over_heads(rmt_core.attention_mass(model, tokens, before, lengths))
    maps = rmt_core.attention_maps(model, tokens[0, : int(lengths[0])], rmt_core.state.select(before, [0]))
    by_head = maps.weights.shape[0] * maps.weights.shape[1] <= attention.MAX_PANELS  # else one a layer
    title = f"{about}, the segment that asks (its {int(lengths[0])} tokens up to the answer)"
    table = attention.mass_table(masses)
    if any(settings["kind"] == "armt" for settings in model.config.memory):
        title = f"{title}; {_READ_OTHERWISE}"
        table = f"{table}\nNot shown: {_READ_OTHERWISE}.\n"
    return {
        MAPS: attention.heat_maps(maps, title, by_head=by_head),
        BY_LAYER: attention.mass_chart(masses, f"{title}, mean of {len(rows)} texts and of heads"),
        ATTENTION_TABLE: table.encode(),
    }


if __name__ == "__main__":
    sys.exit(main())
