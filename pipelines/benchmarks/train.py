"""The training job against a bare PyTorch loop, its scaling, its checkpoints, and the memory of each ZeRO stage.

One run is done three ways: by a plain loop, by the job with one worker and by the job with two that share its rows.
All three must end with the same model. Whatever is timed is a command or a process of its own, as a user starts it.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import rmt_core
from rmt_core.checkpoint import tensors_of

from .measuring import Job, tell

_ROOT = Path(__file__).resolve().parents[2]

# The promises. Where a missed one rests on times that the machine does not give reliably, it is inconclusive.
MAX_OVERHEAD = 0.05  # of Ray Train and DeepSpeed over the bare loop, in time a step
MIN_EFFICIENCY = 0.9  # of two workers: tokens a second of the two, to twice those of one
MAX_MEMORY_ERROR = 0.10  # of the plan's estimate, to the measured peak
MAX_DIFFERENCE = 1e-3  # between weights of the ways: AdamW divides by the root of small moments, which rounding moves
MAX_AA = 0.03  # how far the best rates of equal runs may be apart, and a machine from doing two loops as fast as one


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    width: int = 256
    num_layers: int = 4
    segment_len: int = 128
    num_rows: int = 8
    num_segments: int = 2
    num_steps: int = 24
    log_every: int = 3  # steps between two times that are told, of which the best counts; the first is warming up
    num_turns: int = 48  # steps that the loop and the job's worker take in turns, of which the first two are warming up
    repeats: int = 2  # of each way, at least 2: equal runs tell how far times can be trusted
    large_width: int = 512  # of the model whose checkpoints and memory are measured: its states dwarf what is beside
    large_layers: int = 8
    stages: tuple[int, ...] = (0, 1, 2, 3)  # of ZeRO, whose memory is measured


QUICK = Sizes(
    width=32,
    num_layers=2,
    segment_len=32,
    num_rows=2,
    num_steps=4,
    log_every=1,
    num_turns=8,
    repeats=1,
    large_width=64,
    stages=(3,),
)


def sizes(device: str, quick: bool) -> Sizes:
    """The full sizes, or tiny ones."""
    return QUICK if quick else Sizes()


def train(job: Job) -> dict[str, Any]:
    """All figures, and which promises are kept."""
    with tempfile.TemporaryDirectory(prefix="rmt-benchmark-") as name:
        turns, speed = _turns(job, Path(name)), _speed(job, Path(name))
        checkpoint, memory = _checkpoint(job, Path(name)), _memory(job, Path(name))
    verdicts = turns.pop("verdicts") | speed.pop("verdicts")
    verdicts["resumed_is_the_same_to_the_bit"] = checkpoint["resumed_difference"] == 0
    for stage, row in memory.items():
        verdicts[f"memory_{stage}"] = abs(row["ratio"] - 1) <= MAX_MEMORY_ERROR
    for promise, verdict in verdicts.items():
        told = {True: "kept", False: "MISSED", None: "inconclusive"}[verdict]
        tell(f"{promise:>32} {'not judged' if job.quick else told}")
    return {
        "turns": turns,
        **speed,
        "checkpoint": checkpoint,
        "memory": memory,
        "inconclusive": [name for name, verdict in verdicts.items() if verdict is None],
        "promises": {name: verdict for name, verdict in verdicts.items() if verdict is not None},
    }


def settings(job: Job) -> dict[str, Any]:
    """A training run of equal steps: full windows of documents."""
    sizes: Sizes = job.sizes
    return {
        "batch_size": sizes.num_rows,
        "segment_len": sizes.segment_len,
        "model": _shape(sizes.width, sizes.num_layers),
        "curriculum": _steps(sizes.num_segments, sizes.num_steps),
        "dataset": {"task_fraction": 0.0, "piece_segments": 64},
        "workers": {"use_gpu": job.device == "cuda"},
        "report": {"log_every": sizes.log_every, "checkpoint_every": sizes.num_steps},
    }


def large(job: Job) -> dict[str, Any]:
    """A short run of a larger model that computes little."""
    sizes: Sizes = job.sizes
    few = {"batch_size": 2, "segment_len": 16, "model": _shape(sizes.large_width, sizes.large_layers)}
    return settings(job) | few | {"curriculum": _steps(1, 6), "report": {"log_every": 2, "checkpoint_every": 2}}


def _shape(width: int, num_layers: int) -> dict[str, Any]:
    memory = {"kind": "rmt", "num_tokens": 8}
    return {"width": width, "num_layers": num_layers, "feed_forward_width": 4 * width, "memory": memory}


def _steps(num_segments: int, num_steps: int) -> dict[str, Any]:
    return {"num_segments": [num_segments], "steps": [num_steps], "vary": False, "advance_below": None}


# --- speed ------------------------------------------------------------------------------------------


def _turns(job: Job, folder: Path) -> dict[str, Any]:
    """What the job's path costs a step over the bare loop, both in one process by turns."""
    given = settings(job) | {"curriculum": _steps(job.sizes.num_segments, job.sizes.num_turns)}
    measured = _finish(_probe("turns", given | {"output": str(folder / "turns")}))
    found = judge_turns(measured["seconds"])
    found["verdicts"]["same_steps"] = measured["difference"] <= MAX_DIFFERENCE
    low, high = found["overhead_interval"]
    tell(
        f"a step of the job takes {found['overhead']:+.1%} of the loop more ({low:+.1%} to {high:+.1%}, 95 % interval "
        f"of the median of {found['num_pairs']} pairs); their weights are {measured['difference']:.1e} or less apart"
    )
    return {**found, "difference": measured["difference"]}


def judge_turns(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The median of what pairs of steps say, with its interval by order statistics, and whether that is a promise kept,
    missed, or None for inconclusive."""
    ratios = sorted(job / loop - 1 for job, loop in list(zip(seconds["job"], seconds["loop"], strict=True))[2:])
    num = len(ratios)
    below = [sum(math.comb(num, i) for i in range(k + 1)) / 2**num for k in range(num)]  # P(at most k of them are less)
    skipped = max((k + 1 for k in range(num // 2) if 2 * below[k] <= 0.05), default=0)
    low, high = ratios[skipped], ratios[num - 1 - skipped]
    kept = True if high <= MAX_OVERHEAD else False if low > MAX_OVERHEAD else None
    return {
        "overhead": statistics.median(ratios),
        "overhead_interval": [low, high],
        "num_pairs": num,
        "verdicts": {"overhead": kept},
    }


class _Ran(NamedTuple):
    """One way through a run."""

    tokens_per_s: float  # at its best between two lines
    start_s: float  # from the command to the first step
    model: Path


def _speed(job: Job, folder: Path) -> dict[str, Any]:
    """Rates of the three ways in turn, and of two bare loops side by side."""
    ways: dict[str, Callable[[Path], _Ran]] = {
        "bare": lambda place: _bare(job, place),
        "one": lambda place: _run_job(settings(job), place),
        "two": lambda place: _run_job(settings(job), place, num_workers=2),
        "beside": lambda place: _bare(job, place, side_by_side=2),
    }
    tell("Tokens a second: a bare PyTorch loop, the job with one worker and with two, two bare loops side by side")
    ran: dict[str, list[_Ran]] = {name: [] for name in ways}
    for i in range(job.sizes.repeats):
        for name in list(ways)[:: 1 if i % 2 else -1]:
            ran[name].append(ways[name](folder / f"{name}{i}"))
            tell(f"{name:>8} {ran[name][-1].tokens_per_s:10.0f}")
    rates = {name: [each.tokens_per_s for each in runs] for name, runs in ran.items()}
    models = {name: runs[0].model for name, runs in ran.items()}
    differences = {name: difference(models["bare"], models[name]) for name in ("one", "two")}
    tell(f"weights of one and of two workers are {max(differences.values()):.1e} or less from the bare loop's")
    found = judge_rates(rates)
    found["verdicts"]["same_model"] = max(differences.values()) <= MAX_DIFFERENCE
    start_s = {name: min(each.start_s for each in ran[name]) for name in ("one", "two")}
    return {"tokens_per_s": rates, "differences": differences, "start_s": start_s, **found}


def judge_rates(rates: dict[str, list[float]]) -> dict[str, Any]:
    """What rates of the ways say, and with what certainty: each promise kept, missed, or None for inconclusive."""
    best = {name: max(each) for name, each in rates.items()}
    slower, efficiency = best["bare"] / best["one"] - 1, best["two"] / best["one"] / 2
    apart = {name: max(each) / min(each) - 1 for name, each in rates.items()}
    machine = best["beside"] / best["bare"] / 2
    scales = max(apart[name] for name in ("bare", "one", "two")) <= MAX_AA and machine >= 1 - MAX_AA
    tell(
        f"whole runs: the job takes {slower:.1%} more; equal ones are {apart['bare']:.1%} and {apart['one']:.1%} apart"
    )
    tell(f"two workers do {efficiency:.2f} of twice one's work; this machine does {machine:.2f} of two loops' work")
    return {
        "whole_runs_slower": slower,
        "scaling_efficiency": efficiency,
        "machine_scaling": machine,
        "equal_runs_apart": apart,
        "verdicts": {
            "scaling_efficiency": _verdict(efficiency >= MIN_EFFICIENCY, scales),
        },
    }


def _verdict(kept: bool, conclusive: bool) -> bool | None:
    return kept if conclusive else None


def _bare(job: Job, place: Path, side_by_side: int = 1) -> _Ran:
    """Bare loops at the same time, all together; the model of the first."""
    began = time.time()
    loops = [_probe("bare", settings(job) | {"output": str(place / str(i))}) for i in range(side_by_side)]
    found = [_finish(loop) for loop in loops]
    start_s = max(each["began"] for each in found) - began
    return _Ran(sum(each["tokens_per_s"] for each in found), start_s, place / "0" / "model")


def _run_job(given: dict[str, Any], output: Path, num_workers: int = 1, resume: str = "never") -> _Ran:
    """The job's command."""
    given = given | {"workers": {**given["workers"], "num_workers": num_workers}}
    words = [sys.executable, str(_ROOT / "pipelines" / "train.py"), "tiny", "--output", str(output)]
    began = time.time()
    done = subprocess.run(
        [*words, "--resume", resume, *_words(given)], capture_output=True, text=True, check=False, env=_environment()
    )
    if done.returncode:
        raise RuntimeError(f"the training job failed: {done.stderr.strip()[-2000:]}")
    first = (output / "tensorboard").stat()  # made by worker 0 when its steps begin, and only grown afterwards
    events = min(path.stat().st_ctime for path in (output / "tensorboard").iterdir())
    rates = [line["tokens_per_s"] for line in _lines(output)]
    return _Ran(max(rates[1:] or rates), min(first.st_ctime, events) - began, output / "model")


def _lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def _words(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings as a command line gives them."""
    found = []
    for name, value in values.items():
        if isinstance(value, dict) and name != "memory":
            found += _words(value, f"{prefix}{name}.")
        else:
            texts = [str(each) for each in value] if isinstance(value, list) else [json.dumps(value)]
            found += [f"--{prefix}{name}", *("none" if text == "null" else text for text in texts)]
    return found


def difference(one: Path, other: Path) -> float:
    """The largest difference between the weights of two models."""
    first, second = (tensors_of(rmt_core.load(place)) for place in (one, other))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


# --- checkpoints and memory -------------------------------------------------------------------------


def _checkpoint(job: Job, folder: Path) -> dict[str, Any]:
    """Seconds and bytes of a checkpoint, beside the weights by themselves; and seconds to go on from one."""
    whole = _run_job(large(job), folder / "whole")
    middle = min((folder / "whole").glob("checkpoint_*/progress.json"), key=_step_of).parent
    resumed = _run_job(large(job), folder / "resumed", resume=str(middle))
    taken = [line["checkpoint_s"] for line in _lines(folder / "whole") if "checkpoint_s" in line]
    model = rmt_core.load(whole.model)
    weights_s = min(_seconds(lambda: rmt_core.save(folder / "weights", model)) for _ in range(3))
    found = {
        "checkpoint_s": min(taken),
        "weights_s": weights_s,
        "checkpoint_bytes": sum(path.stat().st_size for path in middle.rglob("*") if path.is_file()),
        "weights_bytes": (folder / "weights" / "model.safetensors").stat().st_size,
        "start_s": whole.start_s,
        "resume_s": resumed.start_s,
        "resumed_difference": difference(whole.model, resumed.model),
    }
    tell(
        f"a checkpoint takes {found['checkpoint_s']:.2f} s until it is stored (the weights by themselves "
        f"{weights_s:.2f} s) and {found['checkpoint_bytes'] / found['weights_bytes']:.1f} times their "
        f"{found['weights_bytes']:,} bytes; the job starts in {whole.start_s:.1f} s, from a checkpoint in "
        f"{resumed.start_s:.1f} s"
    )
    return found


def _seconds(work: Callable[[], object]) -> float:
    """By the clock on the wall: writing waits for disks."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _step_of(progress: Path) -> int:
    step: int = json.loads(progress.read_text())["step"]
    return step


def _memory(job: Job, folder: Path) -> dict[str, Any]:
    """The most memory that one of two workers holds in a step, by stage, beside what the plan estimates.

    Judged are bytes of tensors, which is what a GPU's allocator is asked for; a process on CPUs keeps more than that.
    """
    tell("Most bytes of tensors on each of two workers in bfloat16, to the plan's estimate; bytes of the process")
    found = {}
    for stage in job.sizes.stages:
        workers = {"num_workers": 2, "zero_stage": stage, "precision": "bfloat16"}
        row = _finish(_probe("memory", large(job) | {"workers": workers, "output": str(folder / f"memory{stage}")}))
        row["ratio"] = row["peak_bytes"] / row["estimate_bytes"]
        found[f"zero{stage}"] = row
        sizes = f"{row['peak_bytes']:>14,} {row['estimate_bytes']:>14,} {row['ratio']:6.2f}"
        tell(f"   ZeRO-{stage} {sizes} {row['resident_bytes']:>14,}")
    return found


def _probe(kind: str, given: dict[str, Any]) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "pipelines.benchmarks.training_probe", kind, json.dumps(given)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=_ROOT, env=_environment(), stdout=pipe, stderr=pipe, text=True)


def _finish(probe: subprocess.Popen[str]) -> dict[str, Any]:
    """The JSON object on a probe's last line."""
    out, error = probe.communicate()
    if probe.returncode:
        raise RuntimeError(f"a probe failed: {error.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def _environment() -> dict[str, str]:
    """One thread a process; Ray's workers no lower in rank than a loop, as noise would slow them alone otherwise; large
    blocks go back to the system at once, so that a process holds what its tensors need."""
    same = {"RAY_worker_niceness": "0", "MALLOC_MMAP_THRESHOLD_": "1048576"}
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **same}
