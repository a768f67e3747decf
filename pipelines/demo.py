"""The whole path on the embedded books, as the commands that a user would give: what `make demo` runs.

    python pipelines/demo.py                       # in runs/demo
    python pipelines/demo.py --fast                # a few steps only: shows that it runs; its figures mean nothing

Prepares four novels, trains the recipe `tiny` on them, evaluates the model on a fifth novel that it has not seen and
summarises that novel. Ends with a table of what the memory is good for. Stages that are done already say so and do
nothing, an interrupted one goes on; a stage that fails ends the demo with its exit code.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the repository root, not from pipelines/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

import pydantic

from pipelines import storage
from pipelines.cluster import connect, environment
from pipelines.config import Config, build
from pipelines.job import run_job
from pipelines.recipes import RECIPES
from pipelines.training.settings import TrainConfig

RECIPE = "tiny"
FOLDER = Path(__file__).resolve().parent
HELD_OUT = FOLDER / "books" / "heldout" / "persuasion.txt"

_MEMORIES = ("true", "zeroed", "shuffled")
_EFFORT = "--num-samples 128 --batch-size 32 --limit-segments 2048"  # of evaluate: about half a minute on two cores
_FAST_STEPS = "curriculum.num_segments 1 2 curriculum.steps 2 2 curriculum.advance_below none report.log_every 2"
_FAST_BYTES = 4096  # of the held-out book


class DemoConfig(Config):
    output: str | None = pydantic.Field(
        None, description="directory of everything that is made (none: runs/demo, with --fast runs/demo-fast)"
    )
    fast: bool = pydantic.Field(False, description="a few steps and samples only, to see that it runs")


class Stage(NamedTuple):
    """One job of the demo."""

    job: str
    purpose: str
    settings: str  # words of the command line
    places: dict[str, str]  # and its options that are places: --output, and what is read

    def arguments(self) -> list[str]:
        options = [word for name, place in self.places.items() for word in (f"--{name}", place)]
        return [*self.settings.split(), *options]


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__
    return run_job(demo, DemoConfig, argv, prog="demo", description=__doc__.splitlines()[0])


def demo(config: DemoConfig) -> dict[str, Any]:
    """Runs the stages and tells what came out. SystemExit with the exit code of a stage that fails."""
    began = time.monotonic()
    output = storage.absolute(config.output or ("runs/demo-fast" if config.fast else "runs/demo"))
    recipe = build(TrainConfig, RECIPES[RECIPE])
    stages = _stages(output, recipe, fast=config.fast)
    with connect():  # one Ray for all stages
        results = {stage.job: _run_stage(stage, f"[{n}/{len(stages)}]") for n, stage in enumerate(stages, 1)}
    trained, evaluated, summarised = results["train"], results["evaluate"], results["summarise"]
    subject = storage.read_json(storage.join(evaluated["output"], "config.json"))["model"]
    lines = [
        json.loads(line) for line in storage.read_bytes(storage.join(evaluated["output"], "metrics.jsonl")).splitlines()
    ]
    elapsed_s = time.monotonic() - began
    _tell("\n" + "\n".join([*_tables(lines, subject, recipe), *_course(trained, config.fast)]))
    _tell(f"\nplot         {evaluated['plot']}\nsummaries    {storage.join(summarised['output'], 'summaries.jsonl')}")
    _tell(f"model        {trained['checkpoint']}\ntotal time   {elapsed_s:.0f} s")
    return {
        **summarised,
        "tokens_per_s": trained["tokens_per_s"],
        "peak_memory_bytes": trained["peak_memory_bytes"],
        "checkpoint": trained["checkpoint"],
        "loss": trained["loss"],
        **_headlines(evaluated["metrics"]),
        "plot": evaluated["plot"],
        "elapsed_s": round(elapsed_s, 1),
    }


def _stages(output: str, recipe: TrainConfig, *, fast: bool) -> list[Stage]:
    """What is run, with lengths in segments of the recipe."""
    store, train, evaluation, summaries = (
        storage.join(output, name) for name in ("store", "train", "evaluate", "summaries")
    )
    model, held_out = storage.join(train, "model"), str(HELD_OUT)
    size = recipe.segment_len
    lengths = ",".join(str(size * segments) for segments in ((2, 4) if fast else (2, 8, 32, 128)))
    effort = "--num-samples 8 --batch-size 8 --limit-segments 64" if fast else _EFFORT
    if fast:
        held_out = storage.join(output, "held_out.txt")
        storage.write_bytes(held_out, HELD_OUT.read_bytes()[:_FAST_BYTES])
    return [
        Stage(
            "prepare",
            f"four novels as bytes, in segments of {size}",
            f"--tokenizer bytes --segment-len {size}",
            {"input": str(FOLDER / "books" / "train"), "output": store},
        ),
        Stage(
            "train",
            f"the recipe {RECIPE}: book text, and texts with a planted fact that is asked for at their end",
            f"{RECIPE} {_FAST_STEPS if fast else ''}",
            {"data": store, "output": train},
        ),
        Stage(
            "evaluate",
            "a novel not trained on: its loss, and facts hidden in it, with true, zeroed and shuffled memory",
            f"--task perplexity,recall --lengths {lengths} {effort}",
            {"model": model, "output": evaluation},
        ),
        Stage(
            "summarise",
            "the same novel, read from its first byte to its last with a memory of constant size",
            "--temperature 0.7 --top-p 0.9",
            {"model": model, "input": held_out, "output": summaries},
        ),
    ]


# --- running a stage --------------------------------------------------------------------------------


def _run_stage(stage: Stage, number: str) -> dict[str, Any]:
    """What a job printed as its result; SystemExit with its exit code where it fails."""
    _tell(f"\n{number} {stage.job}: {stage.purpose}")
    _tell(f"      output in {stage.places['output']}")
    _tell(f"      $ {shlex.join(['python', f'pipelines/{stage.job}.py', *stage.arguments()])}")
    began = time.monotonic()
    code, printed = _run([sys.executable, str(FOLDER / f"{stage.job}.py"), *stage.arguments()])
    elapsed_s = time.monotonic() - began
    if code != 0:
        _tell(f"demo: {stage.job} ended with exit code {code} after {elapsed_s:.0f} s")
        raise SystemExit(code)
    _tell(f"      {stage.job} done in {elapsed_s:.0f} s")
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return result


def _run(command: Sequence[str]) -> tuple[int, str]:
    """Exit code and stdout of a command; wishes to end that reach this process are handed on to it, once each.

    The command has a process group of its own: Ctrl-C at a terminal would else reach it twice.
    """
    asked: list[int] = []
    started: list[subprocess.Popen[str]] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in started:
            process.send_signal(number)

    wishes = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in wishes}
    heard = [number for number in wishes if before[number] is not signal.SIG_IGN]  # ignored: nohup
    for wish in heard:
        signal.signal(wish, hand_on)
    try:
        with subprocess.Popen(
            command, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, process_group=0
        ) as process:
            started.append(process)
            for number in asked:  # came while it was being started
                process.send_signal(number)
            printed, _ = process.communicate()
    finally:
        for wish in heard:
            signal.signal(wish, before[wish])
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return (128 + asked[0] if asked and not code else code), printed


# --- telling what came out --------------------------------------------------------------------------


def _headlines(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of evaluate's figures the loss at the greatest length by memory, and accuracy by length and memory."""
    losses = [figure for figure in figures if figure["metric"] == "loss"]
    longest = max(figure["length"] for figure in losses)
    accuracy: dict[str, dict[str, float]] = {}
    for figure in figures:
        if figure["metric"] == "accuracy":
            accuracy.setdefault(str(figure["length"]), {})[figure["memory"]] = figure["value"]
    return {
        "held_out_loss": {figure["memory"]: figure["value"] for figure in losses if figure["length"] == longest},
        "recall_accuracy": accuracy,
    }


def _tables(lines: Sequence[dict[str, Any]], subject: dict[str, Any], recipe: TrainConfig) -> Iterator[str]:
    """Loss by segment index and accuracy of recall, each with true, zeroed and shuffled memory."""
    size = subject["segment_len"]
    yield f"held-out text: {subject['held_out']}; memory {subject['memory']}, {subject['state_floats']} numbers"
    yield f"segments of {size} tokens; training windows of at most {max(recipe.curriculum.num_segments)}"
    curves = [line for line in lines if line["metric"] == "loss_by_segment"]
    longest = max(line["length"] for line in curves)
    curves = [line for line in curves if line["length"] == longest]
    num_rows = curves[-1]["num_samples"]
    yield f"\nloss by segment index, nats per token (texts of {longest} tokens, {num_rows} of them)"
    bins = list(_bins(longest // size))
    yield _row("memory", (f"{a}" if a + 1 == b else f"{a}-{b - 1}" for a, b in bins))
    for memory in _MEMORIES:
        mine = {line["segment"]: line for line in curves if line["memory"] == memory}
        yield _row(memory, (_mean([mine[i] for i in range(a, b)]) for a, b in bins))
    answers = [line for line in lines if line["task"] == "recall" and line["metric"] == "accuracy"]
    lengths = sorted({line["length"] for line in answers})
    of = answers[0]
    yield f"\nrecall accuracy (guessing gives {of['chance']:.4f}; {of['num_samples']} samples a length)"
    yield _row("segments", (str(length // size) for length in lengths))
    for memory in _MEMORIES:
        found = {line["length"]: line["value"] for line in answers if line["memory"] == memory}
        yield _row(memory, (f"{found[length]:.3f}" for length in lengths))
    widest = max(max(line["high"] - line["value"], line["value"] - line["low"]) for line in answers)
    yield f"95 % intervals reach at most {widest:.2f} to either side"


def _bins(num_segments: int) -> Iterator[tuple[int, int]]:
    """Ranges of segment indices, the first ones single: 0, 1, 2, 3, 4-7, 8-15, ..."""
    start, stop = 0, 1
    while start < num_segments:
        yield start, min(stop, num_segments)
        start, stop = stop, stop + 1 if stop < 4 else stop * 2


def _mean(lines: Sequence[dict[str, Any]]) -> str:
    """The mean of figures, weighted by the tokens that they are means over; a figure that is no number shows."""
    if any(line["value"] is None for line in lines):
        return "nan"
    total = sum(line["num_tokens"] for line in lines)
    return f"{sum(line['value'] * line['num_tokens'] for line in lines) / total:.3f}"


def _row(name: str, cells: Iterator[str]) -> str:
    return f"  {name:<10}" + "".join(f"{cell:>9}" for cell in cells)


def _course(trained: dict[str, Any], fast: bool) -> Iterator[str]:
    loss = "no number: it diverged" if trained["loss"] is None else f"{trained['loss']:.3f} nats per token"
    yield (
        f"\ntraining: {trained['num_steps']} steps, {trained['tokens_per_s']:.0f} tokens/s, peak memory of a worker "
        f"{trained['peak_memory_bytes'] / 1e6:.0f} MB, last loss {loss}"
    )
    if fast:
        yield "run with --fast: the model has learned nothing, and these figures mean nothing"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
