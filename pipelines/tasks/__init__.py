"""Evaluation tasks, one a file; the only place that names them all."""

from pipelines.tasks import recall
from pipelines.tasks.base import Task
from pipelines.tasks.perplexity import Perplexity
from pipelines.tasks.questions import QuestionTask

TASKS: dict[str, Task] = {
    "perplexity": Perplexity(),
    "recall": QuestionTask("recall", recall.samples, recall.shortest_text, recall.longest_answer),
}
