"""Who may import whom, read from the source by its syntax tree, and that no import has an effect.

1. `rmt_core` imports torch, transformers, safetensors and the standard library.
2. A memory imports `memory/base.py` and `state.py`; `backbone.py` and `recurrent.py` know no concrete memory.
3. A job imports the parts of `pipelines` and `rmt_core`; nothing imports a job.
4. `ray` is imported by the jobs, `cluster.py`, `serving/` and the few files of `KNOW_RAY` only.
5. `deepspeed` is imported inside functions of `train.py` and `training/` only. No import has an effect.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

CORE_MAY_IMPORT = {"torch", "transformers", "safetensors", "rmt_core"} | sys.stdlib_module_names
JOBS = {
    "benchmark",
    "compare",
    "demo",
    "evaluate",
    "harness",
    "pictures",
    "prepare",
    "serve",
    "summarise",
    "summary_quality",
    "train",
}
JOB_MAY_IMPORT = {
    "benchmarks",
    "claim",
    "cluster",
    "config",
    "data",
    "extras",
    "job",
    "origin",
    "recipes",
    "serving",
    "storage",
    "summarising",
    "tasks",
    "training",
}
KNOW_RAY = {
    "benchmarks": {"training_probe"},
    "data": {"spreading"},
    "training": {"gauges", "visibility", "worker"},
    "summarising": {"crew", "planning"},
}
MEMORY_MAY_IMPORT = {"rmt_core.memory.base", "rmt_core.state"}

# Calls that change the process, ask for a device or leave it; never while a module is imported.
EFFECTS = (
    "atexit.", "logging.basicConfig", "logging.disable", "multiprocessing.set_", "open", "os.chdir", "os.environ.",
    "os.makedirs", "os.putenv", "print", "random.seed", "ray.init", "signal.", "subprocess.", "sys.path.",
    "torch.backends.", "torch.cuda.", "torch.manual_seed", "torch.set_", "warnings.",
)  # fmt: skip


class Import(NamedTuple):
    target: str  # dotted name of a module, as exact as the tree allows
    line: int
    at_import: bool  # runs when the module is imported, not when a function is called


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute expression, else the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def imports(tree: ast.Module, module: str, is_package: bool, modules: set[str]) -> Iterator[Import]:
    """Every import of `module`, nested ones and `import_module("constant")` included, made absolute."""
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        at_import = id(node) not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield Import(inner if inner in modules else source, node.lineno, at_import)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith(("import_module", "__import__")):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield Import(argument.value, node.lineno, at_import)


def is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """The node and what runs with it when the module is imported: no function bodies, no main block."""
    if isinstance(node, ast.stmt) and is_main_guard(node):
        return
    yield node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        children: list[ast.AST] = [*node.decorator_list, *node.args.defaults]
        children += [default for default in node.args.kw_defaults if default is not None]
    elif isinstance(node, ast.Lambda):
        children = []
    else:
        children = list(ast.iter_child_nodes(node))
    for child in children:
        yield from executed(child)


def effects(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of what changes something outside the module while it is imported."""
    foreign = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    for node in executed(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            owner = dotted(target.value) if isinstance(target, ast.Subscript | ast.Attribute) else ""
            if owner.split(".")[0] in foreign:
                yield target.lineno, ast.unparse(target)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node.lineno, ast.unparse(node.value)
        elif isinstance(node, ast.Call) and any(
            dotted(node.func).startswith(name) if name.endswith((".", "_")) else dotted(node.func) == name
            for name in EFFECTS
        ):
            yield node.lineno, ast.unparse(node)


def refusal(module: str, found: Import) -> str | None:
    """Why `module` may not import what was found, or None where it may."""
    names, target = module.split("."), found.target.split(".")
    parts = [*names[1:], ""]
    of_training = names[0] == "pipelines" and parts[0] in ("train", "training")
    if target[0] == "deepspeed" and (found.at_import or not of_training):
        return "rule 5: deepspeed is imported inside functions of pipelines/train.py and training/ only"
    if names[0] == "rmt_core":
        if target[0] not in CORE_MAY_IMPORT:
            return "rule 1: rmt_core imports torch, transformers, safetensors and the standard library"
        if target[0] == "rmt_core" and parts[0] == "memory" and parts[1] and found.target not in MEMORY_MAY_IMPORT:
            return "rule 2: a memory imports memory/base.py and state.py only"
        if parts[0] in ("backbone", "recurrent") and target[:2] == ["rmt_core", "memory"] and target[2:] != ["base"]:
            return "rule 2: backbone.py and recurrent.py know no concrete memory"
        return None
    if target[0] == "pipelines" and len(target) > 1:
        if target[1] in JOBS:
            return "rule 3: a job is imported by nothing"
        if parts[0] in JOBS and target[1] not in JOB_MAY_IMPORT:
            return f"rule 3: a job imports pipelines/{{{','.join(sorted(JOB_MAY_IMPORT))}}} and rmt_core"
    knows_ray = parts[0] in JOBS | {"cluster", "serving"} or parts[1] in KNOW_RAY.get(parts[0], ())
    if target[0] == "ray" and not knows_ray:
        return "rule 4: ray is imported by the jobs, cluster.py, serving/ and the few files of KNOW_RAY only"
    return None


def violations(root: Path) -> list[str]:
    """One line for each broken rule in `rmt_core` and `pipelines` under `root`."""
    files: dict[str, Path] = {}
    for path in sorted([*root.glob("rmt_core/**/*.py"), *root.glob("pipelines/**/*.py")]):
        parts = path.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = []
    for module, path in files.items():
        where = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=where)
        for one in imports(tree, module, path.name == "__init__.py", set(files)):
            if reason := refusal(module, one):
                found.append(f"{where}:{one.line}: imports {one.target}; {reason}")
        found += [f"{where}:{line}: {text} runs at import; rule 5: no effect" for line, text in effects(tree)]
    return list(dict.fromkeys(found))


def test_the_tree_keeps_the_rules() -> None:
    assert violations(ROOT) == []


def plant(root: Path, where: str, source: str) -> list[str]:
    """The violations of a tree of empty modules with one file of `source`."""
    names = ["rmt_core/state", "rmt_core/memory/base", "rmt_core/memory/rmt", "rmt_core/memory/xl", "pipelines/config"]
    for name in [*(f"{name}.py" for name in names), "rmt_core/memory/__init__.py", "rmt_core/__init__.py"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / where).parent.mkdir(parents=True, exist_ok=True)
    (root / where).write_text(source, encoding="utf-8")
    return violations(root)


@pytest.mark.parametrize(
    ("where", "source", "rule"),
    [
        ("rmt_core/state.py", "import ray", 1),
        ("rmt_core/state.py", "import numpy as np", 1),
        ("rmt_core/state.py", "def f():\n    from pipelines.config import Config", 1),
        ("rmt_core/state.py", "import importlib\ndef f():\n    importlib.import_module('pipelines.config')", 1),
        ("rmt_core/memory/xl.py", "from .rmt import RMTMemory", 2),
        ("rmt_core/memory/xl.py", "from . import rmt", 2),
        ("rmt_core/memory/xl.py", "from ..recurrent import RecurrentModel", 2),
        ("rmt_core/memory/xl.py", "from rmt_core.memory import rmt", 2),
        ("rmt_core/backbone.py", "from .memory import MEMORIES", 2),
        ("rmt_core/backbone.py", "from .memory.rmt import RMTMemory", 2),
        ("rmt_core/recurrent.py", "import rmt_core.memory.xl", 2),
        ("pipelines/train.py", "import pipelines.prepare", 3),
        ("pipelines/evaluate.py", "def f():\n    from pipelines.train import main", 3),
        ("pipelines/data/read.py", "from pipelines import prepare", 3),
        ("pipelines/train.py", "import pipelines.leftovers", 3),
        ("pipelines/data/read.py", "import ray.data", 4),
        ("pipelines/tasks/recall.py", "def f():\n    import ray", 4),
        ("pipelines/storage.py", "from ray.data import Dataset", 4),
        ("pipelines/train.py", "import deepspeed", 5),
        ("pipelines/training/engine.py", "import deepspeed", 5),
        ("pipelines/training/engine.py", "def f():\n    import ray", 4),
        ("pipelines/summarising/worker.py", "import ray", 4),
        ("pipelines/evaluate.py", "def f():\n    import deepspeed", 5),
        ("rmt_core/state.py", "def f():\n    import deepspeed", 5),
        ("pipelines/config.py", "import os\nos.environ['A'] = '1'", 5),
        ("pipelines/config.py", "import os\nOLD = os.environ.setdefault('A', '1')", 5),
        ("pipelines/config.py", "import logging\nlogging.basicConfig()", 5),
        ("pipelines/config.py", "import torch\nDEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'", 5),
        ("pipelines/config.py", "import torch\ndef f(n=torch.cuda.device_count()): ...", 5),
        ("pipelines/config.py", "import torch\nclass A:\n    torch.set_num_threads(1)", 5),
        ("pipelines/config.py", "import torch\nif True:\n    torch.backends.cudnn.benchmark = True", 5),
        ("pipelines/config.py", "import sys\nsys.path[0] = '.'", 5),
    ],
)
def test_a_planted_violation_is_caught(tmp_path: Path, where: str, source: str, rule: int) -> None:
    if "prepare" in source:
        plant(tmp_path, "pipelines/prepare.py", "")
    found = plant(tmp_path, where, source)
    assert len(found) == 1, found
    assert found[0].startswith(f"{where}:")
    assert f"rule {rule}" in found[0]


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("rmt_core/memory/xl.py", "import math\nimport torch\nfrom ..state import State\nfrom .base import Memory"),
        ("rmt_core/memory/__init__.py", "from .rmt import RMTMemory\nfrom .xl import XLMemory"),
        ("rmt_core/recurrent.py", "from .memory.base import Memory\nfrom . import state"),
        ("pipelines/train.py", "import ray.train\nimport rmt_core\ndef worker():\n    import deepspeed"),
        ("pipelines/train.py", "from pipelines.config import Config\nfrom pipelines.data.lanes import Lane"),
        ("pipelines/training/engine.py", "def f():\n    import deepspeed"),
        ("pipelines/cluster.py", "import ray"),
        ("pipelines/training/worker.py", "import ray.train"),
        ("pipelines/summarising/crew.py", "import ray.data"),
        ("pipelines/serving/engine.py", "from ray import serve"),
        ("pipelines/train.py", "import sys\nif __name__ == '__main__':\n    sys.path[0] = '.'\n    sys.exit(0)"),
        ("pipelines/config.py", "import logging\nLOG = logging.getLogger(__name__)\nT = {}\nT['a'] = 1"),
        ("pipelines/config.py", "import os\ndef f():\n    os.environ['A'] = '1'"),
    ],
)
def test_what_the_rules_allow_is_allowed(tmp_path: Path, where: str, source: str) -> None:
    assert plant(tmp_path, where, source) == []


# Libraries write to the environment when they are first imported; only writes by a line of this project count.
IMPORT_EVERYTHING = """
import json, logging, os, sys
import ray, torch

writes = []
def watch(event, args):
    if event in ("os.putenv", "os.unsetenv", "subprocess.Popen", "socket.connect"):
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename in (os.__file__, "<frozen os>", "<frozen _collections_abc>"):
            frame = frame.f_back
        path = frame.f_code.co_filename if frame else ""
        if path.startswith((os.path.join(os.getcwd(), "rmt_core"), os.path.join(os.getcwd(), "pipelines"))):
            writes.append([event, path])
sys.addaudithook(watch)

before = list(logging.root.handlers), torch.get_num_threads(), list(sys.path)
for name in sys.argv[1:]:
    __import__(name)
after = list(logging.root.handlers), torch.get_num_threads(), list(sys.path)
print(json.dumps({"writes": writes, "same": before == after, "cuda": torch.cuda.is_initialized(),
                  "ray": ray.is_initialized(), "deepspeed": "deepspeed" in sys.modules}))
"""


@pytest.mark.long
def test_importing_every_module_changes_nothing() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in ("rmt_core", "pipelines")
        for path in sorted((ROOT / package).rglob("*.py"))
    ]
    command = [sys.executable, "-c", IMPORT_EVERYTHING, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"writes": [], "same": True, "cuda": False, "ray": False, "deepspeed": False}
