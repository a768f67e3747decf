"""Put evaluations of several models side by side: seeds of one recipe, or kinds of memory.

    python pipelines/compare.py --results runs/figures/seed-0 runs/figures/seed-1 --output DIR --trained-len 384

Models with equal memories are taken as seeds: their mean, with a band from the lowest to the highest. Writes
comparison.md and comparison.png.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the repository root, not from pipelines/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Sequence
from typing import Any

import pydantic

from pipelines import storage
from pipelines.config import Config, Count, InputError, run_job
from pipelines.tasks.comparison import by_memory, markdown, plot, read_evaluation

TABLE, PLOT = "comparison.md", "comparison.png"


class CompareConfig(Config):
    results: list[str] = pydantic.Field(min_length=1, description="directories that evaluate wrote, on disk or s3://")
    output: str = pydantic.Field(description="directory of the table and the plot, on disk or s3://")
    trained_len: Count | None = pydantic.Field(
        None, ge=1, description="tokens of the longest texts that training read, shaded (none: nothing)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__
    return run_job(compare, CompareConfig, argv, prog="compare", description=__doc__.splitlines()[0])


def compare(config: CompareConfig) -> dict[str, Any]:
    """Reads and draws; where the table and the plot are. Raises InputError."""
    uris = [storage.absolute(uri) for uri in config.results]
    if twice := next((uri for uri in uris if uris.count(uri) > 1), None):
        raise InputError(f"--results names {twice} twice")
    evaluations = [read_evaluation(uri) for uri in uris]
    output = storage.absolute(config.output)
    storage.write_bytes(storage.join(output, TABLE), markdown(evaluations).encode())
    storage.write_bytes(storage.join(output, PLOT), plot(evaluations, config.trained_len))
    groups = {memory: [one.name for one in mine] for memory, mine in by_memory(evaluations).items()}
    return {
        "output": output,
        "table": storage.join(output, TABLE),
        "plot": storage.join(output, PLOT),
        "models": groups,
    }


if __name__ == "__main__":
    sys.exit(main())
