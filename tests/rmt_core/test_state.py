"""States as values: rows chosen, joined, replaced; bytes and back."""

import hashlib
import json
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from rmt_core import state as states

FINGERPRINT = "a model"


def tree(num_rows: int = 3, seed: int = 0) -> Any:
    """Everything that a state may be made of."""
    torch.manual_seed(seed)
    return (
        torch.randn(num_rows, 2, 4),
        {"rows": (torch.randn(num_rows, 5, dtype=torch.float64),), "filled": torch.arange(num_rows)},
        (),
    )


def same(a: Any, b: Any) -> bool:
    """Equal in structure, types, shapes and values."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b) or len(a) != len(b):
        return False
    keys = a if isinstance(a, dict) else range(len(a))
    return all(same(a[key], b[key]) for key in keys)


def test_leaves_come_in_a_fixed_order() -> None:
    state = tree()
    assert [leaf.dtype for leaf in states.leaves(state)] == [torch.float32, torch.float64, torch.int64]
    assert states.leaves(()) == []


def test_select_takes_rows_in_the_order_asked_for() -> None:
    state = tree()
    for rows in ([2, 0], torch.tensor([2, 0])):
        chosen = states.select(state, rows)
        assert same(chosen, states.tree_map(lambda leaf: leaf[[2, 0]], state))
    assert same(states.select(state, []), states.tree_map(lambda leaf: leaf[:0], state))


def test_select_takes_no_mask() -> None:
    with pytest.raises(ValueError, match="rows are true or false; give their indices"):
        states.select(torch.ones(3, 2), torch.tensor([True, False, True]))


def test_stack_joins_rows() -> None:
    state = tree()
    parts = [states.select(state, [i]) for i in range(3)]
    assert same(states.stack(parts), state)
    assert same(states.stack([state]), state)
    with pytest.raises(ValueError, match="at least one state"):
        states.stack([])


def test_where_picks_row_by_row() -> None:
    a, b = tree(seed=0), tree(seed=1)
    picked = states.where(torch.tensor([True, False, True]), a, b)
    assert same(states.select(picked, [0, 2]), states.select(a, [0, 2]))
    assert same(states.select(picked, [1]), states.select(b, [1]))


def test_place_replaces_rows_and_leaves_the_old_state_alone() -> None:
    old, new = tree(seed=0), tree(2, seed=1)
    kept = states.tree_map(Tensor.clone, old)
    placed = states.place(old, torch.tensor([2, 0]), new)
    assert same(states.select(placed, [2, 0]), new)
    assert same(states.select(placed, [1]), states.select(old, [1]))
    assert same(old, kept)


def test_zeroed_holds_nothing() -> None:
    empty = states.zeroed(tree())
    assert not any(leaf.any() for leaf in states.leaves(empty))
    assert same(states.tree_map(torch.zeros_like, tree()), empty)


def test_shuffled_gives_every_row_another_rows_state() -> None:
    state = tree()
    moved = states.shuffled(state)
    for i in range(3):
        assert same(states.select(moved, [i]), states.select(state, [i - 1 if i else 2]))
    with pytest.raises(ValueError, match="needs at least 2 rows; got 1"):
        states.shuffled(tree(1))


def test_detach_cuts_the_gradient() -> None:
    state = (torch.ones(2, 3, requires_grad=True) * 2,)
    assert not states.detach(state)[0].requires_grad


def test_size_and_norm() -> None:
    state = (torch.tensor([[3.0, 4.0], [0.0, 0.0]]), {"filled": torch.tensor([9, 9])})
    assert states.num_floats(state) == 2
    assert torch.allclose(states.norm(state), torch.tensor([12.5**0.5, 0.0]))
    assert states.num_floats(()) == 0
    assert states.norm(()).shape == (0,)


def test_a_state_is_made_of_tensors_tuples_and_dictionaries() -> None:
    with pytest.raises(TypeError, match="not list"):
        states.tree_map(lambda leaf: leaf, [torch.ones(1)])
    with pytest.raises(TypeError, match="not float"):
        states.to_bytes((1.0,), FINGERPRINT)


# Bytes


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_every_type_survives_bytes(dtype: torch.dtype) -> None:
    state = {"x": (torch.randn(2, 3) * 5).to(dtype)}
    assert same(states.from_bytes(states.to_bytes(state, FINGERPRINT), FINGERPRINT), state)


@pytest.mark.parametrize("state", [tree(), (), {}, torch.zeros(0, 3), {"a": ({"b": torch.ones(1)}, ())}])
def test_every_tree_survives_bytes(state: Any) -> None:
    assert same(states.from_bytes(states.to_bytes(state, FINGERPRINT), FINGERPRINT), state)


def test_views_and_gradients_survive_bytes_as_values() -> None:
    learned = torch.randn(1, 4, requires_grad=True)
    state = (learned.expand(3, -1), learned.expand(3, -1), torch.arange(12.0).view(3, 4).T[:3])
    again = states.from_bytes(states.to_bytes(state, FINGERPRINT), FINGERPRINT)
    assert same(again, states.detach(state))
    assert not any(leaf.requires_grad for leaf in states.leaves(again))


@pytest.mark.parametrize("notes", [{"of": ["a", 1, None]}, [], 0, None])
def test_notes_are_under_the_seal_and_come_back(notes: Any) -> None:
    written = torch.arange(6.0).view(1, 6)
    data = states.to_bytes(written, "f", notes)
    found, said = states.with_notes_from_bytes(data, "f")
    assert torch.equal(found, written)
    assert said == notes
    assert torch.equal(states.from_bytes(data, "f"), written)
    if notes:
        with pytest.raises(ValueError, match="not a state"):
            states.from_bytes(data.replace(b"of", b"if"), "f")


def test_states_are_alike_in_tree_shapes_and_types() -> None:
    one = {"a": torch.zeros(1, 2), "b": (torch.zeros(1, dtype=torch.long), ())}
    assert states.are_alike(one, states.tree_map(torch.ones_like, one))
    for other in (
        {"a": torch.zeros(1, 3), "b": one["b"]},
        {"a": torch.zeros(1, 2, dtype=torch.float64), "b": one["b"]},
        {"a": one["a"], "c": one["b"]},
        {"a": one["a"], "b": (torch.zeros(1, dtype=torch.long),)},
        (one["a"], one["b"]),
        one["a"],
    ):
        assert not states.are_alike(one, other)


def test_equal_states_have_equal_bytes() -> None:
    assert states.to_bytes(tree(), FINGERPRINT) == states.to_bytes(tree(), FINGERPRINT)


def test_another_models_state_is_refused() -> None:
    data = states.to_bytes(tree(), FINGERPRINT)
    with pytest.raises(ValueError, match="belongs to model 'a model', not to 'another'"):
        states.from_bytes(data, "another")


def test_bytes_cut_anywhere_are_refused() -> None:
    data = states.to_bytes(tree(), FINGERPRINT)
    for size in range(0, len(data), 7):
        with pytest.raises(ValueError, match="state"):
            states.from_bytes(data[:size], FINGERPRINT)
    with pytest.raises(ValueError, match="state"):
        states.from_bytes(data + b"more", FINGERPRINT)


def test_any_altered_byte_is_refused() -> None:
    """Of the numbers, the header and even the spaces that fill it up; and of the hash itself."""
    data = states.to_bytes((torch.ones(2), {"a": torch.arange(3)}), FINGERPRINT)
    for at in range(len(data)):
        altered = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
        with pytest.raises(ValueError, match="state"):
            states.from_bytes(altered, FINGERPRINT)


@pytest.mark.parametrize("data", [b"", b"no", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{]"])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="state"):
        states.from_bytes(data, FINGERPRINT)


def test_a_tensor_file_that_is_no_state_is_refused() -> None:
    with pytest.raises(ValueError, match="state format is None"):
        states.from_bytes(save_tensors({"x": torch.ones(2)}), FINGERPRINT)
    with pytest.raises(ValueError, match="state format is 'rmt-state-0'"):
        states.from_bytes(save_tensors({}, metadata={"state": '{"format": "rmt-state-0"}'}), FINGERPRINT)


@pytest.mark.parametrize("tree", [["00007"], 3, [[1]], None, {"a": "b"}])
def test_a_tree_that_does_not_fit_its_tensors_is_refused(tree: Any) -> None:
    about = {"sha256": states.UNSEALED, "format": states.FORMAT, "fingerprint": FINGERPRINT, "tree": tree}
    data = states.seal(save_tensors({"00000": torch.ones(2)}, metadata={"state": json.dumps(about)}))
    with pytest.raises(ValueError, match="not a state: its tree names"):
        states.from_bytes(data, FINGERPRINT)


@pytest.mark.parametrize("about", ["{", "[]", "3"])
def test_a_header_that_says_nothing_is_refused(about: str) -> None:
    with pytest.raises(ValueError, match="state"):
        states.from_bytes(save_tensors({"00000": torch.ones(2)}, metadata={"state": about}), FINGERPRINT)


def test_the_bytes_are_a_readable_tensor_file() -> None:
    data = states.to_bytes(tree(), FINGERPRINT)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = json.loads(header["__metadata__"]["state"])
    assert about["fingerprint"] == FINGERPRINT
    assert about["sha256"] == hashlib.sha256(data.replace(about["sha256"].encode(), b"")).hexdigest()
    assert about["tree"] == ["00000", {"rows": ["00001"], "filled": "00002"}, []]
