"""The model under DeepSpeed: one forward pass over a window, one backward pass, one step.

DeepSpeed is imported inside functions, by the training worker alone: Ray's controller imports this module too.

Axes: R rows of a worker, K segments of a window, T tokens of a segment.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

import rmt_core
from pipelines.data.lanes import Window
from pipelines.training.settings import GradientSettings, TrainConfig
from rmt_core import SegmentBatch
from rmt_core.checkpoint import save_tensors, tensors_of
from rmt_core.state import State


class StepResult(NamedTuple):
    """What one pass over a worker's rows gave."""

    loss: Tensor  # () this worker's share of the global weighted mean, to go backward from
    nats: Tensor  # (R, K, T) of each label, detached; 0 where nothing is asked
    state: State  # after the window, detached


class WindowLoss(nn.Module):
    """The module that DeepSpeed wraps: its one forward pass holds the loop over segments."""

    def __init__(self, model: rmt_core.RecurrentModel, gradient: GradientSettings) -> None:
        super().__init__()
        self.model = model
        self.gradient = gradient

    def forward(self, segments: list[SegmentBatch], state: State, total_weight: Tensor) -> StepResult:
        """`total_weight` () is the weight of all workers' labels: shares then add up to the global mean."""
        result = self.model.unroll(
            segments,
            state,
            bptt_segments=self.gradient.bptt_segments,
            checkpointed=self.gradient.mode == "checkpoint",
        )
        loss = result.loss_sum / total_weight + result.aux / dist.get_world_size()
        return StepResult(loss, torch.stack(result.nats, dim=1), rmt_core.state.detach(result.state))


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
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optimizer.weight_decay),
        lr=config.optimizer.learning_rate,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
    )
    engine, *_ = deepspeed.initialize(
        model=WindowLoss(model, config.gradient), optimizer=optimizer, config=deepspeed_settings
    )
    return engine


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases and the like do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration; what has surprising defaults is written out."""
    return {
        "train_micro_batch_size_per_gpu": config.batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_optimization": {"stage": config.workers.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.workers.precision == "bfloat16"},
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def optimise(engine: Any, window: Window, state: State, learning_rate: float) -> StepResult:
    """One optimiser step over a window; every worker calls it with windows of as many segments."""
    segments = segments_of(window, engine.device)
    total = torch.tensor(float(window.weights[window.labels != rmt_core.IGNORED].sum()), device=engine.device)
    dist.all_reduce(total)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    result: StepResult = engine(segments, state, total.clamp(min=1e-30))
    engine.backward(result.loss * dist.get_world_size())  # DeepSpeed averages over workers; shares are to be summed
    engine.step()
    return result


def save_portable(directory: Path, engine: Any, config: rmt_core.ModelConfig, tokenizer: Any) -> None:
    """Write the model's directory from rank 0; every worker takes part, as parameters may be sharded."""
    import deepspeed

    model = engine.module.model
    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_partition_weights()):
        if dist.get_rank() == 0:
            save_tensors(directory, config, tensors_of(model), tokenizer)
