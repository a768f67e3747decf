"""Put evaluations of several models side by side: seeds of one recipe, kinds of memory, or two recipes.

    python pipelines/compare.py --results runs/figures/seed-0 runs/figures/seed-1 --output DIR --trained-len 384
    python pipelines/compare.py --results noise=runs/a,runs/b base=runs/c,runs/d --metric accuracy --output DIR

A group of models is shown as their mean, with a band from the lowest to the highest. Groups are named on the command
line; plain directories are grouped where memory, state floats, parameters, segments and questions are equal.
Directories of one model that was asked alike are one evaluation, of all their tasks and lengths. Writes comparison.md
and comparison.png; cost.md and cost.png: time and memory beside the metric; of two groups with equally
many models the paired difference too; and of the tasks capacity_1 to capacity_64, pairs_1 to pairs_64 and latest_1 to
latest_64 capacity.md and capacity.png: facts or pairs held against the size of the state. An earlier comparison in the
same directory is replaced.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the repository root, not from pipelines/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
import math
from collections.abc import Sequence
from typing import Any

import pydantic

from pipelines import storage
from pipelines.claim import refuse_runs
from pipelines.config import Config, Count
from pipelines.job import run_job
from pipelines.tasks import capacity, cost_plot
from pipelines.tasks.comparison import BY_SEGMENT, differences_of_questions, read_groups
from pipelines.tasks.comparison_plot import plot
from pipelines.tasks.comparison_table import differences, markdown
from pipelines.tasks.cost import COSTS
from pipelines.tasks.questions import ACCURACY

log = logging.getLogger(__name__ if __name__ != "__main__" else "pipelines.compare")

TABLE, PLOT, CAPACITY_TABLE, CAPACITY_PLOT = "comparison.md", "comparison.png", "capacity.md", "capacity.png"
COST_TABLE, COST_PLOT = "cost.md", "cost.png"
OWN_NAMES = (TABLE, PLOT, CAPACITY_TABLE, CAPACITY_PLOT, COST_TABLE, COST_PLOT)


class CompareConfig(Config):
    results: list[str] = pydantic.Field(
        min_length=1,
        description="directories that evaluate wrote, on disk or s3://, or named groups of them, NAME=DIR,DIR",
    )
    output: str = pydantic.Field(description="directory of the table and the plot, on disk or s3://")
    metric: str = pydantic.Field(
        ACCURACY,
        description="what is compared, of all that evaluate measured: accuracy, strict, exact, loss, loss_by_segment, "
        "seconds, peak_bytes",
    )
    trained_len: Count | None = pydantic.Field(
        None, ge=1, description="tokens of the longest texts that training read, shaded (none: nothing)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__
    return run_job(compare, CompareConfig, argv, prog="compare", description=__doc__.splitlines()[0])


def compare(config: CompareConfig) -> dict[str, Any]:
    """Reads and draws; where the table and the plot are. Raises InputError."""
    groups = read_groups(config.results, config.metric)
    if unlike := differences_of_questions([one for group in groups for one in group.evaluations]):
        log.warning("not the same questions: %s", unlike)
    output = storage.absolute(config.output)
    refuse_runs(output)
    files = {
        "table": (TABLE, markdown(groups, config.metric).encode()),
        "plot": (PLOT, plot(groups, config.metric, config.trained_len)),
    }
    if config.metric == ACCURACY and capacity.are_asked(groups):
        files["capacity_table"] = (CAPACITY_TABLE, capacity.markdown(groups).encode())
        files["capacity_plot"] = (CAPACITY_PLOT, capacity.plot(groups))
    if config.metric not in (BY_SEGMENT, *COSTS) and cost_plot.are_measured(groups):
        files["cost_table"] = (COST_TABLE, cost_plot.markdown(groups).encode())
        files["cost_plot"] = (COST_PLOT, cost_plot.plot(groups, config.metric, config.trained_len))
    for name, data in files.values():
        storage.write_bytes(storage.join(output, name), data)
    written = {name for name, _ in files.values()}
    for name in [name for name in storage.list_names(output) if name in OWN_NAMES and name not in written]:
        log.info("%s of an earlier comparison is deleted", storage.join(output, name))
        storage.delete(storage.join(output, name))
    return {
        "output": output,
        **{key: storage.join(output, name) for key, (name, _) in files.items()},
        "models": {group.name: [one.name for one in group.evaluations] for group in groups},
        "differences": [
            {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in one.items()}
            for one in (difference._asdict() for difference in differences(groups))
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
