"""A recurrent step against Hugging Face's own forward, and how streamed inference grows with the text.

Axes: B rows, M memory tokens, T tokens of a segment, D width.
"""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import rmt_core
from rmt_core import RecurrentModel

from .measuring import RMT, Job, build, compare, prepare, random_tokens, seconds, tell

# The promises: no figure may be larger.
MAX_STEP_RATIO = 1.05
MAX_EXPONENT = 1.02
MAX_RESIDENT_MB = 1.0  # per 100,000 tokens
MAX_MASKED_CALLS = 0


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    width: int = 384  # of the model whose step is timed
    num_layers: int = 6
    steps: tuple[tuple[int, int], ...] = ((512, 1), (1024, 1), (512, 4))  # (segment tokens, rows)
    repeats: int = 21  # timed pairs of (step, body)
    stream_width: int = 128  # of the model that streams
    stream_layers: int = 2
    stream_segment_len: int = 512
    stream_chunk: int = 1024  # tokens handed over at a time
    stream_lengths: tuple[int, ...] = tuple(2**i for i in range(12, 19))  # 4k to 256k tokens
    stream_repeats: int = 5
    resident_warm_up: int = 200_000  # tokens read before memory is first looked at
    resident_tokens: int = 800_000  # and further ones, memory being looked at after each chunk


QUICK = Sizes(
    width=32,
    num_layers=2,
    steps=((32, 1), (32, 2)),
    repeats=3,
    stream_width=32,
    stream_segment_len=64,
    stream_chunk=128,
    stream_lengths=(256, 512, 1024),
    stream_repeats=2,
    resident_warm_up=1_000,
    resident_tokens=1_000,
)


def sizes(device: str, quick: bool) -> Sizes:
    """The full sizes, or tiny ones."""
    return QUICK if quick else Sizes()


# A step against the plain model


@torch.inference_mode()
def measure_step(job: Job, segment_len: int, num_rows: int) -> dict[str, Any]:
    """An RMT step over a segment against the plain body over as many positions, taking turns; and that both agree."""
    model = build(job.sizes.width, job.sizes.num_layers, segment_len, RMT, job.device)
    lm: Any = model.backbone.lm
    tokens = random_tokens(num_rows, segment_len, job.device)
    memory = model.init_state(num_rows)
    rows = torch.cat([memory, lm.get_input_embeddings()(tokens), memory], dim=1)  # (B, M + T + M, D)

    def step() -> Tensor:
        return model.step(tokens, memory)[0].hidden

    def body() -> Tensor:
        return lm.model(inputs_embeds=rows, use_cache=False).last_hidden_state

    num_read = RMT["num_tokens"]
    difference = float((step() - body()[:, num_read:-num_read]).abs().max())
    times = compare(step, body, job.sizes.repeats, job.device)
    return {
        "segment_len": segment_len,
        "num_rows": num_rows,
        "positions": rows.shape[1],
        "step_s": times.first_s,
        "body_s": times.second_s,
        "ratio": times.ratio,
        "ratio_of_medians": times.ratio_of_medians,
        "ratio_quartiles": times.ratio_quartiles,
        "max_difference": difference,
    }


# Streaming


def stream(model: RecurrentModel, job: Job, num_tokens: int) -> Iterator[int]:
    """Read random tokens chunk by chunk for ever-growing texts; gives how many were read, after each chunk."""
    session, done = rmt_core.open_session(model, 1), 0
    chunk = random_tokens(1, job.sizes.stream_chunk, job.device)
    while done < num_tokens:
        size = min(job.sizes.stream_chunk, num_tokens - done)
        session = rmt_core.read(model, session, chunk[:, :size])
        done += size
        yield done


def streaming_model(job: Job, memory: Any) -> RecurrentModel:
    sizes = job.sizes
    return build(sizes.stream_width, sizes.stream_layers, sizes.stream_segment_len, memory, job.device)


def measure_growth_of_time(job: Job, memory: Any) -> dict[str, Any]:
    """Seconds for texts of several lengths, and the exponent of `seconds ~ tokens ** exponent`: 1 is flat a token.

    The longest text is read several times. Of each of its chunks the least time counts, and a shorter text is as many
    chunks from the start: so that disturbances, which meet long texts more surely than short ones, do not bend it.
    """
    model, lengths, chunk = streaming_model(job, memory), job.sizes.stream_lengths, job.sizes.stream_chunk
    least = [math.inf] * (lengths[-1] // chunk)
    for _ in range(job.sizes.stream_repeats):
        reader = stream(model, job, lengths[-1])
        for i in range(len(least)):
            least[i] = min(least[i], seconds(lambda reader=reader: next(reader), job.device))  # type: ignore[misc]
    taken = [sum(least[: length // chunk]) for length in lengths]
    return {
        "memory": memory,
        "num_tokens": list(lengths),
        "seconds": taken,
        "microseconds_per_token": [1e6 * s / n for s, n in zip(taken, lengths, strict=True)],
        "exponent": exponent(lengths, taken),
    }


def exponent(lengths: Sequence[int], taken: Sequence[float]) -> float:
    """The least-squares slope of log(seconds) on log(tokens)."""
    return statistics.linear_regression([math.log(n) for n in lengths], [math.log(s) for s in taken]).slope


def measure_growth_of_memory(job: Job) -> dict[str, Any]:
    """Resident memory of a process that streams, after a warm-up and after many more tokens."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(resident_growth, job).result()


def resident_growth(job: Job) -> dict[str, Any]:
    """Runs in its own process. Megabytes (1e6 bytes) that memory grew by: its peak, and what is resident now.

    The latter is the median of the last third of the looks less that of the first, because the allocator gives back
    and takes again a few megabytes at any time; it sees growth that an early peak would hide.
    """
    prepare(job.device)
    model, sizes = streaming_model(job, RMT), job.sizes
    marks = []
    for done in stream(model, job, sizes.resident_warm_up + sizes.resident_tokens):
        if done >= sizes.resident_warm_up:
            marks.append((done, resident_bytes()))
    num_tokens, third = marks[-1][0] - marks[0][0], max(1, len(marks) // 3)
    early, late = ([look["now"] for _, look in part] for part in (marks[:third], marks[-third:]))
    between = marks[-third][0] - marks[0][0]
    per_100k = 1e5 / 1e6
    return {
        "num_tokens": num_tokens,
        "peak_mb": marks[-1][1]["peak"] / 1e6,
        "peak_mb_per_100k_tokens": (marks[-1][1]["peak"] - marks[0][1]["peak"]) / num_tokens * per_100k,
        "now_mb_per_100k_tokens": (statistics.median(late) - statistics.median(early)) / between * per_100k,
        "device_mb_per_100k_tokens": (marks[-1][1]["device"] - marks[0][1]["device"]) / num_tokens * per_100k,
    }


def resident_bytes() -> dict[str, int]:
    """This process's resident memory, its peak since it began (Linux), and the peak on its accelerator."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return {"now": now, "peak": peak, "device": device}


# Masks


@contextmanager
def counted_attention() -> Iterator[list[bool]]:
    """Inside, a list that grows by one entry an attention call: whether it got a mask."""
    found: list[bool] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def counted(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        found.append(attn_mask is not None)
        return attention(query, key, value, attn_mask=attn_mask, **rest)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", counted):
        yield found


@torch.inference_mode()
def count_masks(job: Job) -> dict[str, Any]:
    """Attention calls of full, ragged and reset steps under every memory, and how many of them got a mask."""
    size = 32
    cache = {"kind": "xl", "cache_len": 48}
    with counted_attention() as found:
        for memory in ("none", RMT, cache, [cache, RMT]):
            model = build(32, 2, size, memory, job.device)
            tokens, state = random_tokens(3, size, job.device), model.init_state(3)
            lengths = torch.tensor([size, 5, 0], device=job.device)
            _, state = model.step(tokens, state)
            _, state = model.step(tokens, state, lengths=lengths)
            model.step(tokens, state, reset=lengths == size)
    return {"calls": len(found), "masked_calls": sum(found)}


def core(job: Job) -> dict[str, Any]:
    """The promises of `rmt_core`: figures, and for each promise whether it is kept."""
    steps = []
    tell(f"{'tokens x rows':>16}{'step':>14}{'plain body':>14}{'ratio':>9}{'medians':>9}   quartiles  difference")
    for segment_len, num_rows in job.sizes.steps:
        steps.append(found := measure_step(job, segment_len, num_rows))
        low, high = found["ratio_quartiles"]
        tell(
            f"{f'{segment_len} x {num_rows}':>16}{found['step_s'] * 1e3:>11.2f} ms{found['body_s'] * 1e3:>11.2f} ms"
            f"{found['ratio']:>9.3f}{found['ratio_of_medians']:>9.3f} {low:.3f}-{high:.3f}"
            f" {found['max_difference']:>10.1e}"
        )
    streams = []
    for memory in (RMT, [{"kind": "xl", "cache_len": job.sizes.stream_segment_len}, RMT]):
        streams.append(grown := measure_growth_of_time(job, memory))
        tell(f"\n{'tokens':>16} {'seconds':>11} {'us a token':>11}   {json.dumps(memory)}")
        columns = (grown["num_tokens"], grown["seconds"], grown["microseconds_per_token"])
        for length, taken, each in zip(*columns, strict=True):
            tell(f"{length:>16} {taken:>11.3f} {each:>11.2f}")
        tell(f"{'exponent':>16} {grown['exponent']:>11.4f}")
    resident, masks = measure_growth_of_memory(job), count_masks(job)
    figures = {
        "step_ratio": max(found["ratio"] for found in steps),
        "exponent": max(found["exponent"] for found in streams),
        "resident_mb_per_100k_tokens": max(resident["peak_mb_per_100k_tokens"], resident["now_mb_per_100k_tokens"]),
        "masked_attention_calls": masks["masked_calls"],
    }
    limits = dict(zip(figures, (MAX_STEP_RATIO, MAX_EXPONENT, MAX_RESIDENT_MB, MAX_MASKED_CALLS), strict=True))
    promises = {name: value <= limits[name] for name, value in figures.items()}
    promises["same_outputs"] = all(found["max_difference"] < 1e-3 for found in steps)
    tell("")
    for name, value in figures.items():
        verdict = "not judged" if job.quick else "kept" if promises[name] else "MISSED"
        tell(f"{name:>28} {value:>9.4f}  at most {limits[name]:<5} {verdict}")
    return {**figures, "promises": promises, "steps": steps, "streams": streams, "resident": resident, "masks": masks}
