"""What the rows of a batch read: documents of the data, and texts of tasks that ask for what memory has to keep."""

import difflib
import json
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from pipelines.config import Config, split_commas
from pipelines.tasks import TASKS
from pipelines.tasks.questions import QuestionTask


def json_or_word(value: Any) -> Any:
    """A word, such as `rmt`, as it is; JSON, such as {"kind": "rmt", "num_tokens": 8}, as its value."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"is not JSON ({error}); write a name or JSON") from None
    return value


class TaskSettings(Config):
    """A task that rows of a batch read texts of."""

    task: str = Field(description="name of a task of evaluate that asks questions, such as recall")
    weight: float = Field(default=1.0, gt=0, description="how often it is read, compared with the other tasks")
    background: Literal["prose", "noise"] | None = Field(
        default=None, description="text around facts: prose (of the data) or noise (random letters); none: prose"
    )
    depths: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        default=[], description="where facts stand, from 0 (earliest) to 1 (latest), in turn (none: anywhere)"
    )

    @pydantic.model_validator(mode="after")
    def _check(self) -> "TaskSettings":
        known = [name for name, task in TASKS.items() if isinstance(task, QuestionTask)]
        if self.task not in known:
            near = difflib.get_close_matches(self.task, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"there is no task {self.task!r} to train on; {hint}")
        for option in ("background", "depths"):
            if getattr(self, option) and option not in TASKS[self.task].settings:
                raise ValueError(f"{option} is not read by {self.task}; leave it out")
        return self


def _tasks(value: Any) -> Any:
    """Names of tasks, JSON objects, or both, one or several: recall,reason or {"task": "recall", "weight": 2}."""
    items: list[Any] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        found = json_or_word(item)
        if isinstance(found, str):
            items += [{"task": name} for name in split_commas(found)]
        else:
            items += found if isinstance(found, list) else [found]
    for option in {option: None for item in items if isinstance(item, dict) for option in item}:
        if option not in TaskSettings.model_fields:
            raise ValueError(f"{option!r} is no option of a task; options are {', '.join(TaskSettings.model_fields)}")
    return items


class DataSettings(Config):
    """What the rows of a batch read."""

    mode: Literal["stream", "sample"] = Field(
        default="stream",
        description="stream: rows follow documents and carry their memory from window to window; sample: each window "
        "is drawn anywhere in a document and begins with a fresh memory",
    )
    weights: list[float] | None = Field(
        default=None,
        description="how much is read of each store of data, compared with one another; none: every document once an "
        "epoch",
    )
    piece_segments: int | None = Field(
        default=None,
        ge=1,
        description="with mode stream: documents are followed in pieces of at most so many segments, each with a fresh "
        "memory; none: whole",
    )
    task_fraction: float = Field(
        default=0.5, ge=0, le=1, description="of the rows that read texts of tasks, the others read documents"
    )
    tasks: Annotated[list[TaskSettings], pydantic.BeforeValidator(_tasks)] = Field(
        default=[TaskSettings(task="recall")],
        min_length=1,
        description="what these texts ask: names of tasks (recall,reason), or JSON with weight, background and depths",
    )
    task_fresh_fraction: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="of these texts that begin with a fresh memory; the others with what the row's last text has left",
    )
    task_text_weight: float = Field(default=1.0, ge=0, description="loss weight of a text's tokens beside its answers")
    task_answer_weight: float = Field(default=30.0, gt=0, description="loss weight of an answer's tokens")
