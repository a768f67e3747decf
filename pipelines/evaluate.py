"""Measure a model with memory: each task at each length, with its memory and without.

    python pipelines/evaluate.py --model DIR --task perplexity,recall --lengths 4k,64k,1m --output DIR

Every figure is measured with the true memory, with a zeroed one and with another row's; beside them stand the seconds
and the peak of memory that each task took at each length. With `--attention full` a model without memory has the whole
text in context instead, up to the length where its keys and values no longer fit. The output holds
metrics.jsonl (one figure a line), costs.jsonl (time and memory of each run), results.md, results.png and the resolved
config.json. The same command again does
nothing, or goes on where it was interrupted, or makes a table or plot again that is gone; another model or other
settings on the same output are refused.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the repository root, not from pipelines/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import difflib
import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import pydantic
import ray

from pipelines import storage
from pipelines.cluster import beside_driver, connect, pool
from pipelines.config import Config, Count, InputError, as_command, canonical_json, split_commas
from pipelines.job import run_job
from pipelines.origin import in_words, origin
from pipelines.tasks import TASKS, report, report_plot
from pipelines.tasks.base import DOES_NOT_FIT, MAX_LENGTH, QUESTIONS_VERSION, Figure, Material
from pipelines.tasks.cost import COSTS
from pipelines.tasks.held_out import open_held_out
from pipelines.tasks.report import CONFIG, COST_LINES, FORMAT, METRICS, Subject, short_length
from pipelines.tasks.running import Full, Run, check_compiler, load, measure, reading
from pipelines.tasks.subject import subject_of
from pipelines.tasks.tally import Tally

log = logging.getLogger(__name__ if __name__ != "__main__" else "pipelines.evaluate")

TABLE, PLOT, PARTIAL = "results.md", "results.png", "config.partial.json"
_OWN_NAME = re.compile(
    r"\.?((metrics|costs)\.jsonl|results\.md|results\.png|config(\.partial)?\.json|run-[a-z0-9_]+-\d+-\d+\.json)"
    r"(\.[0-9a-f]{8}\.tmp)?|SHA256SUMS"
)
_RUN_NAME = re.compile(r"run-[a-z0-9_]+-\d+-\d+\.json")  # of a task, length and seed: figures kept until all are there
_REPORT_S = 30.0  # without news for so long, the log says that work goes on
_NOT_IDENTITY = {"model", "data", "output", "num_cpus"}  # places, and what does not change a figure
_READ_BY_TASKS = {  # what a task may read: our setting -> its own
    "data": "held_out",
    "background": "background",
    "num_samples": "num_samples",
    "depths": "depths",
    "seed": "seed",
    "seeds": "seed",
    "questions": "questions",
    "limit_segments": "limit_segments",
    "compile": "compiled",
}
_POOLS: dict[str, Literal["data", "train"]] = {"cpu": "data", "cuda": "train"}  # nodes of a cluster, by device
_OF_FULL = {"memory_limit", "segment_len"}  # settings of full attention


class EvaluateConfig(Config):
    model: str = pydantic.Field(description="directory of a trained model, on disk or s3://")
    output: str = pydantic.Field(description="directory of the results, on disk or s3://")
    task: Annotated[list[str], pydantic.BeforeValidator(split_commas)] = pydantic.Field(
        ["perplexity", "recall"], min_length=1, description=f"what to measure: {', '.join(TASKS)}"
    )
    lengths: Annotated[
        list[Annotated[Count, pydantic.Field(ge=1, le=MAX_LENGTH)]], pydantic.BeforeValidator(split_commas)
    ] = pydantic.Field([4096], min_length=1, description="lengths of the texts in tokens (4k, 64k, 1m)")
    data: str | None = pydantic.Field(
        None,
        description="held-out text: a segment store or a UTF-8 text file, on disk or s3:// (none: the embedded book)",
    )
    questions: str | None = pydantic.Field(
        None,
        description="file of BABILong, RULER, LongBench or SCROLLS as published, .json(l) or .parquet, for task file",
    )
    background: Literal["prose", "noise"] = pydantic.Field(
        "prose", description="text around a fact: prose (of the held-out text) or noise (random letters)"
    )
    num_samples: Count = pydantic.Field(32, ge=1, description="questions a length")
    batch_size: int = pydantic.Field(8, ge=2, description="rows read at once; two or more, to shuffle memories")
    limit_segments: Count | None = pydantic.Field(
        None, ge=1, description="segments of held-out text read a length, all rows together (none: all)"
    )
    seed: int = pydantic.Field(0, ge=0, description="first seed of the questions")
    seeds: int = pydantic.Field(
        1, ge=1, description="so many seeds, one after another, each a run with questions of its own"
    )
    depths: Annotated[list[float], pydantic.BeforeValidator(split_commas)] = pydantic.Field(
        [],
        description="where facts stand, from 0 (earliest) to 1 (latest), in turn: accuracy by depth as a heat map "
        "(none: anywhere)",
    )
    ablations: bool = pydantic.Field(True, description="measure with zeroed and shuffled memory too")
    attention: Literal["segments", "full"] = pydantic.Field(
        "segments",
        description="segments (read one by one, with the memory) or full (of a model of memory none: every token sees "
        "the whole text before it)",
    )
    memory_limit: Count = pydantic.Field(
        4 * 1024**3,
        ge=1,
        description="bytes that keys and values of --batch-size texts may take under full attention (512m, 4g); "
        "longer texts are told not to fit",
    )
    segment_len: Count | None = pydantic.Field(
        None,
        ge=1,
        description="under full attention: tokens of the segments by which facts are placed, to ask what models of "
        "such segments are asked (none: the model's own)",
    )
    device: Literal["cpu", "cuda"] = pydantic.Field("cpu", description="where models run: cpu or cuda")
    compile: bool = pydantic.Field(False, description="on a CPU, compile what reads up to a question, to be faster")
    num_cpus: int | None = pydantic.Field(
        None, ge=1, description="cores for the Ray that is started here (none: all); the result is the same"
    )

    @pydantic.field_validator("task")
    @classmethod
    def _known(cls, tasks: list[str]) -> list[str]:
        for task in tasks:
            if task not in TASKS:
                near = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(TASKS)}"
                raise ValueError(f"there is no task {task!r}; {hint}")
        return tasks

    @pydantic.field_validator("depths")
    @classmethod
    def _within(cls, depths: list[float]) -> list[float]:
        for depth in depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"{depth} is no depth; use numbers from 0 (earliest) to 1 (latest)")
        return sorted(depths)

    @pydantic.field_validator("task", "lengths", "depths")
    @classmethod
    def _once(cls, values: list[Any]) -> list[Any]:
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"{value} is given more than once")
        return values

    @pydantic.model_validator(mode="after")
    def _nothing_ignored(self) -> "EvaluateConfig":
        read = frozenset().union(*(TASKS[task].settings for task in self.task))
        for field, setting in _READ_BY_TASKS.items():
            if field in self.model_fields_set and setting not in read:
                raise ValueError(f"--{field.replace('_', '-')} is not read by {', '.join(self.task)}; leave it out")
        if self.compile and (self.device == "cuda" or self.attention == "full"):
            raise ValueError("--compile is for --device cpu and --attention segments; leave it out")
        for field in sorted(self.model_fields_set & ({"ablations"} if self.attention == "full" else _OF_FULL)):
            raise ValueError(f"--{field.replace('_', '-')} is not read with --attention {self.attention}; leave it out")
        if self.data is not None and self.background == "noise" and "limit_segments" not in read:
            raise ValueError(f"--data is not read by {', '.join(self.task)} in noise; leave it out")
        if len(self.depths) > self.num_samples:
            raise ValueError(f"{len(self.depths)} depths for {self.num_samples} samples; set --num-samples to more")
        return self


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__
    return run_job(evaluate, EvaluateConfig, argv, prog="evaluate", description=__doc__.splitlines()[0])


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measures, or finds measured; the figures of whole lengths. Raises InputError."""
    output, model_uri = storage.absolute(config.output), storage.absolute(config.model)
    subject, material, identity = _inspect(config, model_uri)
    for field in [field for field in _READ_BY_TASKS if field in config.model_fields_set]:
        if unread := [task for task in config.task if _READ_BY_TASKS[field] not in TASKS[task].settings]:
            log.info("--%s is not read by %s", field.replace("_", "-"), ", ".join(unread))
    if (finished := _finished(output, identity)) is not None:
        return _found(config, output, subject, finished["made_by"])
    runs = _runs(config, model_uri)
    kept = _kept(output, identity, runs)
    if len(kept) < len(runs):
        with connect(config.num_cpus):
            _check_gpu(config.device)
            storage.write_json(storage.join(output, PARTIAL), identity)
            kept |= _measure(
                [run for run in runs if run not in kept], material, lambda run, found: _keep(output, run, found)
            )
    lines = [_line(run, figure, subject) for run in runs for figure in kept[run]]
    made_by = origin()
    content = {"format": FORMAT, "identity": identity, "config": config.model_dump(mode="json"), "made_by": made_by}
    for name, data in (
        (METRICS, _as_lines(line for line in lines if line["metric"] not in COSTS)),
        (COST_LINES, _as_lines(line for line in lines if line["metric"] in COSTS)),
        (TABLE, _table(config, subject, lines, made_by)),
        (PLOT, report_plot.plot(subject, lines)),
    ):
        storage.write_bytes(storage.join(output, name), data)
    storage.write_json(storage.join(output, CONFIG), {**content, "model": subject._asdict()})
    for name in storage.list_names(output):
        if name in (PARTIAL, "SHA256SUMS") or _RUN_NAME.fullmatch(name):  # checksums of what was there before
            storage.delete(storage.join(output, name))
    log.info("results in %s", storage.join(output, TABLE))
    return _summary(output, [line for line in lines if line["metric"] not in COSTS])


def _found(config: EvaluateConfig, output: str, subject: Subject, made_by: dict[str, str]) -> dict[str, Any]:
    """What was measured already; a table or plot that is gone is made again. InputError where figures are gone."""
    names = storage.list_names(output)
    for name in (METRICS, COST_LINES):
        if name not in names:
            raise InputError(
                f"{output} is a finished evaluation without {name}; put it back, give another --output or delete it"
            )
    metrics, costs = (
        [json.loads(line) for line in storage.read_bytes(storage.join(output, name)).splitlines()]
        for name in (METRICS, COST_LINES)
    )
    gone = [name for name in (TABLE, PLOT) if name not in names]
    for name in gone:
        log.info("%s is gone and made again", storage.join(output, name))
        lines = [*metrics, *costs]
        data = _table(config, subject, lines, made_by) if name == TABLE else report_plot.plot(subject, lines)
        storage.write_bytes(storage.join(output, name), data)
    if not gone:
        log.info("%s is already measured with these settings: nothing to do", output)
    return _summary(output, metrics)


def _table(config: EvaluateConfig, subject: Subject, lines: Sequence[dict[str, Any]], made_by: dict[str, str]) -> bytes:
    """With what to type for these figures."""
    words = as_command("evaluate", config, left_out=("num_cpus",))
    return f"{report.markdown(subject, lines)}\n{in_words(made_by)}:\n\n    {words}\n".encode()


def _as_lines(lines: Iterable[dict[str, Any]]) -> bytes:
    return "".join(canonical_json(line) + "\n" for line in lines).encode()


def _runs(config: EvaluateConfig, model_uri: str) -> list[Run]:
    """Each task at each length with each seed; with the first one alone where the task draws nothing."""
    return [
        Run(task, length, model_uri, config.device, config.seed + i, _full(config))
        for task in config.task
        for length in config.lengths
        for i in range(config.seeds if "seed" in TASKS[task].settings else 1)
    ]


def _full(config: EvaluateConfig) -> Full | None:
    return Full(config.memory_limit, config.segment_len) if config.attention == "full" else None


def _inspect(config: EvaluateConfig, model_uri: str) -> tuple[Subject, Material, dict[str, Any]]:
    """What is evaluated, with what, and all that decides the figures. Everything that can be refused is."""
    model, tokenizer = load(model_uri)
    if config.compile:
        check_compiler()
    try:
        reader = reading(model, _full(config))
    except ValueError as error:
        raise InputError(f"--attention full --model {model_uri}: {error}") from error
    held_out = open_held_out(config.data, tokenizer)
    fields = ("background", "num_samples", "batch_size", "limit_segments", "seed")
    questions = None if config.questions is None else storage.absolute(config.questions)
    material = Material(
        tokenizer,
        held_out,
        depths=tuple(config.depths),
        questions=questions,
        ablations=config.ablations and config.attention == "segments",
        compiled=config.compile,
        **{name: getattr(config, name) for name in fields},
    )
    for run in _runs(config, model_uri):
        TASKS[run.task].check(run.length, reader.segment_len, replace(material, seed=run.seed))
    subject = subject_of(model_uri.rpartition("/")[2], reader, held_out, range(config.seed, config.seed + config.seeds))
    unread = {"attention", *_OF_FULL} if config.attention == "segments" else set()
    unread |= {name for name, used in (("ablations", not config.ablations), ("compile", config.compile)) if not used}
    identity = {
        **config.model_dump(mode="json", exclude=_NOT_IDENTITY | unread),
        "model": subject.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "held_out": held_out.fingerprint,
        "questions_version": QUESTIONS_VERSION,
        "questions": questions and hashlib.sha256(storage.read_bytes(questions)).hexdigest(),
    }
    return subject, material, identity


def _finished(output: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The config.json there, if just this has been measured; InputError where the directory holds anything else."""
    if storage.exists(output) and not storage.is_directory(output):
        raise InputError(f"{output} is a file; --output needs a directory")
    names = storage.list_names(output)
    foreign = [name for name in names if not _OWN_NAME.fullmatch(name)]
    content = _read_config(output) if CONFIG in names and not foreign else None
    if foreign or content == {}:
        shown = foreign[0] if foreign else f"another {CONFIG}"
        raise InputError(f"{output} is not empty and no evaluation (it holds {shown}); give another --output")
    if content is not None and (differences := _differences(content["identity"], identity)):
        raise InputError(
            f"{output} is a finished evaluation made otherwise: {differences}; give another --output or delete it"
        )
    return content


def _differences(there: dict[str, Any], asked: dict[str, Any]) -> str:
    """What was asked for otherwise, in words; tasks and lengths in another order are the same."""
    return "; ".join(
        f"{name} {_shown(there.get(name))} there, {_shown(asked.get(name))} asked for"
        for name in {**there, **asked}
        if _in_order(name, there.get(name)) != _in_order(name, asked.get(name))
    )


def _in_order(name: str, value: Any) -> Any:
    return sorted(value) if name in ("task", "lengths") and isinstance(value, list) else value


def _kept(output: str, identity: dict[str, Any], runs: Sequence[Run]) -> dict[Run, list[Figure]]:
    """What an interrupted evaluation of just this has measured already."""
    names = storage.list_names(output)
    there = storage.read_json(storage.join(output, PARTIAL)) if PARTIAL in names else {}
    known = {_run_name(run): run for run in runs}
    if differences := _differences(there, identity):
        if any(_RUN_NAME.fullmatch(name) for name in names):
            raise InputError(
                f"{output} is an unfinished evaluation made otherwise: {differences}; go on with its settings, give "
                "another --output or delete it"
            )
        return {}
    kept = {
        known[name]: [
            Figure(**{**line, "value": float(line["value"])}) for line in storage.read_json(storage.join(output, name))
        ]
        for name in names
        if name in known
    }
    if kept:
        log.info("%d of %d runs are already measured", len(kept), len(runs))
    return kept


def _keep(output: str, run: Run, figures: Sequence[Figure]) -> None:
    lines = [
        {**figure._asdict(), "value": figure.value if math.isfinite(figure.value) else str(figure.value)}
        for figure in figures
    ]
    storage.write_json(storage.join(output, _run_name(run)), lines)


def _run_name(run: Run) -> str:
    return f"run-{run.task}-{run.length}-{run.seed}.json"


def _read_config(output: str) -> dict[str, Any]:
    """The config.json of a finished evaluation; nothing where it is another program's."""
    try:
        content = storage.read_json(storage.join(output, CONFIG))
    except ValueError:
        return {}
    return content if isinstance(content, dict) and content.get("format") == FORMAT else {}


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    return value[:16] if isinstance(value, str) else str(value)


# --- the work ---------------------------------------------------------------------------------------


def _check_gpu(device: str) -> None:
    """InputError where the cluster has none and no pool that grows by some."""
    if device == "cuda" and not ray.cluster_resources().get("GPU") and not pool(_POOLS[device]):
        raise InputError("--device cuda: there is no GPU here; use --device cpu, or a cluster that has one")


def _measure(
    runs: Sequence[Run], material: Material, keep: Callable[[Run, list[Figure]], None]
) -> dict[Run, list[Figure]]:
    """The figures of each run, one Ray task each, the longest first; each is kept when it ends.

    What is still running when this fails ends with the job's connection to Ray. It is not cancelled before: Ray 2.60
    aborts a driver whose task ends in the moment that it is cancelled.
    """
    num_gpus = 1 if runs[0].device == "cuda" else 0
    remote = ray.remote(num_cpus=1, num_gpus=num_gpus, label_selector=pool(_POOLS[runs[0].device]))(measure)
    shared = ray.put(material)
    tally = _start_tally()
    waiting = {remote.remote(run, shared, tally): run for run in sorted(runs, key=lambda run: -run.length)}
    there = ray.cluster_resources()
    num_at_once = _at_once(len(runs), there.get("GPU", 0) if num_gpus else there.get("CPU", 0))
    log.info("measuring %s", ", ".join(_words(run) for run in runs))
    found: dict[Run, list[Figure]] = {}
    began = time.monotonic()
    try:
        while len(found) < len(runs):
            done, rest = ray.wait([ref for ref, run in waiting.items() if run not in found], timeout=_REPORT_S)
            if not done:
                far = "".join(f"; {words}" for words in _how_far(ray.get(tally.told.remote()), found, material))
                log.info("%d of %d still to come%s (%.0f s)", len(rest), len(runs), far, time.monotonic() - began)
                continue
            run = waiting[done[0]]
            figures = ray.get(done[0])
            found[run] = [one._replace(num_at_once=num_at_once) if one.metric in COSTS else one for one in figures]
            keep(run, found[run])
            log.info(
                "%d of %d: %s (%.0f s)", len(found), len(runs), _headline(run, found[run]), time.monotonic() - began
            )
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from error
        raise
    return found


def _start_tally() -> Any:
    """Its handle. One that dies begins anew: no evaluation fails for it."""
    options = {"scheduling_strategy": beside_driver(), "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(num_cpus=0)(Tally).options(**options).remote()


def _how_far(told: Mapping[Run, int], found: Container[Run], material: Material) -> Iterator[str]:
    """What runs that are not over have read, of so much where their questions tell."""
    for run, num_read in told.items():
        if run in found:
            continue
        if "num_samples" in TASKS[run.task].settings:
            yield f"{_words(run)} {num_read / (material.num_samples * run.length):.0%} read"
        else:
            yield f"{_words(run)} {num_read:,} tokens read"


def _at_once(num_runs: int, num_devices: float) -> int:
    """How many runs may be under way at once, of which each has a core or a GPU; a pool that is idle grows."""
    return min(num_runs, max(1, int(num_devices)))


def _headline(run: Run, figures: Sequence[Figure]) -> str:
    metric = figures[0].metric
    if metric == DOES_NOT_FIT:
        return f"{_words(run)} does not fit: {figures[0].reason}"
    values = [f"{figure.memory} {figure.value:.4f}" for figure in figures if figure.metric == metric]
    return f"{_words(run)}: {metric} {', '.join(values)}"


def _words(run: Run) -> str:
    return f"{run.task} at {short_length(run.length)} (seed {run.seed})"


def _line(run: Run, figure: Figure, subject: Subject) -> dict[str, Any]:
    """A figure as a line of metrics.jsonl; a value that is no number, as a diverged model gives, is null."""
    told = {name: value for name, value in figure._asdict().items() if value is not None}
    value = float(figure.value) if math.isfinite(figure.value) else None
    about = {name: getattr(subject, name) for name in ("num_parameters", "segment_len")}
    about["state_floats"] = subject.floats_at(run.length)
    if subject.max_positions is not None and run.length > subject.max_positions:
        about["beyond_positions"] = True
    return {"task": run.task, "length": run.length, **told, "value": value, "seed": run.seed, **about}


def _summary(output: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    whole = [line for line in lines if "segment" not in line]
    return {"output": output, "metrics": whole, **{
        key: storage.join(output, name) for key, name in (("table", TABLE), ("plot", PLOT))
    }}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
