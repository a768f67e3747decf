"""The optional parts of the installation, and what to say where one is missing."""

import importlib.util

from pipelines.config import InputError

# extra of the distribution -> the modules that only it brings
EXTRAS = {
    "train": ("deepspeed", "tensorboard", "tensorboardX"),
    "serve": ("fastapi", "uvicorn"),
}


def require_extra(extra: str, *, job: str) -> None:
    """Returns when the modules of `extra` are installed; nothing is imported.

    Raises InputError that names what is missing and the command that installs it.
    """
    missing = [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise InputError(
            f"{job} needs {', '.join(missing)}, which {verb} not installed; run: pip install 'rmt-ray[{extra}]'"
        )
