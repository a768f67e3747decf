"""Measurements that carry a promise, each against a reference in the same run.

    python pipelines/benchmark.py core
    python pipelines/benchmark.py core --device cuda
    python pipelines/benchmark.py core --quick      # seconds: shows that it runs; its figures mean nothing
    python pipelines/benchmark.py memory
    python pipelines/benchmark.py ingest
    python pipelines/benchmark.py summarise
    python pipelines/benchmark.py serve
    python pipelines/benchmark.py serve_http
    python pipelines/benchmark.py train

`core` measures a recurrent step against Hugging Face's own forward, and how streamed inference grows with the
text. `memory` measures replay against full back-propagation and against another implementation's, each memory's state
and time per token against a cache of keys and values, and the orders in which segments and layers of a text can run.
`ingest` measures `prepare` against its tokenizer alone, against `datasets.map`, and on two workers against one. `train`
measures the training job against a bare loop, two workers against one, checkpoints, and the memory of ZeRO's stages.
`summarise` kills a batch of documents half-way and counts what is lost and what is doubled, beside a plain loop.
`serve` measures sessions that write side by side against one at a time and against Hugging Face's `generate`, what
keeping one takes, as a record and in a directory, and a prefix that was read before; `serve_http` writing side by side
over HTTP.
A table goes to stderr, one JSON object to stdout. Exit code 1: a full run missed a promise. `core` and `memory` need
what `rmt_core` needs and nothing else, so that they run on a bare machine with an accelerator.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the repository root, not from pipelines/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict

import torch
import transformers

from pipelines.benchmarks import BENCHMARKS
from pipelines.benchmarks.measuring import Job, prepare


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmark", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=BENCHMARKS, help="which benchmark")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where it computes (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes that only show that it runs; promises nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved sizes as JSON and stop")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available here; allowed: cpu")
    benchmark = BENCHMARKS[given.name]
    job = Job(benchmark.sizes(given.device, given.quick), given.device, given.quick)
    about = {"benchmark": given.name, "device": given.device, "quick": given.quick, "sizes": asdict(job.sizes)}
    if given.dry_run:
        print(json.dumps(about))
        return 0
    prepare(given.device)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    result = benchmark.run(job)
    kept = all(result["promises"].values())
    print(json.dumps(about | {"versions": versions, "kept": kept} | result))
    return 0 if kept or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
