"""Named full configurations of training runs: what a command line starts from."""

from collections.abc import Mapping
from typing import Any

# A planted fact carried over up to 8 segments. How soon a stage is learned differs much between seeds, most of all the
# second, where a fact has to enter the memory for the first time: so stages last until they are learned.
_PLANTED = {
    "dataset": {"recall_answer_weight": 100.0},
    "curriculum": {
        "num_segments": [1, 2, 3, 4, 6, 8],
        "steps": [150, 450, 200, 200, 200, 400],
        "advance_below": 0.1,
    },
}

RECIPES: Mapping[str, Mapping[str, Any]] = {
    # Learns to carry a planted fact through book prose in minutes on a laptop.
    "tiny": _PLANTED,
    # The same on two workers: what `make demo` trains.
    "demo": {**_PLANTED, "workers": {"num_workers": 2}},
}
