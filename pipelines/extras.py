"""The optional parts of the installation, and what to say where one is missing."""

import importlib.util
from collections.abc import Sequence

from pipelines.config import InputError

# extra of the distribution -> the modules that only it brings
EXTRAS = {
    "train": ("deepspeed", "tensorboard", "tensorboardX"),
    "serve": ("boto3", "fastapi", "redis", "uvicorn"),
    "tracking": ("mlflow", "wandb"),
    "rouge": ("rouge_score",),
    "s3fs": ("s3fs",),
    "harness": ("lm_eval",),
}


def require_extra(extra: str, *, job: str, modules: Sequence[str] | None = None) -> None:
    """Returns when the modules of `extra`, or of those the named `modules`, are installed; nothing is imported.

    Raises InputError that names what is missing and the command that installs it.
    """
    wanted = EXTRAS[extra] if modules is None else modules
    missing = [module for module in wanted if importlib.util.find_spec(module) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise InputError(f"{job} needs {', '.join(missing)}, which {verb} not installed; run: pip install '.[{extra}]'")
