"""Configurations: what is refused, and with which words."""

import json
from pathlib import Path
from typing import Any

import pytest

import rmt_core
from rmt_core import ModelConfig

from .tiny import BMOJO, ENCODER_ONLY, LAMEMO, MEMORIES, XL, tiny_config, tiny_model


def config(**settings: Any) -> ModelConfig:
    return ModelConfig(**{"backbone": tiny_config(), "segment_len": 8, **settings})


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("rmtt", "memory kind is 'rmtt'; did you mean 'rmt'"),
        ("zzz", "memory kind is 'zzz'; allowed: " + ", ".join(rmt_core.MEMORIES)),
        ({"num_tokens": 3}, "memory kind is None; allowed: " + ", ".join(rmt_core.MEMORIES)),
        ({"kind": "rmt", "num_tokns": 3}, "memory 'rmt' has no setting 'num_tokns'; did you mean 'num_tokens'"),
        ({"kind": "xl", "zzz": 3}, "memory 'xl' has no setting 'zzz'; it has cache_len"),
        ({"kind": "none", "zzz": 3}, "memory 'none' has no setting 'zzz'; it has none"),
        ({"kind": "rmt", "num_tokens": "3"}, "memory.num_tokens is '3'; it must be a whole number"),
        ({"kind": "rmt", "num_tokens": -1}, "memory.num_tokens is -1; it must be at least 0"),
        ({"kind": "rmt", "noise": float("inf")}, "memory.noise is inf; it must be at least 0"),
        ([], "memory is \\[\\]; give a kind"),
        (None, "memory is None; give a kind"),
        (7, "memory is 7; give a kind"),
        ([7], "memory is \\[7\\]; give a kind"),
        (["rmt", "rmt"], "cannot be combined; name each kind once"),
        (["none", "rmt"], "cannot be combined; .* 'none' alone"),
        (["xl", {"kind": "xl", "cache_len": 4}], "cannot be combined"),
    ],
)
def test_a_memory_that_cannot_be_is_refused(memory: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(memory=memory)


OPEN_BLOCKS = {"kind": "rmt", "num_tokens": 2, "bidirectional": True}


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ([XL, LAMEMO], "memories 'xl' and 'lamemo' cannot be combined: each has attention see earlier segments'"),
        ([BMOJO, "rmt", XL], "memories 'bmojo' and 'xl' cannot be combined"),
        ([BMOJO, OPEN_BLOCKS], "memories 'bmojo' and 'rmt' cannot be combined: each computes attention itself"),
        ([OPEN_BLOCKS, LAMEMO], "memories 'rmt' and 'lamemo' cannot be combined"),
    ],
)
def test_memories_that_take_the_same_place_are_refused_together(memory: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(memory)
    tiny_model([XL, OPEN_BLOCKS])
    tiny_model([{"kind": "xl", "cache_len": 0}, LAMEMO])  # no cache is nothing in the way


def test_a_configuration_object_stays_the_callers() -> None:
    backbone = tiny_config()
    before = backbone.to_dict(), backbone._attn_implementation
    model = rmt_core.build(backbone=backbone, memory="rmt", segment_len=8, dtype="bfloat16")
    assert (backbone.to_dict(), backbone._attn_implementation) == before
    wanted = rmt_core.fingerprint(model)
    backbone.hidden_size *= 2
    assert rmt_core.fingerprint(model) == wanted


@pytest.mark.parametrize("build", [rmt_core.build, rmt_core.build_encoder, rmt_core.build_seq2seq])
def test_a_configuration_of_another_kind_is_refused(build: Any) -> None:
    with pytest.raises(ValueError, match="the configuration is a dict; give a .*Config, or its fields as keywords"):
        build({"backbone": tiny_config()})


def test_segments_stay_where_longrope_is_the_same_for_all(tmp_path: Path) -> None:
    """Else a segment that is still written would be read otherwise than the whole of it."""
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    }
    settings: Any = {"rope_parameters": scaling, "max_position_embeddings": 64}
    tiny_model({"kind": "rmt", "num_tokens": 2}, segment_len=12, **settings)
    with pytest.raises(ValueError, match=r"segment_len 13 \+ 4 memory positions exceeds 16, from where on .* longrope"):
        tiny_model({"kind": "rmt", "num_tokens": 2}, segment_len=13, **settings)


@pytest.mark.parametrize("segment_len", [0, -1, 2.0, "8", True])
def test_a_segment_length_that_is_none_is_refused(segment_len: Any) -> None:
    with pytest.raises(ValueError, match="segment_len is .*; it must be a whole number of tokens, at least 1"):
        config(segment_len=segment_len)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype is 'float8'; allowed: float32, bfloat16, float16, float64"):
        config(dtype="float8")


def test_settings_are_written_out() -> None:
    rmt = {
        "kind": "rmt",
        "num_read_tokens": None,
        "bidirectional": False,
        "max_past_memories": 0,
        "noise": 0.0,
        "gate": None,
        "write_cost": 0.0,
        "write_floor": 0.0,
        "write_threshold": None,
    }
    assert config(memory="rmt").memory == ({**rmt, "num_tokens": 8},)
    assert config(memory=["xl", {"kind": "rmt", "num_tokens": 2}]).memory == (
        {"kind": "xl", "cache_len": 128},
        {**rmt, "num_tokens": 2},
    )


@pytest.mark.parametrize(
    ("memory", "extra"),
    [
        ("none", 0),
        ({"kind": "rmt", "num_tokens": 16}, 32),
        ({"kind": "xl", "cache_len": 20}, 20),
        ([{"kind": "xl", "cache_len": 20}, {"kind": "rmt", "num_tokens": 8}], 36),
    ],
)
def test_too_long_a_segment_is_refused_with_the_arithmetic(memory: Any, extra: int) -> None:
    tiny_model(memory, segment_len=64 - extra)
    message = (
        rf"segment_len {65 - extra} \+ {extra} memory positions exceeds the backbone's 64 positions; "
        rf"use at most {64 - extra}"
    )
    with pytest.raises(ValueError, match=message):
        tiny_model(memory, segment_len=65 - extra)


def test_a_memory_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(ValueError, match="exceeds the backbone's 64 positions; use a smaller memory"):
        tiny_model({"kind": "xl", "cache_len": 64}, segment_len=1)


def test_a_configuration_and_keywords_together_are_refused() -> None:
    with pytest.raises(ValueError, match="not both: segment_len"):
        rmt_core.build(config(), segment_len=8)


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_a_configuration_survives_json(memory: Any) -> None:
    first = config(memory=memory, dtype="float64")
    written = json.loads(json.dumps(first.to_json()))
    again = ModelConfig(**written)
    assert again.to_json() == first.to_json() == written
    assert again.memory == first.memory


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        config().segment_len = 9  # type: ignore[misc]


def test_memories_are_named_in_one_table() -> None:
    assert set(rmt_core.MEMORIES) <= set(MEMORIES) | ENCODER_ONLY  # each is under the contract
    assert all(issubclass(kind, rmt_core.memory.Memory) for kind in rmt_core.MEMORIES.values())
