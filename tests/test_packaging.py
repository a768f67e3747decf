"""What is built and installed is complete: the wheel, its scripts, the lock."""

import hashlib
import json
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK, HARNESS_LOCK = (
    [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    for name in ("requirements.lock", "requirements-harness.lock")
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_books_byte_for_byte(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        manifest = json.loads(archive.read("pipelines/books/manifest.json"))
        for entry in manifest["books"]:
            data = archive.read(f"pipelines/books/{entry['file']}")
            assert hashlib.sha256(data).hexdigest() == entry["sha256"], entry["file"]


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"rmt_core/__init__.py", "rmt_core/py.typed", "pipelines/__init__.py", "pipelines/py.typed"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"rmt_core", "pipelines"}
    assert "pipelines/serving/web/index.html" in names
    assert not [name for name in names if "__pycache__" in name]
    assert not [name for name in names if name.endswith((".parquet", ".safetensors"))]


def test_the_wheel_names_scripts_and_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        scripts = archive.read(entry_points).decode()
        metadata = archive.read(entry_points.replace("entry_points.txt", "METADATA")).decode()
    for job in ("prepare", "train", "evaluate", "serve", "summarise", "benchmark"):
        assert f"rmt-{job} = pipelines.{job}:main" in scripts
    for extra in ("train", "serve", "dev"):
        assert f"Provides-Extra: {extra}\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata


@pytest.mark.long
def test_the_installed_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", "installed", str(wheel)]
    subprocess.run([sys.executable, *install], cwd=tmp_path, check=True, capture_output=True)
    program = (
        "import sys; sys.path.insert(0, 'installed')\n"
        "import rmt_core, pipelines.config, importlib.resources as resources\n"
        "print(rmt_core.__file__)\n"
        "print(resources.files('pipelines').joinpath('books/heldout/persuasion.txt').read_text('utf-8')[:10])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True)
    where, title = done.stdout.splitlines()
    assert (tmp_path / where).resolve() == tmp_path / "installed" / "rmt_core" / "__init__.py"
    assert title == "Persuasion"


@pytest.mark.parametrize("name", PROJECT["scripts"])
def test_a_console_script_resolves(name: str) -> None:
    assert callable(EntryPoint(name, PROJECT["scripts"][name], "console_scripts").load())


def test_the_locks_pin_exact_public_versions() -> None:
    for line in LOCK + HARNESS_LOCK:
        requirement = Requirement(line)
        (pin,) = requirement.specifier
        assert pin.operator == "==", line
        assert not {"+", "*"} & set(pin.version), f"{line}: a build label or wildcard does not install elsewhere"
        assert requirement.url is None, line
    names = [canonicalize_name(Requirement(line).name) for line in LOCK + HARNESS_LOCK]
    assert len(names) == len(set(names))
    assert "rmt-ray" not in names


def test_the_locks_satisfy_every_requirement() -> None:
    pins = {canonicalize_name(Requirement(line).name): line.split("==")[1] for line in LOCK + HARNESS_LOCK}
    extras = PROJECT["optional-dependencies"].values()
    for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), text
