"""The cluster files are valid, agree with the lock, keep what they promise, and start jobs that there are."""

import copy
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipelines.config import Config, build, parse
from pipelines.recipes import RECIPES
from pipelines.serving.serve_config import ServeConfig
from pipelines.training.costs import ModelSize, SegmentCost
from pipelines.training.footprint import footprint
from pipelines.training.settings import TrainConfig

from .kuberay_schema import KINDS

ROOT = Path(__file__).resolve().parents[1]
CLUSTERS = ROOT / "clusters"
LAUNCHER = ("local", "aws", "gcp")
FILES = sorted(path for path in CLUSTERS.rglob("*") if path.is_file())
LOCK = dict(
    line.split("==")
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)
IMAGE = "registry.example.com/rmt-ray:0.1.0"
POOL = "rmt/pool"


def launcher(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text(encoding="utf-8"))
    return config


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted((CLUSTERS / "kuberay").glob("*.yaml")):
        for manifest in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            yield f"{path.name}:{manifest['kind']}", manifest


MANIFESTS = dict(manifests())
RAY_SPECS = {
    name: manifest["spec"].get("rayClusterSpec") or manifest["spec"].get("rayClusterConfig") or manifest["spec"]
    for name, manifest in MANIFESTS.items()
    if manifest["apiVersion"] == "ray.io/v1"
}
JOBS = {name: manifest for name, manifest in MANIFESTS.items() if manifest["kind"] == "RayJob"}


def pods(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]["spec"]


# --- the launcher's files ---------------------------------------------------------------------------


def validate(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_launcher_takes_them(name: str) -> None:
    validate(launcher(name))
    misspelt = {**launcher(name), "idle_timeout_minute": 5}
    with pytest.raises(jsonschema.ValidationError):
        validate(misspelt)


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_dashboard_is_on_loopback_and_asks_for_a_token(name: str) -> None:
    config = launcher(name)
    head = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    for commands in (head, " ".join(config["worker_start_ray_commands"])):
        assert "export RAY_AUTH_MODE=token" in commands
    assert int(re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", head)[0]) >= 60
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert config["docker"]["image"] == IMAGE


def test_nothing_is_scheduled_on_the_head() -> None:
    for name in ("aws", "gcp"):
        config = launcher(name)
        assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}
    assert "--num-cpus=0 --num-gpus=0" in " ".join(launcher("local")["head_start_ray_commands"])
    for name, spec in RAY_SPECS.items():
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", name


@pytest.mark.parametrize(("name", "spot"), [("aws", "InstanceMarketOptions"), ("gcp", "scheduling")])
def test_workers_are_spot_and_the_head_is_not(name: str, spot: str) -> None:
    config = launcher(name)
    for kind, node in config["available_node_types"].items():
        is_head = kind == config["head_node_type"]
        assert (spot in node["node_config"]) != is_head, kind
        if not is_head:
            assert node["min_workers"] == 0
    pools = {node["labels"][POOL] for node in config["available_node_types"].values() if "labels" in node}
    assert pools == {"train", "data"} == set(_pools(config))


@pytest.mark.parametrize("name", LAUNCHER)
def test_nothing_is_installed_outside_the_lock(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config

    config = prepare_config(copy.deepcopy(launcher(name)))  # with the launcher's defaults where a file says nothing
    assert not config["setup_commands"] + config["worker_setup_commands"]
    for command in config["head_setup_commands"]:
        words = shlex.split(command)
        packages = [word for word in words[2:] if not word.startswith("--")]
        assert words[:2] == ["pip", "install"]
        assert "--no-deps" in words
        for package, version in (word.split("==") for word in packages):
            assert LOCK.get(package, version) == version


def test_what_workers_have_is_said_where_the_provider_does_not_look_it_up() -> None:
    """Ray's autoscaler fills it in on AWS alone; a type that has nothing is never started."""
    config = launcher("gcp")
    for kind, node in config["available_node_types"].items():
        if kind != config["head_node_type"]:
            assert node["resources"]["CPU"] == int(node["node_config"]["machineType"].rpartition("-")[2]), kind
            assert node["resources"].get("GPU", 0) == (node["labels"][POOL] == "train"), kind


def test_all_nodes_are_in_a_security_group_of_ones_own() -> None:
    """One that Ray's AWS provider makes takes ssh from everywhere, whatever else the file says."""
    config = launcher("aws")
    groups = [node["node_config"]["SecurityGroupIds"] for node in config["available_node_types"].values()]
    assert len(groups) == 3
    assert all(group == groups[0] and group[0].startswith("sg-") for group in groups)
    assert "security_group" not in config["provider"]


def _pools(config: dict[str, Any]) -> list[str]:
    """What all nodes say, the head and the workers alike."""
    commands = (" ".join(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    (said,) = {re.findall(r"RMT_POOLS=(\S+?)[; ]", each)[0] for each in commands}
    return said.split(",")


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_workers_listen_for_notices_of_their_end(cloud: str) -> None:
    (command,) = (each for each in launcher(cloud)["worker_start_ray_commands"] if "spot_notice" in each)
    words = shlex.split(command)
    script = words[words.index("python") + 1].removeprefix("~/rmt/")
    assert (ROOT / script).is_file()
    assert f"COPY --chown=ray:ray {script} ./{script}" in (CLUSTERS / "Containerfile").read_text(encoding="utf-8")
    assert words[words.index("python") + 2 :][:2] == [cloud, "$RAY_HEAD_IP:6379"]
    assert (words[0], words[-1]) == ("setsid", "&"), "it outlives the session that starts it"


def test_own_machines_are_all_started() -> None:
    config = launcher("local")
    assert config["min_workers"] == config["max_workers"] == len(config["provider"]["worker_ips"])
    (pool,) = _pools(config)
    assert f'--labels="{POOL}={pool}"' in config["worker_start_ray_commands"][-1]


# --- Kubernetes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberay_takes_them(name: str) -> None:
    manifest = MANIFESTS[name]
    jsonschema.Draft202012Validator(KINDS[manifest["kind"]]).validate(manifest)


def test_the_schema_is_strict() -> None:
    good = MANIFESTS["rayjob-train.yaml:RayJob"]
    for change in (
        lambda spec: spec.update(submissionMod="SidecarMode"),
        lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda spec: next(pods(spec["rayClusterSpec"]))["containers"][0].update(volumeMount=[]),
        lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].pop("maxReplicas"),
    ):
        wrong = copy.deepcopy(good)
        change(wrong["spec"])
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(KINDS["RayJob"]).validate(wrong)


def test_the_kinds_that_are_promised_are_there() -> None:
    assert {name.partition(":")[0] for name in JOBS} == {
        f"rayjob-{job}.yaml" for job in ("train", "prepare", "summarise")
    }
    kinds = {manifest["kind"] for manifest in MANIFESTS.values()}
    assert kinds == set(KINDS)


@pytest.mark.parametrize("name", RAY_SPECS)
def test_pods_are_sized_locked_and_share_disk_and_memory(name: str) -> None:
    spec = RAY_SPECS[name]
    assert spec["authOptions"] == {"mode": "token"}
    for pod in pods(spec):
        (container,) = pod["containers"]
        assert container["image"] == IMAGE
        sizes = container["resources"]
        assert sizes["requests"]["memory"] == sizes["limits"]["memory"]  # Ray reads the limit
        assert sizes["requests"] == sizes["limits"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert volumes[mounts["/mnt/rmt"]]["persistentVolumeClaim"]["claimName"] == "rmt-store"
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
    environment = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    pools = next(variable["value"] for variable in environment if variable["name"] == "RMT_POOLS").split(",")
    assert {group["labels"][POOL] for group in spec["workerGroupSpecs"]} == set(pools)
    assert all(pod["containers"][0]["env"] == environment for pod in pods(spec))


@pytest.mark.parametrize("name", RAY_SPECS)
def test_workers_are_spot_and_have_time_to_checkpoint(name: str) -> None:
    for group in RAY_SPECS[name]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert pod["nodeSelector"] == {"rmt/spot": "true"}
        assert "rmt/spot" in {toleration["key"] for toleration in pod["tolerations"]}
        drain_s = _variables(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        assert 60 <= int(drain_s) <= pod["terminationGracePeriodSeconds"] - 10
        assert "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"] or group["labels"][POOL] == "data"
    assert "nodeSelector" not in RAY_SPECS[name]["headGroupSpec"]["template"]["spec"]


def _variables(pod: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}


def test_the_network_policy_covers_every_pod() -> None:
    policy = MANIFESTS["network-policy.yaml:NetworkPolicy"]["spec"]
    labels = policy["podSelector"]["matchLabels"]
    for spec in RAY_SPECS.values():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert labels.items() <= group["template"]["metadata"]["labels"].items()
    open_to_others = [rule for rule in policy["ingress"] if rule["from"] != [{"podSelector": {"matchLabels": labels}}]]
    assert all(rule.get("ports") and rule["from"] for rule in open_to_others)
    cluster = RAY_SPECS["raycluster.yaml:RayCluster"]
    assert cluster["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"


# --- jobs -------------------------------------------------------------------------------------------


def settings_of(words: list[str]) -> Config:
    """What a command line asks for; InputError where the job would refuse it."""
    assert words[0] == "python"
    job = re.fullmatch(r"pipelines/([a-z]+)\.py", words[1])
    assert job, words
    assert (ROOT / words[1]).is_file()
    module = importlib.import_module(f"pipelines.{job[1]}")
    config_class = next(
        value for name, value in vars(module).items() if name.lower() == f"{job[1]}config" and issubclass(value, Config)
    )
    rest, base = words[2:], None
    if job[1] == "train" and rest[0].isidentifier():
        base, rest = RECIPES[rest[0]], rest[1:]
    config, _ = parse(config_class, rest, prog=job[1], description="", base=base)
    return config


@pytest.mark.parametrize("name", JOBS)
def test_entry_points_are_jobs_that_take_their_options(name: str) -> None:
    manifest = JOBS[name]
    config = settings_of(shlex.split(manifest["spec"]["entrypoint"])).model_dump()
    for value in [config["output"], config.get("data"), config.get("model"), *(config.get("input") or [])]:
        if isinstance(value, str):
            assert value.startswith("/mnt/rmt/"), "what all pods see"
    assert yaml.safe_load(manifest["spec"]["runtimeEnvYAML"]) == {"working_dir": "/home/ray/rmt"}
    workers = config["num_workers"] if "num_workers" in config else config.get("workers", {}).get("num_workers")
    largest = sum(group["maxReplicas"] for group in RAY_SPECS[name]["workerGroupSpecs"])
    if workers is not None:
        wanted = workers if isinstance(workers, int) else max(workers)
        assert wanted <= largest, "a worker a GPU"


def test_the_service_names_its_application() -> None:
    spec = MANIFESTS["rayservice.yaml:RayService"]["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert application["import_path"] == "pipelines.serve:build"
    assert application["route_prefix"] == "/"
    assert callable(importlib.import_module("pipelines.serve").build)
    config = build(ServeConfig, {"host": "every address", **application["args"]})  # as the proxy's, it needs keys
    for value in (config.model, config.store, config.api_keys):
        assert str(value).startswith("/mnt/rmt/"), "what all replicas see"


# --- all files --------------------------------------------------------------------------------------


def test_versions_are_those_of_the_lock() -> None:
    for name, spec in RAY_SPECS.items():
        assert spec["rayVersion"] == LOCK["ray"], name
    image = (CLUSTERS / "Containerfile").read_text(encoding="utf-8")
    assert re.search(r"^FROM python:3\.11-", image, re.MULTILINE)
    assert "pip install --no-cache-dir -r /tmp/requirements.lock" in image
    assert not re.findall(r"[a-z0-9]==[0-9]", image), "versions come from the lock alone"
    assert {"openssh-client", "rsync"} <= set(image.split()), "how the launcher's head reaches workers"
    copied = [name for line in re.findall(r"^COPY (?:--\S+ )?(.+) \S+$", image, re.MULTILINE) for name in line.split()]
    assert {"requirements.lock", "rmt_core", "pipelines"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)


SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|(secret|password|access_key|token)['\"]?\s*[:=]\s*['\"]?[A-Za-z0-9+/]{12,}",
    re.IGNORECASE,
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CLUSTERS)))
def test_no_open_address_and_no_secret(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "0.0.0.0" not in text
    assert "::/0" not in text
    assert not SECRETS.search(text)
    assert "RAY_AUTH_TOKEN=" not in text


def test_secrets_would_be_found() -> None:
    for text in ("key: AKIAABCDEFGHIJKLMNOP", "password: hunter2hunter2", '{"token": "abcdefabcdef12"}'):
        assert SECRETS.search(text)


# --- sizes ------------------------------------------------------------------------------------------


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading."""
    lines = text[text.index(heading) :].splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


@pytest.mark.slow
def test_sizes_are_deepspeeds() -> None:
    """The table of gigabytes a GPU is what DeepSpeed's own estimators give."""
    stage2 = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2").estimate_zero2_model_states_mem_needs
    stage3 = importlib.import_module("deepspeed.runtime.zero.stage3").estimate_zero3_model_states_mem_needs
    text = (CLUSTERS / "README.md").read_text(encoding="utf-8")
    table = rows(text, "## How large a model")
    assert {row[0] for row in table} == {"1B", "3B", "8B"}
    for size, total, largest, gpus, *cells in table:
        num, layer, count = round(float(total) * 1e9), round(float(largest) * 1e9), int(gpus)
        expected = [
            stage2(num, num_gpus_per_node=count, cpu_offload=False)[1],
            stage3(num, layer, num_gpus_per_node=count, cpu_offload=False)[1],
            stage3(num, layer, num_gpus_per_node=count, cpu_offload=True, cpu_offload_params=False)[1],
        ]
        assert [float(cell) for cell in cells] == [round(value / 1e9, 1) for value in expected], (size, gpus)


def planned_bytes(row: list[str], stage: int, mode: str, *, offloads: bool) -> int:
    """What `train --dry-run` tells of a GPU for a row of sizes, without activations."""
    _, total, largest, num_gpus, *_ = row
    values = {
        "batch_size": int(num_gpus),
        "workers": {"precision": "bfloat16", "offload_optimizer": offloads, "num_workers": int(num_gpus)},
        "gradient": {"mode": mode},
    }
    num, layer = round(float(total) * 1e9), round(float(largest) * 1e9)
    size, nothing = ModelSize(num, num, layer), SegmentCost(0, 0, 0, 0, 0)
    return footprint(build(TrainConfig, values), size, nothing, stage, int(num_gpus)).device_bytes


def test_what_is_said_to_fit_fits_the_nodes_that_are_shipped() -> None:
    """A third of the GPU is left, and of the node's memory what Ray's object store may take."""
    text = (CLUSTERS / "README.md").read_text(encoding="utf-8")
    sizes = {(row[0], row[3]): row for row in rows(text, "## How large a model")}
    fits = rows(text, "### What fits on these nodes")
    assert {row[0] for row in fits} == {"1B", "3B"}
    for size, nodes, stage, gpu, once, often, held in fits:
        row = sizes[size, nodes]
        offloads = stage.endswith("CPU")
        assert gpu == row[6 if offloads else {"2": 4, "3": 5}[stage]], (size, nodes)
        total = float(row[1])
        assert float(held) == round(24 * total * offloads / int(nodes) + 2 * total, 1), (size, nodes)
        for mode, cell in (("checkpoint", once), ("replay", often)):
            assert float(cell) == round(planned_bytes(row, int(stage[0]), mode, offloads=offloads) / 1e9, 1), (
                size,
                mode,
            )
        assert float(once) <= 24 * 2 / 3
        assert float(held) <= 0.7 * 64 * 2**30 / 1e9
        assert int(nodes) <= launcher("aws")["available_node_types"]["train_gpu_spot"]["max_workers"]
    for spec in RAY_SPECS.values():
        for pod in pods(spec):
            limits = pod["containers"][0]["resources"]["limits"]
            assert "nvidia.com/gpu" not in limits or limits["memory"] == "64Gi"
