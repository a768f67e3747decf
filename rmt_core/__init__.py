"""Long context by recurrent memory: a Hugging Face causal LM and a memory carried from segment to segment."""

from . import state
from .build import build
from .checkpoint import fingerprint, load, save
from .config import ModelConfig
from .generation import Generation, Sampling, Session, generate, open_session, read
from .gradients import backward
from .memory import MEMORIES
from .recurrent import IGNORED, Output, RecurrentModel, SegmentBatch, Unrolled, run

__all__ = [
    "IGNORED",
    "MEMORIES",
    "Generation",
    "ModelConfig",
    "Output",
    "RecurrentModel",
    "Sampling",
    "SegmentBatch",
    "Session",
    "Unrolled",
    "backward",
    "build",
    "fingerprint",
    "generate",
    "load",
    "open_session",
    "read",
    "run",
    "save",
    "state",
]
