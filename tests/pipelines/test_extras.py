"""A missing extra is one line that says what to install."""

import importlib.util
from importlib.machinery import ModuleSpec

import pytest

from pipelines.config import InputError
from pipelines.extras import EXTRAS, require_extra


@pytest.mark.parametrize("extra", sorted(EXTRAS.keys() - {"harness"}))  # which `make test-harness` installs apart
def test_a_complete_installation_passes(extra: str) -> None:
    require_extra(extra, job="job")


def test_a_missing_extra_names_the_module_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec

    def without_deepspeed(name: str) -> ModuleSpec | None:
        return None if name == "deepspeed" else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", without_deepspeed)
    with pytest.raises(InputError) as caught:
        require_extra("train", job="rmt-train")
    message = str(caught.value)
    assert message == "rmt-train needs deepspeed, which is not installed; run: pip install '.[train]'"
    assert "\n" not in message
