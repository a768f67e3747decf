"""Where random numbers stand, as a value: so that a segment computed again draws what it drew."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class RandomState:
    """The CPU's and the devices' global random state, and that of an explicit generator, at one moment."""

    def __init__(self, devices: Iterable[torch.device], generator: torch.Generator | None = None) -> None:
        self._cpu = torch.get_rng_state()
        self._devices: list[tuple[torch.device, Tensor]] = [
            (device, torch.get_device_module(device).get_rng_state(device)) for device in devices
        ]
        self._explicit = GeneratorState(generator)

    def put_back(self) -> None:
        """From here on, random numbers are what they were from that moment on."""
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            torch.get_device_module(device).set_rng_state(state, device)
        self._explicit.put_back()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, random numbers are what they were from that moment on; outside, nothing was drawn."""
        now = RandomState([device for device, _ in self._devices], self._explicit.generator)
        self.put_back()
        try:
            yield
        finally:
            now.put_back()


class GeneratorState:
    """An explicit generator's state at one moment; a context in which it draws again what it drew from then on.

    The context may be entered again and again, but not inside itself. None stands for no generator.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator
        self._then = self._now = torch.empty(0) if generator is None else generator.get_state()

    def put_back(self) -> None:
        if self.generator is not None:
            self.generator.set_state(self._then)

    def __enter__(self) -> None:
        if self.generator is not None:
            self._now = self.generator.get_state()
        self.put_back()

    def __exit__(self, *_: object) -> None:
        if self.generator is not None:
            self.generator.set_state(self._now)


def devices_of(model: nn.Module) -> list[torch.device]:
    """The devices besides the CPU that a model's parameters are on: each has a random state of its own."""
    found = {parameter.device for parameter in model.parameters()}
    return sorted((device for device in found if device.type not in ("cpu", "meta")), key=str)
