"""The model under DeepSpeed: what is wrapped, with which settings, and how its weights come out again.

DeepSpeed is imported inside functions, by the training worker alone: Ray's controller imports this module too.

Axes: R rows of a worker, K segments of a window, T tokens of a segment.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

import rmt_core
from pipelines.config import InputError
from pipelines.data.lanes import Window
from pipelines.training.footprint import zero_buffers
from pipelines.training.settings import GradientSettings, TrainConfig
from pipelines.training.weights import plain_tensors
from rmt_core import SegmentBatch, Unrolled
from rmt_core.checkpoint import save_tensors
from rmt_core.state import State


class WindowLoss(nn.Module):
    """The module that DeepSpeed wraps: one forward pass holds the loop over segments."""

    def __init__(self, model: rmt_core.RecurrentModel, gradient: GradientSettings) -> None:
        super().__init__()
        self.model = model
        self.checkpointed = gradient.mode == "checkpoint"
        self.bptt_segments = None if gradient.exact_depth else gradient.bptt_segments

    def forward(
        self,
        segments: Sequence[SegmentBatch],
        state: State,
        generator: torch.Generator | None = None,
        num_read: int = 0,
    ) -> Unrolled | State:
        """The loss over the segments behind the first `num_read`, which only move the state on; without any, the state.

        The gradient goes back through those that are only read, too.
        """
        for segment in segments[:num_read]:
            state = self.model.state_after(segment, state, generator)
        if num_read == len(segments):
            return state
        return self.model.unroll(
            segments[num_read:],
            state,
            bptt_segments=self.bptt_segments,
            checkpointed=self.checkpointed,
            generator=generator,
        )


def segments_of(window: Window, device: torch.device) -> list[SegmentBatch]:
    """A window's segments as tensors on a device."""
    tensors = [torch.from_numpy(part).to(device) for part in window[:5]]
    rows = [tensor.unbind(1) for tensor in tensors]
    return [SegmentBatch(t, y, lengths, reset, w) for t, y, w, lengths, reset in zip(*rows, strict=True)]


def start_engine(model: rmt_core.RecurrentModel, config: TrainConfig, deepspeed_settings: dict[str, Any]) -> Any:
    """The DeepSpeed engine around the model, with the settings that `deepspeed_config` gives."""
    if not config.workers.use_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # DeepSpeed would compile its shared-memory all-reduce at the start on CPUs; only its inference calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    groups = parameter_groups(model, config.optimizer.weight_decay)
    optimizer = _adamw(groups, config)
    num_trained = sum(parameter.numel() for group in groups for parameter in group["params"])
    zero = zero_buffers(num_trained) | deepspeed_settings["zero_optimization"]
    engine, *_ = deepspeed.initialize(
        model=WindowLoss(model, config.gradient),
        optimizer=optimizer,
        config=deepspeed_settings | {"zero_optimization": zero},
    )
    return engine


def _adamw(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW: torch's, or for GPUs that offload it DeepSpeed's for CPUs, which compiles itself once, in minutes."""
    settings: dict[str, Any] = {
        "lr": config.optimizer.learning_rate,
        "betas": (config.optimizer.beta1, config.optimizer.beta2),
    }
    if not (config.workers.offload_optimizer and config.workers.use_gpu):
        return torch.optim.AdamW(groups, **settings)
    compiler, ninja = shutil.which(os.environ.get("CXX", "g++")), shutil.which("ninja")
    if compiler is None or ninja is None:
        missing = " and ".join(name for name, path in (("a C++ compiler", compiler), ("ninja", ninja)) if path is None)
        raise InputError(
            f"workers.offload_optimizer compiles DeepSpeed's AdamW for CPUs, and a node has no {missing} on its path; "
            "install them in the nodes' image, or set workers.offload_optimizer no"
        )
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases and the like do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def deepspeed_config(config: TrainConfig, world_size: int, *, universal: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration; what has surprising defaults is written out. `universal`: of the checkpoint to load.

    DeepSpeed is told of one micro-batch a step: several windows, and rows that workers do not share evenly, are
    weighed in the loss, and `steps.Stepper` says where a step ends.
    """
    zero: dict[str, Any] = {"stage": config.workers.zero_stage, "overlap_comm": False}
    if config.workers.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": config.workers.use_gpu}
    return {
        "train_micro_batch_size_per_gpu": max(1, config.batch_size // world_size),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW where nothing is to be compiled
        "bf16": {"enabled": config.workers.precision == "bfloat16"},
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def load_universal(engine: Any, directory: Path, tag: str, load: Callable[..., None]) -> None:
    """Load a universal checkpoint into an engine that was started with `universal`; `load` fills the module.

    Under ZeRO-3, DeepSpeed 0.19.8 then gives all groups of parameters the first one's settings and one step counter,
    which every group counts on: both are put right.
    """
    kept = [{name: group[name] for name in group if name != "params"} for group in engine.optimizer.param_groups]
    engine.load_checkpoint(str(directory), tag=tag, custom_load_fn=load)
    for group, values in zip(engine.optimizer.param_groups, kept, strict=True):
        group.update(values)
    for state in engine.basic_optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def save_portable(directory: Path, engine: Any, config: rmt_core.ModelConfig, tokenizer: Any) -> None:
    """Write the model's directory from rank 0; every worker takes part, as parameters may be sharded."""
    import deepspeed

    gathered = partial(deepspeed.zero.GatheredParameters, enabled=engine.zero_optimization_partition_weights())
    writes = dist.get_rank() == 0
    tensors = plain_tensors(engine.module.model, gathered=gathered, keep=writes)
    if writes:
        save_tensors(directory, config, tensors, tokenizer)
