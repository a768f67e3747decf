"""A batch of documents with poison, killed half-way: what is lost, what is doubled, and what a plain loop does.

The job runs as a user's command does, once without disturbance and once with SIGKILL after half of its rows. The loop
reads and continues one document at a time, with the same model, in this process. Needs the jobs' own dependencies.
"""

import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import rmt_core

from .measuring import RMT, Job, tell

POISON = 0  # a byte on which the model's values are not finite
_END = 256
_PROMPT = b"\n\nSummary: "
_ROUNDING = 1e-4  # of the largest logit: two float32 computations may choose otherwise between tokens as close as this
_MAIN = Path(__file__).resolve().parents[1] / "summarise.py"


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    num_documents: int = 500
    poison_every: int = 100  # one document of so many cannot be summarised
    document_bytes: tuple[int, int] = (500, 4000)  # shortest and longest
    width: int = 128
    num_layers: int = 2
    segment_len: int = 256
    max_new_tokens: int = 64
    batch_size: int = 16
    block_size: int = 32


QUICK = Sizes(
    num_documents=24,
    poison_every=8,
    document_bytes=(20, 200),
    width=32,
    segment_len=32,
    max_new_tokens=4,
    batch_size=4,
    block_size=4,
)


def sizes(device: str, quick: bool) -> Sizes:
    """The full sizes, or tiny ones."""
    return QUICK if quick else Sizes()


def documents(sizes: Sizes) -> list[tuple[str, bytes]]:
    """(id, text), always the same; every `poison_every`-th holds the poison."""
    draw = torch.Generator().manual_seed(0)
    shortest, longest = sizes.document_bytes
    found = []
    for n in range(sizes.num_documents):
        size = int(torch.randint(shortest, longest + 1, (1,), generator=draw))
        text = bytearray(torch.randint(97, 123, (size,), generator=draw).tolist())
        if n % sizes.poison_every == sizes.poison_every // 2:
            text[size // 2] = POISON
        found.append((f"document-{n:05d}", bytes(text)))
    return found


def build(sizes: Sizes) -> rmt_core.RecurrentModel:
    """A model whose random weights are so large that what it writes depends on what it has read."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.width // (64 if sizes.width >= 128 else 8),
        intermediate_size=sizes.width * 8 // 3,
        vocab_size=257,
        initializer_range=0.2,
    )
    model = rmt_core.build(backbone=config, memory=RMT, segment_len=sizes.segment_len).eval()
    with torch.no_grad():
        model.backbone.lm.get_input_embeddings().weight[POISON] = float("nan")
        head = model.backbone.lm.get_output_embeddings().weight
        head[POISON], head[128:_END] = 0, 0  # so that it writes neither the poison nor what is not text
    return model


def loop(model: rmt_core.RecurrentModel, texts: list[tuple[str, bytes]], sizes: Sizes, device: str) -> dict[str, Any]:
    """Id -> summary of every document alone, None where values are not finite, and the seconds it took."""
    begun, found = time.monotonic(), {}
    for doc_id, text in texts:
        tokens = torch.tensor([list(text)], device=device)
        session = rmt_core.read(model, rmt_core.open_session(model, 1), tokens)
        written = rmt_core.generate(model, [list(_PROMPT)], sizes.max_new_tokens, session=session, stop_tokens=[_END])
        finite = bool(torch.isfinite(written.session.hidden).all())
        found[doc_id] = bytes(written.tokens[0]).decode() if finite else None
    return {"summaries": found, "elapsed_s": time.monotonic() - begun}


def is_tie(model: rmt_core.RecurrentModel, text: bytes, one: str | None, other: str | None) -> bool:
    """Whether two summaries part where rounding decides: in float64 the two next tokens are all but equally likely."""
    if one is None or other is None:
        return False
    differ = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    at = next(differ, min(len(one), len(other)))
    tokens = [ord(summary[at]) if len(summary) > at else _END for summary in (one, other)]
    precise = copy.deepcopy(model).double()
    device = precise.backbone.lm.get_input_embeddings().weight.device
    read = torch.tensor([[*text, *_PROMPT, *one[:at].encode()]], device=device)
    with torch.inference_mode():
        logits = precise.backbone.head(rmt_core.read(precise, rmt_core.open_session(precise, 1), read).hidden)[0]
    first, second = logits[tokens].tolist()
    return abs(first - second) <= _ROUNDING * float(logits.abs().max())


class Runs:
    """The job's command on one input."""

    def __init__(self, folder: Path, sizes: Sizes, device: str) -> None:
        self.folder = folder
        self.sizes = sizes
        self.device = device

    def start(self, output: Path) -> "subprocess.Popen[str]":
        options: dict[str, Any] = {
            "model": self.folder / "model",
            "input": self.folder / "documents.jsonl",
            "output": output,
            "max-new-tokens": self.sizes.max_new_tokens,
            "batch-size": self.sizes.batch_size,
            "block-size": self.sizes.block_size,
            "device": self.device,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return subprocess.Popen(
            [sys.executable, str(_MAIN), *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def to_the_end(self, output: Path) -> dict[str, Any]:
        """What the command prints, and the seconds it took with all that it starts."""
        begun = time.monotonic()
        printed, _ = (process := self.start(output)).communicate()
        if process.returncode:
            raise RuntimeError(f"summarise ended with exit code {process.returncode}")
        result: dict[str, Any] = json.loads(printed)
        return {**result, "command_s": time.monotonic() - begun}

    def killed_half_way(self, output: Path) -> int:
        """Blocks that were committed when the command was killed."""
        half = self.sizes.num_documents // self.sizes.block_size // 2
        process = self.start(output)
        while len(blocks(output)) < half:
            if process.poll() is not None:
                raise RuntimeError(f"summarise ended with exit code {process.returncode} before it was half done")
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        return len(blocks(output))


def blocks(output: Path) -> dict[str, int]:
    """Committed blocks, and when they were, nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in output.glob("summaries-*.parquet")}


def working_per_s(output: Path, block_size: int) -> float:
    """Documents a second from the first block's end to the last's: without what starting takes."""
    times = sorted(blocks(output).values())
    return (len(times) - 1) * block_size / ((times[-1] - times[0]) / 1e9) if len(times) > 1 else float("nan")


def compare(
    rows: list[dict[str, Any]], expected: dict[str, str | None], tied: Callable[[str, str | None], bool]
) -> dict[str, int]:
    """How the rows of a job differ from what there should be; `tied` says whether rounding explains another summary."""
    times = Counter(row["doc_id"] for row in rows)
    wrong = [row for row in rows if (row["status"] == "error") != (expected.get(row["doc_id"]) is None)]
    other = [row for row in rows if row["summary"] != expected.get(row["doc_id"])]
    num_tied = sum(tied(row["doc_id"], row["summary"]) for row in other)
    return {
        "num_rows": len(rows),
        "num_lost": len(expected.keys() - times.keys()),
        "num_doubled": sum(count - 1 for count in times.values()),
        "num_wrong_status": len(wrong),
        "num_ties": num_tied,
        "num_other_summaries": len(other) - num_tied,
    }


def summarise(job: Job) -> dict[str, Any]:
    """The promises of the job: nothing lost or doubled, every summary as of its document alone, but for rounding."""
    from pipelines.data.tokenise import ByteTokenizer

    sizes: Sizes = job.sizes
    texts = documents(sizes)
    with tempfile.TemporaryDirectory(prefix="rmt-") as name:
        folder = Path(name)
        model = build(sizes)
        rmt_core.save(folder / "model", model, ByteTokenizer())
        lines = (json.dumps({"id": doc_id, "text": text.decode()}) + "\n" for doc_id, text in texts)
        (folder / "documents.jsonl").write_text("".join(lines))
        runs = Runs(folder, sizes, job.device)
        alone = loop(model.to(job.device), texts, sizes, job.device)
        whole = runs.to_the_end(folder / "whole")
        num_before = runs.killed_half_way(folder / "killed")
        before = blocks(folder / "killed")
        resumed = runs.to_the_end(folder / "killed")
        after = blocks(folder / "killed")
        rows = {
            name: [json.loads(line) for line in (folder / name / "summaries.jsonl").read_text().splitlines()]
            for name in ("whole", "killed")
        }
        per_s = working_per_s(folder / "whole", sizes.block_size)
    summaries, contents = alone["summaries"], dict(texts)
    found = {
        name: compare(mine, summaries, lambda at, written: is_tie(model, contents[at], summaries.get(at), written))
        for name, mine in rows.items()
    }
    num_redone = sum(after.get(name) != made for name, made in before.items())
    loop_per_s = len(texts) / alone["elapsed_s"]
    figures = {
        "loop_documents_per_s": loop_per_s,
        "job_documents_per_s": per_s,
        "ratio": per_s / loop_per_s,
        "command_s": whole["command_s"],
        "resumed_command_s": resumed["command_s"],
        "blocks_before_the_kill": num_before,
        "blocks_redone": num_redone,
        "num_ok": resumed["num_ok"],
        "num_error": resumed["num_error"],
        "num_ties": max(one["num_ties"] for one in found.values()),
    }
    promises = {
        "none_lost": all(one["num_lost"] == 0 for one in found.values()),
        "none_doubled": all(one["num_doubled"] == 0 for one in found.values()),
        "poison_alone_fails": all(one["num_wrong_status"] == 0 for one in found.values()),
        "same_summaries": all(one["num_other_summaries"] == 0 for one in found.values()),
        "committed_stays": num_redone == 0,
    }
    for name, value in figures.items():
        tell(f"{name:>26} {value:>10.2f}")
    for name, kept in promises.items():
        tell(f"{name:>26} {'not judged' if job.quick else 'kept' if kept else 'MISSED':>10}")
    return {**figures, "promises": promises, "rows": found}
