"""Kills a summary job by SIGKILL, again and again at random, and counts what is lost, doubled or other in the end.

    python tests/scenarios/summarise_killed.py --kills 6 --seed 1

Each time one process of the job dies: the command itself, a worker, or Ray's node. Where the command survives it goes
on, otherwise it is given again. The documents are those of `benchmark.py summarise`, poison among them. Exit code 1
where rows are not as they should be.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import rmt_core
from pipelines.benchmarks import summarise
from pipelines.benchmarks.summarise import Runs
from pipelines.data.tokenise import ByteTokenizer

VICTIMS = {"command": "", "worker": "MapWorker", "node": "raylet/raylet"}  # what its command line holds


def below(pid: int) -> Iterator[tuple[int, str]]:
    """(process id, command line) of everything that a process has started."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            stat = (entry / "stat").read_text()
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    waiting = [pid]
    while waiting:
        for child in parents.get(waiting.pop(), []):
            waiting.append(child)
            with suppress(OSError):
                yield child, Path(f"/proc/{child}/cmdline").read_text()


def victim(process: "subprocess.Popen[str]", name: str) -> int | None:
    """The process id of the command itself, its worker or its node; None where there is none (yet)."""
    if name == "command":
        return process.pid
    return next((pid for pid, words in below(process.pid) if VICTIMS[name] in words), None)


def run(output: Path, runs: Runs, num_kills: int, draw: random.Random) -> dict[str, int]:
    """Runs the job until it has been killed so often and is done; how often each process was killed, and starts."""
    killed = dict.fromkeys(VICTIMS, 0)
    process, starts = runs.start(output), 1
    while sum(killed.values()) < num_kills:
        name = draw.choice(list(VICTIMS))
        while (pid := victim(process, name)) is None and process.poll() is None:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 8 if name == "worker" else 20))  # of starting, planning and working
        if process.poll() == 0:
            print("done before it was killed often enough", file=sys.stderr)
            break
        if process.poll() is None and pid is not None:
            with suppress(ProcessLookupError):  # gone meanwhile
                os.kill(pid, signal.SIGKILL)
                killed[name] += 1
                print(f"killed the {name}; {len(summarise.blocks(output))} blocks committed", file=sys.stderr)
        if name != "worker":
            process.communicate()  # a job whose node has died ends by itself
        if process.poll() is not None:
            process, starts = runs.start(output), starts + 1
    process.communicate()
    runs.to_the_end(output)
    return {**killed, "starts": starts}


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=6, help="times that a process is killed")
    parser.add_argument("--seed", type=int, default=0, help="of when and which")
    parser.add_argument("--documents", type=int, default=2000, help="documents to summarise")
    given = parser.parse_args()
    sizes = replace(summarise.QUICK, num_documents=given.documents, poison_every=50, block_size=8, max_new_tokens=16)
    texts, model = summarise.documents(sizes), summarise.build(sizes)
    with tempfile.TemporaryDirectory(prefix="rmt-") as name:
        folder = Path(name)
        rmt_core.save(folder / "model", model, ByteTokenizer())
        lines = (json.dumps({"id": doc_id, "text": text.decode()}) + "\n" for doc_id, text in texts)
        (folder / "documents.jsonl").write_text("".join(lines))
        expected = summarise.loop(model, texts, sizes, "cpu")["summaries"]
        killed = run(folder / "out", Runs(folder, sizes, "cpu"), given.kills, random.Random(given.seed))
        rows = [json.loads(line) for line in (folder / "out" / "summaries.jsonl").read_text().splitlines()]
        contents = dict(texts)

        def tied(doc_id: str, written: str | None) -> bool:
            return summarise.is_tie(model, contents[doc_id], expected[doc_id], written)

        found = summarise.compare(rows, expected, tied)
    print(json.dumps({**killed, **found}))
    wrong = any(value for key, value in found.items() if key not in ("num_rows", "num_ties"))
    return int(found["num_rows"] != given.documents or wrong)


if __name__ == "__main__":
    sys.exit(main())
