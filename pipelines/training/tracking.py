"""Where a run's metrics go besides its own directory: Weights & Biases, MLflow and Ray's metrics.

Each is imported when it is asked for. What a tracker is given is in metrics.jsonl too, which is the record of the run.
"""

import logging
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pipelines import storage
from pipelines.config import InputError
from pipelines.extras import require_extra
from pipelines.training.gauges import Gauges
from pipelines.training.records import Metrics, scalars
from pipelines.training.settings import ReportSettings, TrainConfig

log = logging.getLogger(__name__)

IDS_FILE = "tracking.json"  # in the run's directory: the names under which trackers go on with the same run
EXPERIMENT = "rmt-ray"  # of MLflow, where MLFLOW_EXPERIMENT_NAME names no other


class Tracker(Protocol):
    """Takes a run's lines of metrics."""

    def write(self, metrics: Metrics) -> None:
        """One line of metrics, which hold their `step`."""

    def close(self) -> None: ...


def check_tracking(settings: ReportSettings) -> None:
    """InputError where what is asked for is not installed, or an address would put a password on disk."""
    wanted = {"wandb": settings.wandb, "mlflow": settings.mlflow}
    modules = tuple(module for module, value in wanted.items() if value is not None)
    if modules:
        require_extra("tracking", job=f"report.{modules[0]}", modules=modules)
    if settings.mlflow is not None and urlsplit(settings.mlflow).password is not None:
        raise InputError(
            "report.mlflow holds a password, which would be saved with the run; leave it out and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )


def start_trackers(config: TrainConfig) -> list[Tracker]:
    """The trackers of a run, for the one worker that writes. A run that goes on keeps its place in each of them.

    Raises InputError where one refuses the run.
    """
    settings, name = config.report, config.output.rpartition("/")[2]
    uri = storage.join(config.output, IDS_FILE)
    ids: dict[str, str] = storage.read_json(uri) if storage.exists(uri) else {}
    known = dict(ids)
    trackers: list[Tracker] = [Gauges(name)]
    if settings.wandb is not None:
        trackers.append(WandbTracker(settings.wandb, config, ids))
    if settings.mlflow is not None:
        trackers.append(MlflowTracker(settings.mlflow, config, ids))
    if ids != known:
        storage.write_json(uri, ids)
    return trackers


class WandbTracker:
    """A run of Weights & Biases; offline with WANDB_MODE=offline, its files are then below the run's `wandb/`."""

    def __init__(self, project: str, config: TrainConfig, ids: dict[str, str]) -> None:
        import wandb

        folder = config.output
        if storage.is_s3(folder):
            folder = tempfile.mkdtemp(prefix="rmt-wandb-")
            log.info("W&B keeps its files of this run in %s", folder)
        Path(folder).mkdir(parents=True, exist_ok=True)
        ids.setdefault("wandb", secrets.token_hex(4))
        try:
            self.run = wandb.init(
                project=project,
                name=config.output.rpartition("/")[2],
                id=ids["wandb"],
                resume="allow",
                dir=folder,
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off", disable_git=True, save_code=False),
            )
        except wandb.errors.Error as error:
            raise InputError(
                f"report.wandb {project}: {_line(error)}; set WANDB_API_KEY on the workers, or WANDB_MODE=offline"
            ) from error
        self.run.define_metric("*", step_metric="step")  # lines that a resumed run writes again are not dropped

    def write(self, metrics: Metrics) -> None:
        self.run.log({"step": metrics["step"], **scalars(metrics)})

    def close(self) -> None:
        self.run.finish()


class MlflowTracker:
    """A run of an MLflow tracking server. Where the server stops answering, tracking stops and training goes on."""

    def __init__(self, uri: str, config: TrainConfig, ids: dict[str, str]) -> None:
        from mlflow import MlflowClient
        from mlflow.environment_variables import MLFLOW_EXPERIMENT_NAME
        from mlflow.exceptions import MlflowException

        self.Failure = MlflowException
        self.stopped = False
        try:
            self.client = MlflowClient(tracking_uri=uri)
            if "mlflow" in ids:
                self.client.update_run(ids["mlflow"], status="RUNNING")
            else:
                name = MLFLOW_EXPERIMENT_NAME.get() or EXPERIMENT
                found = self.client.get_experiment_by_name(name)
                experiment = self.client.create_experiment(name) if found is None else found.experiment_id
                run = self.client.create_run(experiment, run_name=config.output.rpartition("/")[2])
                ids["mlflow"] = run.info.run_id
                self._describe(ids["mlflow"], config)
        except MlflowException as error:
            raise InputError(f"report.mlflow {uri}: {_line(error)}") from error
        self.run_id = ids["mlflow"]

    def _describe(self, run_id: str, config: TrainConfig) -> None:
        from mlflow.entities import Param

        settings = flatten(config.model_dump(mode="json"))
        params = [Param(name, value) for name, value in settings.items()]
        for start in range(0, len(params), 100):  # as many as one call may hold
            self.client.log_batch(run_id, params=params[start : start + 100])

    def write(self, metrics: Metrics) -> None:
        from mlflow.entities import Metric

        if self.stopped:
            return
        now_ms, step = int(time.time() * 1000), int(metrics["step"])
        values = [Metric(name, value, now_ms, step) for name, value in scalars(metrics).items()]
        try:
            self.client.log_batch(self.run_id, metrics=values)
        except self.Failure as error:
            self.stopped = True
            log.warning("MLflow gets no metrics from step %d on (%s); metrics.jsonl has all", step, _line(error))

    def close(self) -> None:
        if self.stopped:
            return
        try:
            self.client.set_terminated(self.run_id)
        except self.Failure as error:
            log.warning("MLflow was not told that the run has ended: %s", _line(error))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted name -> value as text, of nested settings."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found.update(flatten(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = str(value)
    return found


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
