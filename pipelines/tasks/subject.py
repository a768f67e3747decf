"""What an evaluation is of: the model as it is read, in words and numbers."""

import dataclasses
from typing import Any

import rmt_core
from pipelines.tasks.held_out import HeldOut
from pipelines.tasks.report import FULL_ATTENTION, Subject, counted
from rmt_core import FullContext, RecurrentModel


def subject_of(name: str, model: RecurrentModel, held_out: HeldOut, seeds: range) -> Subject:
    """Of a model that reads segment by segment, or with the whole text in context."""
    full = isinstance(model, FullContext)
    words = " with ".join(_in_words(settings) for settings in model.config.memory)
    documents = counted(len(held_out.num_tokens), "document")
    return Subject(
        name=name,
        fingerprint=rmt_core.fingerprint(model),
        memory=FULL_ATTENTION if full else words,
        segment_len=model.segment_len,
        state_floats=0 if full else rmt_core.state.num_floats(model.init_state(1)),
        held_out=f"{held_out.name}, {sum(held_out.num_tokens):,} tokens, {documents}",
        seed=", ".join(map(str, seeds)),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        floats_per_token=rmt_core.floats_per_token(model.backbone) if full else 0,
        made_for=model.config.segment_len if full else None,
        max_positions=model.backbone.max_positions if full else None,
    )


def _in_words(settings: dict[str, Any]) -> str:
    """A memory's kind and settings, without those that are off and are so by default."""
    usual = {field.name: field.default for field in dataclasses.fields(rmt_core.MEMORIES[settings["kind"]].Config)}
    told = {name: value for name, value in settings.items() if name != "kind" and (value or value != usual[name])}
    rest = ", ".join(f"{name} {value}" for name, value in told.items())
    return f"{settings['kind']} ({rest})" if rest else str(settings["kind"])
