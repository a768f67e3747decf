"""Long context by recurrent memory: a Hugging Face model and a memory carried from segment to segment.

`build` for causal LMs, `build_encoder` for encoders of the BERT family, `build_seq2seq` for T5, mT5 and BART.
"""

from . import state
from .attention import AttentionMaps, AttentionMass, attention_maps, attention_mass, mean_over_heads
from .blockwise import full_attention, full_attention_loss
from .build import build
from .checkpoint import fingerprint, load, load_config, load_encoder, load_seq2seq, save
from .config import ModelConfig
from .encoder import Classified, EncoderConfig, EncoderModel, EncoderOutput, build_encoder
from .full_context import DoesNotFitError, FullContext, floats_per_token
from .generation import Generation, Sampling, Session, generate, open_session, read
from .gradients import backward, backward_segments, replay
from .memory import MEMORIES
from .recurrent import IGNORED, Output, RecurrentModel, SegmentBatch, Unrolled, run
from .roots import joined
from .seq2seq import Encoded, Seq2SeqBatch, Seq2SeqConfig, Seq2SeqModel, build_seq2seq
from .skimming import Skimmer

__all__ = [
    "IGNORED",
    "MEMORIES",
    "AttentionMaps",
    "AttentionMass",
    "Classified",
    "DoesNotFitError",
    "Encoded",
    "EncoderConfig",
    "EncoderModel",
    "EncoderOutput",
    "FullContext",
    "Generation",
    "ModelConfig",
    "Output",
    "RecurrentModel",
    "Sampling",
    "SegmentBatch",
    "Seq2SeqBatch",
    "Seq2SeqConfig",
    "Seq2SeqModel",
    "Session",
    "Skimmer",
    "Unrolled",
    "attention_maps",
    "attention_mass",
    "backward",
    "backward_segments",
    "build",
    "build_encoder",
    "build_seq2seq",
    "fingerprint",
    "floats_per_token",
    "full_attention",
    "full_attention_loss",
    "generate",
    "joined",
    "load",
    "load_config",
    "load_encoder",
    "load_seq2seq",
    "mean_over_heads",
    "open_session",
    "read",
    "replay",
    "run",
    "save",
    "state",
]
