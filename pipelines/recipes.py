"""Named full configurations of training runs: what a command line starts from."""

from collections.abc import Mapping
from typing import Any

RECIPES: Mapping[str, Mapping[str, Any]] = {
    # Learns to carry a planted fact over 8 segments of book prose in minutes on two cores.
    "tiny": {},
    # What `make demo` trains.
    "demo": {"workers": {"num_workers": 2}},
}
