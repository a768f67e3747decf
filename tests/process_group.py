"""Processes of a test that form one Gloo group, as the workers of a training do."""

import faulthandler
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing


def spawn(work: Callable[..., None], world_size: int, *args: Any) -> None:
    """Runs work(rank, *args) in `world_size` processes of one group; the first that fails fails the caller."""
    with tempfile.TemporaryDirectory() as folder:
        given = (work, world_size, Path(folder), args)
        multiprocessing.spawn(_run, args=given, nprocs=world_size)  # type: ignore[attr-defined]


def join(rank: int, world_size: int, folder: Path) -> None:
    """The group meets in a file: a port that is free now may be taken by the time it is listened on."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=5),
    )


def _run(rank: int, work: Callable[..., None], world_size: int, folder: Path, args: tuple[Any, ...]) -> None:
    faulthandler.enable()  # a process that is killed by a signal tells where it was
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world_size))  # as Ray Train sets them
    join(rank, world_size, folder)
    work(rank, *args)
    dist.barrier()  # none closes its connections while another still reads from them
    dist.destroy_process_group()
