"""Evaluation tasks, one a file; the only place that names them all."""

from pipelines.tasks import babi, babilong, facts, mark, needle, people, quadratic, recall, ruler, symbols
from pipelines.tasks.base import Task
from pipelines.tasks.perplexity import Perplexity
from pipelines.tasks.question_files import FileTask
from pipelines.tasks.questions import QuestionTask
from pipelines.tasks.samples import Maker

# Facts in prose or noise, anywhere or at chosen depths.
_PLACED: dict[str, Maker] = {
    "recall": recall.detect,
    "detect": mark.detect,
    "join": mark.join("both"),
    "join_marked": mark.join("marked"),
    "join_leads": mark.join("leads"),
    **{f"pairs_{num}": mark.pairs(num) for num in mark.COUNTS},
    **{f"latest_{num}": mark.latest(num) for num in mark.COUNTS},
    "reason": facts.reason,
    **{task: babilong.story_task(task) for task in babi.LABELS},
    **{f"{task}_all": babilong.every_question(task) for task in babi.LABELS},
    **{f"people_{num}": people.people(num) for num in people.COUNTS},
    **{f"people_steps_{num}": people.steps(num) for num in people.COUNTS},
    **{f"moved_{num}": people.moved(num) for num in people.COUNTS},
    "needle": needle.needle,
}
_FAMILIES = {"join_marked": "join", "join_leads": "join"}  # about the same texts
# Facts that come first, or all over the text.
_FIRST: dict[str, Maker] = {
    "memorise": recall.memorise,
    **{f"capacity_{num}": facts.capacity(num) for num in facts.COUNTS},
    "copy": symbols.copying(backwards=False),
    "reverse": symbols.copying(backwards=True),
    "retrieval": symbols.retrieval(rewrites=False),
    "rewrites": symbols.retrieval(rewrites=True),
    "retrieval_all": symbols.retrieval(rewrites=False, most_asked=symbols.MOST_ASKED),
    "rewrites_all": symbols.retrieval(rewrites=True, most_asked=symbols.MOST_ASKED),
    **{f"{task}_along": babilong.asked_along(task) for task in babi.LABELS},
    "quadratic": quadratic.equation,
}
# Texts of their own around the facts.
_OWN_TEXT_PLACED: dict[str, Maker] = {
    "passkey": needle.passkey,
    "niah_single_1": ruler.niah_single,
    "niah_multikey_2": ruler.niah_multikey("number"),
    "niah_multikey_3": ruler.niah_multikey("uuid"),
    "vt": ruler.variable_tracking,
}
_OWN_TEXT: dict[str, Maker] = {"sorting": symbols.sorting, "cwe": ruler.common_words, "fwe": ruler.frequent_words}

TASKS: dict[str, Task] = {
    "perplexity": Perplexity(),
    **{name: QuestionTask(name, make, has_depths=True, family=_FAMILIES.get(name)) for name, make in _PLACED.items()},
    **{name: QuestionTask(name, make) for name, make in _FIRST.items()},
    **{
        name: QuestionTask(name, make, has_background=False, has_depths=True) for name, make in _OWN_TEXT_PLACED.items()
    },
    **{name: QuestionTask(name, make, has_background=False) for name, make in _OWN_TEXT.items()},
    "file": FileTask(),
}
