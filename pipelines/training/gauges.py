"""A run's metrics as Ray's own, for Prometheus: `ray_rmt_train_<name>`, with the run as a tag.

`clusters/grafana/rmt-training.json` is a dashboard of them.
"""

from typing import Any

from pipelines.training.records import Metrics

PREFIX = "rmt_train_"
RAY_PREFIX = "ray_"  # Ray puts it before every name that it exports

GAUGES = {
    "step": "optimiser steps taken",
    "loss": "nats a label, weighted mean since the last report",
    "answer_loss": "nats a token of answers to questions of tasks, mean since the last report",
    "num_segments": "segments of the last window",
    "stage": "stage of the curriculum, from 0",
    "learning_rate": "of the last step",
    "gradient_norm": "global norm of the last step's gradient, before clipping",
    "state_norm": "root mean square of the memory's state, mean over rows",
    "state_drift": "change of the memory's state over the last window, relative to its norm, mean over rows",
    "lane_use_fraction": "of the places for segments in windows since the last report, those that held a segment",
    "padding_fraction": "of the places for tokens in windows since the last report, those that held none",
    "tokens_per_s": "tokens a second of all workers",
    "mfu_fraction": "operations that the model needs, of those that the devices can do at most",
    "peak_memory_bytes": "most memory that a worker has held",
    "probe_loss": "nats a label on the texts of the probe, with memory",
    "probe_loss_without_memory": "nats a label on the texts of the probe, every segment begun anew",
}
BY_SEGMENT = "loss_by_segment"
BY_SEGMENT_SAYS = "nats a label by the segment's number in its document, from 0"


class Gauges:
    """Sets Ray's gauges; a tracker. Without Prometheus nothing reads them."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self.tags = {"run": run}
        self.gauges: dict[str, Any] = {
            name: Gauge(PREFIX + name, description=says, tag_keys=("run",)) for name, says in GAUGES.items()
        }
        self.by_segment: Any = Gauge(PREFIX + BY_SEGMENT, description=BY_SEGMENT_SAYS, tag_keys=("run", "segment"))

    def write(self, metrics: Metrics) -> None:
        """What is None is not set: it keeps what was set before."""
        for name, gauge in self.gauges.items():
            value = metrics.get(name)
            if value is not None:
                gauge.set(float(value), tags=self.tags)
        for index, value in enumerate(metrics.get(BY_SEGMENT, [])):
            if value is not None:
                self.by_segment.set(value, tags=self.tags | {"segment": f"{index:02d}"})

    def close(self) -> None: ...


def exported_names() -> set[str]:
    """The names that Prometheus sees."""
    return {RAY_PREFIX + PREFIX + name for name in (*GAUGES, BY_SEGMENT)}
