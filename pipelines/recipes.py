"""Named full configurations of training runs: what a command line starts from."""

from collections.abc import Mapping
from typing import Any

RECIPES: Mapping[str, Mapping[str, Any]] = {
    # Learns to carry a planted fact through book prose, over up to 8 segments, in minutes on a laptop. It is what
    # `make demo` trains. Answers weigh as much as all the text together, or they are learned late or not at all. How
    # soon a stage is learned differs much between seeds, most of all the second, where a fact has to enter the memory
    # for the first time: so stages last until they are learned. One worker: so small a model gains nothing from two.
    "tiny": {
        "segment_len": 48,
        "dataset": {"recall_fraction": 0.75, "recall_answer_weight": 1000.0},
        "curriculum": {
            "num_segments": [1, 2, 3, 4, 6, 8],
            "steps": [150, 450, 200, 150, 150, 200],
            "advance_below": 0.1,
        },
    },
}
