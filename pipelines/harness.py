"""Measure a model with memory by tasks of lm-evaluation-harness, on whole texts.

    python pipelines/harness.py --model DIR --tasks NAME[,NAME] --output DIR
    python pipelines/harness.py --model DIR --tasks mine --include-path FOLDER --output DIR     # tasks in YAML files

Every request is read from its first token to its last through the memory, in one stream: nothing is truncated. The
output holds results.json, as the harness gives it, and the resolved config.json.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import from the repository root, not from pipelines/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic

import rmt_core
from pipelines import storage
from pipelines.config import Config, InputError, split_commas
from pipelines.extras import require_extra
from pipelines.job import run_job
from pipelines.tasks.harness import as_harness_model
from pipelines.tasks.harness_tasks import check_tasks, find_tasks
from pipelines.tasks.running import load

log = logging.getLogger(__name__ if __name__ != "__main__" else "pipelines.harness")

FORMAT = "rmt-harness-1"
RESULTS, CONFIG = "results.json", "config.json"  # the latter is written last


class HarnessConfig(Config):
    model: str = pydantic.Field(description="directory of a trained model, on disk or s3://")
    output: str = pydantic.Field(description="directory of the results, on disk or s3://")
    tasks: Annotated[list[str], pydantic.BeforeValidator(split_commas)] = pydantic.Field(
        min_length=1, description="names of tasks or groups of lm-evaluation-harness, or wildcards"
    )
    include_path: str | None = pydantic.Field(None, description="folder with further tasks in YAML files")
    num_fewshot: int | None = pydantic.Field(None, ge=0, description="examples before a question (none: the task's)")
    limit: int | None = pydantic.Field(None, ge=1, description="questions a task, its first ones (none: all)")
    batch_size: int = pydantic.Field(8, ge=1, description="rows read at once")
    device: Literal["cpu", "cuda"] = pydantic.Field("cpu", description="where the model runs: cpu or cuda")


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__
    return run_job(measure, HarnessConfig, argv, prog="harness", description=__doc__.splitlines()[0])


def measure(config: HarnessConfig) -> dict[str, Any]:
    """Runs the tasks; their metrics. Raises InputError."""
    require_extra("harness", job="harness")
    from lm_eval import simple_evaluate

    output = storage.absolute(config.output)
    if config.include_path is not None and not Path(config.include_path).is_dir():
        raise InputError(f"--include-path {config.include_path}: there is no such folder")
    manager, names = find_tasks(config.tasks, config.include_path)
    model, tokenizer = load(storage.absolute(config.model), config.device)
    settings = config.model_dump(mode="json", exclude={"model", "output"})
    about = {
        "format": FORMAT,
        **settings,
        "tasks": names,
        "model": rmt_core.fingerprint(model),
        "lm_eval": importlib.metadata.version("lm_eval"),
        "include": config.include_path and _digest(Path(config.include_path)),
    }
    if not _is_measured(output, about):
        adapter = as_harness_model(model, tokenizer, config.batch_size)
        check_tasks(manager, names, config.num_fewshot, config.limit)
        found = simple_evaluate(
            model=adapter,
            tasks=names,  # built anew: seeded as the harness does it
            task_manager=manager,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            log_samples=False,
        )
        storage.write_json(storage.join(output, RESULTS), kept(found))
        storage.write_json(storage.join(output, CONFIG), about)
    log.info("results in %s", storage.join(output, RESULTS))
    return {"output": output, "metrics": _metrics(storage.read_json(storage.join(output, RESULTS))["results"])}


def kept(found: dict[str, Any]) -> dict[str, Any]:
    """What is written of the harness's results; null where a diverged model gave no finite number."""
    wanted = {name: found[name] for name in ("results", "versions", "n-shot", "n-samples", "higher_is_better")}
    plain: dict[str, Any] = json.loads(json.dumps(wanted, default=str), parse_constant=lambda _: None)
    return plain


def _digest(folder: Path) -> str:
    """Of all files in a folder, their names and what they hold."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        digest.update(f"{path.relative_to(folder)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _is_measured(output: str, about: dict[str, Any]) -> bool:
    """Whether just this was measured there; InputError where the directory holds anything else."""
    if storage.exists(output) and not storage.is_directory(output):
        raise InputError(f"{output} is a file; --output needs a directory")
    names = storage.list_names(output) if storage.exists(output) else []
    if CONFIG in names:
        if storage.read_json(storage.join(output, CONFIG)) == about:
            log.info("%s is already measured with these settings: nothing to do", output)
            return True
    elif set(names) <= {RESULTS}:
        return False
    raise InputError(f"{output} holds something else; give another --output")


def _metrics(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The harness's figures, one a line: its keys are `metric,filter`."""
    return [
        {"task": task, "metric": name.partition(",")[0], "filter": name.partition(",")[2], "value": value}
        for task, figures in results.items()
        for name, value in figures.items()
        if (value is None or isinstance(value, int | float)) and "," in name and "_stderr" not in name
    ]


if __name__ == "__main__":
    sys.exit(main())
