"""A checkpoint of a run: what each worker writes, and how any number of workers goes on from it.

    progress.json               the step, the curriculum's stage, the number of workers, the run's identity
    worker_00000.json           cursors of the lanes of worker 0, by the lanes' global numbers
    worker_00000.safetensors    memory state of each of its lanes, its random states, sums behind the next metrics
    worker_00000.sha256         checksums of the files that worker 0 wrote
    deepspeed/engine/           weights and optimiser, as DeepSpeed writes them: pickles
    model/                      the portable model

Memory states and cursors belong to lanes and go with them wherever those are read. Weights and optimiser are sharded
for a number of workers; for another one, DeepSpeed's conversion to its universal checkpoint is run.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import rmt_core
from pipelines import storage
from pipelines.config import InputError
from pipelines.stores.sums import incomplete
from pipelines.training.identity import Identity, seal
from rmt_core.state import State

PROGRESS = "progress.json"
ENGINE_TAG = "engine"
_OLD_S = 24 * 3600.0  # after which nobody is writing or reading a converted checkpoint any more


class Progress(NamedTuple):
    """How far a run is."""

    step: int  # optimiser steps done
    stage: int  # of the curriculum
    num_workers: int
    identity: Identity


class Part(NamedTuple):
    """What a worker carries from step to step, beside the engine."""

    memory: State  # R rows, of the lanes `numbers`
    cursors: list[Any]  # of those lanes, JSON values; None for lanes that need none
    sums: dict[str, torch.Tensor]  # behind the next line of metrics
    random: dict[str, torch.Tensor] | None  # None where a worker is new: it has to seed its own


def write_progress(folder: Path, progress: Progress) -> None:
    (folder / PROGRESS).write_text(json.dumps(progress._asdict()))


def read_progress(folder: Path) -> Progress:
    return Progress(**json.loads((folder / PROGRESS).read_text()))


def part_name(rank: int) -> str:
    """Of a worker's files, without what says what they hold."""
    return f"worker_{rank:05d}"


def write_part(folder: Path, rank: int, numbers: Sequence[int], part: Part, identity: Identity) -> None:
    """A worker's files; `numbers` are its lanes'."""
    lanes = {f"{number:05d}": rmt_core.state.select(part.memory, [row]) for row, number in enumerate(numbers)}
    carried = {"lanes": lanes, "sums": part.sums, "random": part.random}
    cursors = dict(zip(map(str, numbers), part.cursors, strict=True))
    (folder / f"{part_name(rank)}.json").write_text(json.dumps({"cursors": cursors}))
    (folder / f"{part_name(rank)}.safetensors").write_bytes(rmt_core.state.to_bytes(carried, seal(identity)))


def read_part(folder: Path, rank: int, world_size: int, numbers: Sequence[int], progress: Progress) -> Part:
    """What worker `rank` of `world_size` with the lanes `numbers` goes on with, on the CPU.

    Written by as many workers, it is what this one wrote. Otherwise each lane's from whoever had it; the sums go to
    worker 0, and random states are nobody's. InputError where a file was altered.
    """
    same = world_size == progress.num_workers
    cursors: dict[str, Any] = {}
    lanes: dict[str, State] = {}
    sums: dict[str, torch.Tensor] = {}
    random = None
    for writer in [rank] if same else range(progress.num_workers):
        cursors |= json.loads((folder / f"{part_name(writer)}.json").read_text())["cursors"]
        try:
            carried = rmt_core.state.from_bytes(
                (folder / f"{part_name(writer)}.safetensors").read_bytes(), seal(progress.identity)
            )
        except ValueError as error:
            raise InputError(f"{folder.name}/{part_name(writer)}.safetensors: {error}") from error
        lanes |= carried["lanes"]
        for name, value in carried["sums"].items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value
        random = carried["random"] if same else None
    if rank and not same:
        sums = {name: torch.zeros_like(value) for name, value in sums.items()}
    memory = rmt_core.state.stack([lanes[f"{number:05d}"] for number in numbers])
    return Part(memory, [cursors[str(number)] for number in numbers], sums, random)


def seals(progress: Progress) -> list[str]:
    """The files of checksums that a checkpoint has, one of each worker that wrote it."""
    return [f"{part_name(rank)}.sha256" for rank in range(progress.num_workers)]


def check_parts(folder: Path, where: str) -> None:
    """DamagedError, with `where` as the checkpoint's name, where checksums of a worker that wrote it are missing."""
    if missing := [name for name in seals(read_progress(folder)) if not (folder / name).is_file()]:
        raise storage.DamagedError(incomplete(where, missing))


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's random generators that a training step may draw from."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


# --- the engine's files, for another number of workers ----------------------------------------------


def needs_conversion(progress: Progress, world_size: int) -> bool:
    """Whether the engine's files are sharded otherwise than these workers need them."""
    sharded = progress.identity["settings"]["workers"]["zero_stage"] > 0
    return sharded and progress.num_workers != world_size


def convert(folder: Path) -> Path:
    """The engine's files of the checkpoint `folder` as DeepSpeed's universal checkpoint, on this machine's disk.

    The directory is this user's alone, as pickles are loaded from it; it is named by what is converted and appears
    whole or not at all. One process of a machine converts; takes seconds a gigabyte, and as much disk as the
    checkpoint. What kills have left of others is deleted when it is a day old.
    """
    source = folder / "deepspeed" / ENGINE_TAG
    target = universal_directory(folder)
    if target.exists():
        return target
    _delete_old(target.parent)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    words = ["--input_folder", str(source), "--output_folder", str(part), "--inject_missing_state"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *words]
    num_cores = os.cpu_count() or 1  # merging takes the more memory
    workers = ["--num_extract_workers", str(min(4, num_cores)), "--num_merge_workers", str(min(2, num_cores))]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run([*command, *workers], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"DeepSpeed could not convert the checkpoint {source}: {done.stderr.strip()[-2000:]}")
        try:
            part.rename(target)
        except OSError:
            if not target.exists():  # else another process has made the same meanwhile
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _delete_old(folder: Path) -> None:
    """Deletes what has lain in a folder for a day."""
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another has deleted it
            if time.time() - path.lstat().st_mtime > _OLD_S:
                shutil.rmtree(path, ignore_errors=True)


def universal_directory(folder: Path) -> Path:
    """Where the universal form of a checkpoint lies on this machine: below a directory of this user alone."""
    mine = Path(tempfile.gettempdir()) / f"rmt-universal-{os.getuid()}"
    mine.mkdir(mode=0o700, exist_ok=True)
    about = mine.lstat()
    if about.st_uid != os.getuid() or about.st_mode & 0o077 or mine.is_symlink():
        raise InputError(f"{mine} is not this user's alone, and checkpoints are loaded from it; remove it")
    digest = hashlib.sha256()
    source = folder / "deepspeed" / ENGINE_TAG
    for path in sorted(source.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(source)} {content}\n".encode())
    return mine / digest.hexdigest()[:32]
