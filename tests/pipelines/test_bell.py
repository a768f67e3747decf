"""When workers look up from their steps."""

from types import SimpleNamespace

import pytest

from pipelines.training import bell
from pipelines.training.bell import Bell


def test_questions_are_asked_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [100.0], []
    monkeypatch.setattr(bell.time, "monotonic", lambda: now[0])
    ringing = Bell(lambda: bool(asked.append(now[0])) or now[0] > 103)
    found = []
    for _ in range(11):
        found.append(ringing.wishes())
        now[0] += 0.5
    assert asked == [101.0, 102.0, 103.0, 104.0, 105.0]
    assert [stop for stop, _ in found] == [False] * 8 + [True, False, True]
    assert [look for _, look in found] == [False] * 4 + [True] + [False] * 3 + [True, False, False]


def test_a_notice_is_new_once_for_each_node() -> None:
    ringing = Bell(lambda: False)
    assert not ringing.is_new(None)
    assert ringing.is_new(SimpleNamespace(preempted_node_ids=["a"]))
    assert not ringing.is_new(SimpleNamespace(preempted_node_ids=["a"]))
    assert not ringing.is_new(None)
    assert ringing.is_new(SimpleNamespace(preempted_node_ids=["a", "b"]))
