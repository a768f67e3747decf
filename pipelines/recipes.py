"""Full configurations of training runs, named ones and those in files: what a command line starts from."""

import difflib
import json
from collections.abc import Mapping
from typing import Any

import yaml

from pipelines import storage
from pipelines.config import InputError

# A memory that can be left as it is, which seeds learn to use in different ways (docs/results/lasting.md, demo.md).
LASTING = {"kind": "rmt", "num_tokens": 4, "gate": "binary", "write_cost": 0.03, "write_floor": 0.05}
# Where nearly all answers are right gradients are tiny, and the next wrong one is a large step if Adam has forgotten
# what they were before: with 0.95 two runs of five did not learn again what they lost so (docs/results/detect.md).
LONG_BETA2 = 0.999

RECIPES: Mapping[str, Mapping[str, Any]] = {
    # Learns to carry a planted fact through book prose, over up to 8 segments, in minutes on a laptop. It is what
    # `make demo` trains. Answers weigh as much as all the text together, or they are learned late or not at all. How
    # soon a stage is learned differs much between seeds, most of all the second, where a fact has to enter the memory
    # for the first time: so stages last until they are learned. One worker: so small a model gains nothing from two.
    "tiny": {
        "segment_len": 48,
        "model": {"memory": LASTING},
        "dataset": {"task_fraction": 0.75, "task_answer_weight": 1000.0, "piece_segments": 64},  # four books, more rows
        "optimizer": {"beta2": LONG_BETA2},
        "curriculum": {
            "num_segments": [1, 2, 3, 4, 6, 8, 8],
            "steps": [150, 450, 200, 150, 150, 200, 300],
            "advance_below": 0.1,
            "aux_from": -1,
        },
    },
    # One of 16 symbols anywhere in noise, asked for at the end: to be evaluated far beyond the 384 tokens that training
    # reaches (`--task detect --background noise`). Nothing but the answer counts. A gate leaves the memory as it is
    # where nothing is to be written; what writing costs counts once the longest stage is learned.
    "detect": {
        "segment_len": 24,
        "batch_size": 32,
        "model": {"memory": LASTING},
        "dataset": {
            "task_fraction": 1.0,
            "tasks": [{"task": "detect", "background": "noise"}],
            "task_text_weight": 0.0,
            "task_answer_weight": 1.0,
        },
        "optimizer": {"learning_rate": 3e-3, "beta2": LONG_BETA2},
        "curriculum": {
            "num_segments": [1, 2, 3, 4, 8, 16, 16],
            "steps": [50, 250, 150, 150, 200, 300, 300],
            "advance_below": 0.1,
            "aux_from": -1,
        },
    },
    # Stories after bAbI's tasks 1 to 5 in book prose, for a pretrained model with memory: give it --model.backbone, and
    # as --data a store of prose made with its tokenizer. Some tasks are learned long before others, so stages last by
    # steps.
    "qa": {
        "batch_size": 32,
        "model": {"memory": {"kind": "rmt", "num_tokens": 16}},
        "dataset": {
            "task_fraction": 1.0,
            "tasks": [{"task": f"qa{number}"} for number in range(1, 6)],
            "task_text_weight": 0.0,
            "task_answer_weight": 1.0,
        },
        "optimizer": {"learning_rate": 1e-4},
        "curriculum": {"num_segments": [1, 2, 3, 4, 6, 8], "steps": [300, 500, 300, 300, 300, 300]},
    },
    # Teaches a pretrained model with memory to summarise: give it --model.backbone, and as --data a store of texts that
    # end with their summaries (`summary_quality.py --training-texts`, then prepare). The summary stands in the last
    # segments, so windows grow until they hold whole documents, and replay takes its gradient back to the first
    # segment in the memory of one. Adapters take a higher learning rate than weights would.
    "summaries": {
        "batch_size": 4,
        "model": {"memory": {"kind": "rmt", "num_tokens": 16}, "train": "lora"},
        "optimizer": {"learning_rate": 5e-4, "warmup_steps": 20},
        "curriculum": {"num_segments": [1, 2, 4, 8, 16], "steps": [50, 100, 200, 200, 400], "vary": False},
        "gradient": {"mode": "replay"},
        "dataset": {"task_fraction": 0.0},
        "report": {"log_every": 5, "checkpoint_every": 50},
    },
}


def find_recipe(name: str, *, trained: bool = False) -> Mapping[str, Any]:
    """The recipe of a name, or in a YAML file (.yaml, .yml; on disk or s3://). InputError where there is none.

    The memory that a named recipe has is for new models: one that is `trained` keeps its own.
    """
    if not name.endswith((".yaml", ".yml")):
        if name not in RECIPES:
            near = difflib.get_close_matches(name, RECIPES, 1)
            hint = f"did you mean {near[0]}?" if near else f"recipes are {', '.join(RECIPES)}, or a .yaml file"
            raise InputError(f"unknown recipe {name!r}; {hint}")
        recipe = RECIPES[name]
        return {**recipe, "model": _without_memory(recipe.get("model", {}))} if trained else recipe
    uri = storage.absolute(name)
    if not storage.exists(uri) or storage.is_directory(uri):
        raise InputError(f"recipe {name}: there is no such file")
    try:
        content = yaml.safe_load(storage.read_bytes(uri))
        json.dumps(content)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {name} is not YAML: {error}") from error
    except TypeError as error:
        raise InputError(f"recipe {name} holds more than text, numbers, lists and mappings: {error}") from error
    if not isinstance(content, Mapping):
        raise InputError(f"recipe {name} holds no settings; write them as section: {{field: value}}")
    return content


def _without_memory(model: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value for name, value in model.items() if name != "memory"}
