"""Tasks of lm-evaluation-harness by their names; what is wrong with one is told before anything is measured.

A task is a YAML file, with Python functions where it likes. What is wrong with it shows only when the harness builds
the task and renders its questions, and then as any exception at all: so both are done once for the faults alone.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config import InputError
from pipelines.tasks.harness import writing_of

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

log = logging.getLogger(__name__)

_SEED = 1234  # of the examples before a question, as lm_eval.simple_evaluate has it
_NO_TASKS_IN = {"__pycache__", ".ipynb_checkpoints"}  # where the harness looks for no files


def find_tasks(asked: Sequence[str], folder: str | None) -> tuple["TaskManager", list[str]]:
    """The harness's register with the YAML files of a folder, and the names in it that are asked for.

    A wildcard (`mine*`) stands for all names that it matches. Raises InputError for what the register has not.
    """
    from lm_eval.tasks import TaskManager

    faults = [] if folder is None else _unreadable(Path(folder))
    manager = TaskManager(include_path=folder)
    names: dict[str, None] = {}  # as a set in order
    for name in asked:
        matching = [name] if name in manager.all_tasks else manager.match_tasks([name])
        if not matching:
            more = f" ({len(faults) - 1} more such files)" if faults[1:] else ""
            hint = f"; or is it in {faults[0]}{more}" if faults else ""
            raise InputError(f"--tasks {name}: lm-evaluation-harness has no such task{hint}")
        names |= dict.fromkeys(matching)
    for fault in faults:
        log.warning("without the task in %s", fault)
    return manager, list(names)


def check_tasks(manager: "TaskManager", names: Sequence[str], num_fewshot: int | None, limit: int | None) -> None:
    """Builds tasks and renders their questions as `lm_eval.simple_evaluate` does; InputError for the first fault."""
    built: list[Any] = []
    for name in names:
        with _told(f"--tasks {name}{_file(manager, name)}: lm-evaluation-harness cannot build it", manager, name):
            loaded = manager.load([name])
        if not loaded["tasks"]:
            raise InputError(f"--tasks {name}{_file(manager, name)}: there are no tasks in it")
        for task in loaded["tasks"].values():
            part = "" if task.task_name == name else f", task {task.task_name}"
            _check(task, f"--tasks {name}{part}{_file(manager, task.task_name)}", num_fewshot, limit)
        built += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    try:
        manager.load(built)
    except ValueError as error:  # a task is in two groups
        raise InputError(f"--tasks {','.join(names)}: {error}; give one of them") from error


def _check(task: "Task", title: str, num_fewshot: int | None, limit: int | None) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"{title}: it runs code that the model has written, which is not done; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"{title}: it shows pictures or plays sounds, and the model reads texts; leave it out")
    if any(metric.get("metric") == "bypass" for metric in task.get_config("metric_list") or []):
        raise InputError(f"{title}: its metric bypass measures nothing; give another")
    if num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(seed=_SEED)
    with _told(f"{title}: lm-evaluation-harness cannot render its questions"):
        task.build_all_requests(limit=limit)
    for request in task.instances:
        if request.request_type == "generate_until":
            try:
                writing_of(request.args[1])
            except InputError as error:
                raise InputError(f"{title}: {error}") from None


@contextlib.contextmanager
def _told(title: str, manager: "TaskManager | None" = None, name: str = "") -> Iterator[None]:
    """Makes InputError of whatever the harness raises meanwhile."""
    try:
        yield
    except Exception as error:  # files and functions of the user's run in here, and raise what they like
        hint = None if manager is None else _left_out(manager, name)
        raise InputError(f"{title}: {hint or _reason(error)}") from error


def _reason(error: BaseException) -> str:
    """An exception and what caused it, which says more where the harness's libraries raise."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return said if error.__cause__ is None else f"{said} ({_reason(error.__cause__)})"


def _left_out(manager: "TaskManager", name: str) -> str | None:
    """What the harness does not say of a task that cannot be built: no data are named, or no such task."""
    config = manager.task_index[name].cfg or {}
    data = {"dataset_path", "custom_dataset"}
    if config and not config.keys() & {"group", "class", *data}:
        return "it names no data; give dataset_path"
    if "group" in config and not config.keys() & data and isinstance(members := config.get("task"), list):
        unknown = [member for member in members if isinstance(member, str) and member not in manager.task_index]
        return f"there is no task {unknown[0]}" if unknown else None
    return None


def _file(manager: "TaskManager", name: str) -> str:
    """Where a task stands, in brackets."""
    entry = manager.task_index.get(name)
    return "" if entry is None or entry.yaml_path is None else f" ({entry.yaml_path})"


def _unreadable(folder: Path) -> list[str]:
    """The YAML files that the harness leaves out without a word, and why. InputError for names that it falls over."""
    from lm_eval.tasks._yaml_loader import load_yaml

    faults = []
    for path in sorted(folder.rglob("*.yaml")):
        if _NO_TASKS_IN & set(path.parts):
            continue
        try:
            config = load_yaml(path, resolve_func=False)
        except Exception as error:  # not YAML, not UTF-8, not there, a function's name that is none ...
            faults.append(f"{path}, which cannot be read: {_reason(error)}")
            continue
        tags = config.get("tag") or []
        for name in (config.get("group", config.get("task", "")), *(tags if isinstance(tags, list) else [tags])):
            if not isinstance(name, str):
                raise InputError(f"{path}: the name of a task, group or tag is {name!r}; it must be a text, in quotes")
    return faults
