"""How much memory a worker needs: model states by ZeRO stage, DeepSpeed's buffers, activations.

States are those of DeepSpeed's own estimators (`estimate_zero2_model_states_mem_needs`, for weights in 16 bits that are
all trained: 2 + 18 / W bytes a parameter under ZeRO 2), by parts, so that frozen weights, float32 and the stages 0 and
1 are covered too. A step has two moments that may be the worst: the backward pass, when activations give way to
gradients and these to what is reduced of them, and the optimiser's step. Of several backward passes the later ones
begin beside the whole gradient of those before, which is reduced after the last. Under ZeRO 3 there is a third moment:
the start, when DeepSpeed has the whole model on the device before it shares it out.
"""

from typing import Any, NamedTuple

from pipelines.training.costs import ModelSize, SegmentCost
from pipelines.training.settings import TrainConfig

STAGES = (0, 1, 2, 3)
REDUCED_AT_ONCE = 500_000_000  # gradients in DeepSpeed's buffer, and in one all-reduce without ZeRO
WHOLE_AT_ONCE = 1_000_000_000  # parameters that ZeRO 3 keeps whole for their next use (stage3_max_live_parameters)
GATHERED_AT_ONCE = 50_000_000  # parameters that it brings together in one go (stage3_prefetch_bucket_size)
_FLOAT32 = 4  # bytes
_MOMENTS = 8  # bytes: two float32 that AdamW keeps of each parameter
_SCRATCH = 8  # bytes a parameter that AdamW takes while it steps: two float32


class Footprint(NamedTuple):
    """Bytes of one worker."""

    zero_stage: int
    weights_bytes: int  # in the model's type; under ZeRO 3 with those that are whole at once
    gradients_bytes: int  # as kept for the optimiser
    optimizer_bytes: int  # AdamW's moments, and its float32 copy of the weights
    buffers_bytes: int  # in which gradients are reduced
    activations_bytes: int
    device_bytes: int  # at the worst moment
    host_bytes: int  # beside the device, where the optimiser is offloaded


def footprint(config: TrainConfig, size: ModelSize, cost: SegmentCost, stage: int, num_workers: int) -> Footprint:
    """What a worker whose rows cost `cost` a segment needs under a ZeRO stage, whatever stage is configured."""
    width = 2 if config.workers.precision == "bfloat16" else _FLOAT32  # bytes of a weight
    trained, part = size.num_trained, -(-size.num_trained // (num_workers if stage else 1))
    at_once = min(trained, REDUCED_AT_ONCE)
    weights = width * size.num_parameters
    buffers = width * at_once  # a bucket of gradients
    copied = width * at_once  # what is sent of it
    optimizer = (_FLOAT32 + _MOMENTS) * part
    gradients = (width + _FLOAT32) * part
    scratch = _SCRATCH * part
    if stage == 0:
        if width == _FLOAT32:
            optimizer, gradients = _MOMENTS * part, width * part
        scratch = _SCRATCH * min(size.largest_layer, trained)
        buffers, copied = 0, width * (trained + at_once)
    elif stage == 3:
        weights = -(-weights // num_workers) + width * min(size.num_parameters, WHOLE_AT_ONCE)
        gradients = _FLOAT32 * part
        scratch //= 2
        copied = 2 * width * at_once + (0 if width == _FLOAT32 else width * part)
    activations = activations_bytes(config, cost)
    gathered = width * min(size.num_parameters, GATHERED_AT_ONCE) if stage == 3 else 0
    beside = _beside_states(config, cost, width * trained, buffers, copied, gathered)
    backward = weights + optimizer + beside
    step = weights + optimizer + gradients + scratch
    host = 0
    if config.workers.offload_optimizer and stage:
        host = optimizer + (width + _FLOAT32) * part
        backward, step = backward - optimizer, weights + width * part
    start = width * size.num_parameters
    return Footprint(stage, weights, gradients, optimizer, buffers, activations, max(backward, step, start), host)


def _beside_states(
    config: TrainConfig, cost: SegmentCost, gradient: int, buffers: int, copied: int, gathered: int
) -> int:
    """What the backward passes of a step take at most, in bytes, beside weights and optimiser.

    `gradient` is that of a worker's rows as a whole. Of several passes each but the first begins beside it, and the
    last ends in reducing it. In one pass gradients are whole, and reduced, when the first segment's are known: every
    segment uses all weights.
    """
    activations = activations_bytes(config, cost) + gathered
    if _num_passes(config) > 1:
        return gradient + max(activations, buffers + copied)
    first = cost.kept_bytes + cost.passing_bytes + gathered + buffers
    if max(config.curriculum.num_segments) > 1:
        first += gradient
    return max(activations, first, buffers + copied)


def activations_bytes(config: TrainConfig, cost: SegmentCost) -> int:
    """What the longest window of the curriculum keeps for its backward pass, and what passes meanwhile.

    A window of K segments keeps K segments' activations, with mode `checkpoint` or `replay` those of one and the K
    states between them, at an exact depth those of so many segments.
    """
    num_segments = max(config.curriculum.num_segments)
    gradient = config.gradient
    kept, states = num_segments, 1
    if gradient.mode in ("checkpoint", "replay"):
        kept, states = 1, num_segments
    elif gradient.exact_depth:
        kept = min(num_segments, gradient.bptt_segments or num_segments)
        states = kept
    return kept * cost.kept_bytes + cost.passing_bytes + states * cost.state_bytes


def _num_passes(config: TrainConfig) -> int:
    """Backward passes of an optimiser step."""
    gradient = config.gradient
    passes = max(config.curriculum.num_segments) if gradient.mode == "replay" or gradient.exact_depth else 1
    return passes * config.optimizer.accumulation_steps


def zero_buffers(num_trained: int) -> dict[str, Any]:
    """DeepSpeed's settings of the buffers that `footprint` counts: no larger than the gradient is."""
    return {"reduce_bucket_size": max(1, min(num_trained, REDUCED_AT_ONCE))}
