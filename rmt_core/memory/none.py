"""No memory: each segment is read alone. The baseline that every memory is compared with."""

from dataclasses import dataclass

from .base import Memory


@dataclass(frozen=True)
class NoConfig:
    """Nothing to set."""


class NoMemory(Memory):
    """The backbone as it is."""

    Config = NoConfig
    has_rows_only = True
    for_encoders = True
    for_encoder_decoders = True
