"""Which code a result was made by, to be told beside it."""

import contextlib
import importlib.metadata
import subprocess
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def origin() -> dict[str, str]:
    """The versions of this project, where it is installed, and of torch; in a git checkout also the commit, with `+`
    where files differ.
    """
    found = {"torch": importlib.metadata.version("torch")}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a folder that was sent to a cluster
        found["rmt-ray"] = importlib.metadata.version("rmt-ray")
    if (_ROOT / ".git").exists():
        commit, changes = (_git("rev-parse", "--short=10", "HEAD"), _git("status", "--porcelain", "-uno"))
        if commit is not None:
            found["commit"] = f"{commit}+" if changes else commit
    return found


def in_words(made_by: dict[str, str]) -> str:
    return f"Made with {', '.join(f'{name} {version}' for name, version in made_by.items())}"


def _git(*words: str) -> str | None:
    """What git says; None where it cannot."""
    try:
        return subprocess.run(
            ["git", "-C", str(_ROOT), *words], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
