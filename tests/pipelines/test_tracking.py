"""Where metrics go: W&B and MLflow without a network, Ray's gauges, and a dashboard that shows nothing else."""

import importlib.util
import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import InputError, build
from pipelines.training import gauges
from pipelines.training.records import scalars
from pipelines.training.settings import ReportSettings, TrainConfig
from pipelines.training.tracking import IDS_FILE, MlflowTracker, check_tracking, flatten, start_trackers

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "clusters" / "grafana" / "rmt-training.json").read_text(encoding="utf-8"))
LINE = {
    "step": 20,
    "loss": 2.5,
    "answer_loss": None,
    "gradient_norm": float("inf"),
    "loss_by_segment": [3.0, None, 2.0],
    "tokens_per_s": 1000,
}


def config(output: Path, **report: Any) -> TrainConfig:
    return build(TrainConfig, {"output": str(output), "report": report})


def test_a_line_becomes_its_finite_numbers_by_name() -> None:
    wanted = {"loss": 2.5, "tokens_per_s": 1000.0, "loss_by_segment/00": 3.0, "loss_by_segment/02": 2.0}
    assert scalars(LINE) == wanted


def test_settings_are_told_by_their_dotted_names() -> None:
    assert flatten({"a": 1, "b": {"c": None, "d": {"e": [1, 2]}}, "f": {}}) == {
        "a": "1",
        "b.c": "None",
        "b.d.e": "[1, 2]",
        "f": "{}",
    }


# --- MLflow -----------------------------------------------------------------------------------------


def test_mlflow_gets_settings_and_metrics_and_goes_on_with_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "memories")
    uri = (tmp_path / "store").as_uri()
    ids: dict[str, str] = {}
    run_config = config(tmp_path / "first", mlflow=uri)
    first = MlflowTracker(uri, run_config, ids)
    first.write(LINE)
    first.close()
    again = MlflowTracker(uri, run_config, ids)
    again.write(LINE | {"step": 40, "loss": 2.0})
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("memories").experiment_id])
    assert run.info.run_id == ids["mlflow"]
    assert run.info.run_name == "first"
    assert run.info.status == "RUNNING"
    assert run.data.params["model.memory.kind"] == "rmt"
    assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")] == [
        (20, 2.5),
        (40, 2.0),
    ]
    assert client.get_metric_history(run.info.run_id, "loss_by_segment/02")[0].value == 2.0
    again.close()
    assert client.get_run(run.info.run_id).info.status == "FINISHED"


def test_a_server_that_goes_away_ends_the_tracking_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exceptions = pytest.importorskip("mlflow.exceptions")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    tracker = MlflowTracker(uri, config(tmp_path / "run", mlflow=uri), {})

    def refuse(*args: Any, **settings: Any) -> None:
        raise exceptions.MlflowException("no answer")

    monkeypatch.setattr(tracker.client, "log_batch", refuse)
    tracker.write(LINE)
    tracker.write(LINE)
    tracker.close()
    (record,) = caplog.records
    assert "from step 20 on (no answer); metrics.jsonl has all" in record.getMessage()


def test_a_store_that_refuses_the_run_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    uri = (tmp_path / "store").as_uri()
    with pytest.raises(InputError, match="report.mlflow file:.*MLFLOW_ALLOW_FILE_STORE"):
        MlflowTracker(uri, config(tmp_path / "run", mlflow=uri), {})


# --- W&B --------------------------------------------------------------------------------------------

TRACK_OFFLINE = """
import json, sys
from pipelines.config import build
from pipelines.training.settings import TrainConfig
from pipelines.training.tracking import WandbTracker
output, ids = sys.argv[1], json.loads(sys.argv[2])
tracker = WandbTracker("memories", build(TrainConfig, {"output": output, "report": {"wandb": "memories"}}), ids)
tracker.write({"step": 20, "tokens_per_s": 1234.5, "loss_by_segment": [3.0]})
tracker.close()
print(json.dumps([ids["wandb"], tracker.run.project, tracker.run.name]))
"""


def track_offline(output: Path, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    command = [sys.executable, "-c", TRACK_OFFLINE, str(output), json.dumps(ids)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_wandb_offline_keeps_the_run_below_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    run_id, project, name = track_offline(tmp_path / "run", {}, monkeypatch)
    assert (project, name) == ("memories", "run")
    (kept,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}")
    (log,) = kept.glob("run-*.wandb")
    assert all(part in log.read_bytes() for part in (b"loss_by_segment/00", b"tokens_per_s", b"1234.5"))


# --- both -------------------------------------------------------------------------------------------


def test_what_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    check_tracking(ReportSettings(mlflow="http://127.0.0.1:5000"))
    with pytest.raises(InputError) as caught:
        check_tracking(ReportSettings(wandb="memories"))
    expected = "report.wandb needs wandb, which is not installed; run: pip install '.[tracking]'"
    assert str(caught.value) == expected


def test_a_password_is_not_put_on_disk() -> None:
    with pytest.raises(InputError, match="MLFLOW_TRACKING_PASSWORD"):
        check_tracking(ReportSettings(mlflow="https://me:secret@tracking.example"))


def test_the_names_of_a_runs_trackers_are_kept_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    wanted = config(tmp_path / "run", mlflow=(tmp_path / "store").as_uri())
    for tracker in start_trackers(wanted):
        tracker.close()
    ids = json.loads((tmp_path / "run" / IDS_FILE).read_text())
    assert set(ids) == {"mlflow"}
    for tracker in start_trackers(wanted):
        tracker.close()
    assert json.loads((tmp_path / "run" / IDS_FILE).read_text()) == ids


# --- gauges and the dashboard -----------------------------------------------------------------------


def expressions() -> list[str]:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return queries + [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]


def test_the_dashboard_shows_what_the_code_exports_and_all_of_it() -> None:
    shown = [set(re.findall(r"\b(?:ray|rmt)_\w+", expression)) for expression in expressions()]
    assert all(shown)
    assert set().union(*shown) == gauges.exported_names()


def test_the_dashboards_panels_have_places_and_numbers_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


@pytest.mark.long
def test_gauges_reach_rays_metrics_endpoint(local_ray: None) -> None:
    import ray

    @ray.remote
    class Worker:
        def tell(self) -> None:
            from pipelines.training.gauges import Gauges

            self.gauges = Gauges("tests/run")
            self.gauges.write({"step": 20, "loss": 2.5, "answer_loss": None, "loss_by_segment": [3.0, None, 2.0]})

    worker = Worker.remote()
    ray.get(worker.tell.remote())
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = ["ray_rmt_train_loss{", "ray_rmt_train_step{", "ray_rmt_train_loss_by_segment{"]
    deadline, text = time.monotonic() + 60, ""
    while time.monotonic() < deadline and not all(name in text for name in wanted):
        time.sleep(0.5)
        try:
            text = urllib.request.urlopen(url, timeout=5).read().decode()
        except OSError:
            continue
    lines = [line for line in text.splitlines() if line.startswith("ray_rmt_train_")]
    (loss,) = [line for line in lines if line.startswith("ray_rmt_train_loss{")]
    assert 'run="tests/run"' in loss
    assert loss.endswith(" 2.5")
    assert not [line for line in lines if line.startswith("ray_rmt_train_answer_loss{")]
    segments = [line for line in lines if line.startswith("ray_rmt_train_loss_by_segment{")]
    assert sorted(re.findall(r'segment="(\d+)"', " ".join(segments))) == ["00", "02"]
