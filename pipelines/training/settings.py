"""What a training run is: every setting with its unit, and how settings become a model and a course of steps."""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pydantic
from pydantic import Field

import rmt_core
from pipelines.config import Config, Count, InputError, split_commas
from pipelines.data.tokenise import Tokenizer
from pipelines.training.data_settings import DataSettings, json_or_word
from rmt_core.gradients import check_mode


def _listed(value: Any) -> Any:
    """A single one is a list of one."""
    return [value] if isinstance(value, str) else value


class LoraSettings(Config):
    """Low-rank adapters on linear maps of the backbone's layers (LoRA, arXiv:2106.09685)."""

    rank: int = Field(default=8, ge=1, description="inner width of an adapter")
    alpha: float = Field(default=16.0, gt=0, description="what an adapter adds is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="fraction of an adapter's inputs dropped in training")
    targets: Annotated[list[str] | None, pydantic.BeforeValidator(split_commas)] = Field(
        default=None, description="maps that get one, as q_proj v_proj (gpt2: c_attn); none: all of the layers"
    )


class ModelSettings(Config):
    """The model: a trained one's directory, a backbone's, or the shape of a new one with random weights."""

    start: str | None = Field(
        default=None,
        description="directory of a trained model (model/ of a run), on disk or s3://: training begins with its "
        "weights, memory and all; segments may be of another length; none: with a new memory",
    )
    backbone: str | None = Field(
        default=None,
        description="directory saved by Hugging Face, on disk or s3://; none: a new one of the shape below",
    )
    family: Literal["llama", "mistral", "qwen2", "qwen3", "gpt2"] = Field(
        default="llama", description="of a new backbone"
    )
    width: int = Field(default=64, ge=1, description="of a new backbone: hidden size")
    num_layers: int = Field(default=2, ge=1, description="of a new backbone: layers")
    num_heads: int = Field(default=4, ge=1, description="of a new backbone: attention heads")
    feed_forward_width: int = Field(
        default=128, ge=1, description="of a new backbone: inner size of the feed-forward part"
    )
    max_positions: Count = Field(
        default=2048, ge=1, description="of a new backbone: positions a segment may take with its memory"
    )
    memory: Annotated[Any, pydantic.BeforeValidator(json_or_word)] = Field(
        default=None,
        description="memory kind (the kind none: no memory), or JSON with its settings, or a JSON list of such; not "
        "given: that of model.start; else the recipe's; in a file that names none, rmt with 4 tokens",
    )
    feed_forward: Annotated[Any, pydantic.BeforeValidator(json_or_word)] = Field(
        default=None,
        description="what replaces feed-forward parts: a kind (ultramem), or JSON with its settings; not given: "
        "what replaces those of model.start, or nothing",
    )
    train: Literal["everything", "memory", "lora"] = Field(
        default="everything",
        description="memory: the backbone is frozen; lora: it gets adapters; new parts are trained in every case",
    )
    lora: LoraSettings = LoraSettings()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _with_memory(cls, values: Any) -> Any:
        """A new model has a memory, also where none is named; a trained one has its own."""
        if isinstance(values, dict) and values.get("start") is None and values.get("memory") is None:
            return {**values, "memory": {"kind": "rmt", "num_tokens": 4}}
        return values

    @pydantic.model_validator(mode="after")
    def _check(self) -> "ModelSettings":
        if self.start is not None and self.backbone is not None:
            raise ValueError("model.start and model.backbone are given; a trained model has a backbone, leave one out")
        if self.train != "lora" and self.lora != LoraSettings():
            raise ValueError(f"model.lora is set with model.train {self.train}; set model.train lora too")
        return self

    @property
    def directory(self) -> str | None:
        """Where weights are read that the run begins with."""
        return self.backbone if self.start is None else self.start

    @property
    def directory_field(self) -> str:
        """The setting that names it, as users write it."""
        return "model.backbone" if self.start is None else "model.start"


class OptimizerSettings(Config):
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = Field(default=2e-3, gt=0, description="highest learning rate")
    final_fraction: float = Field(
        default=0.1, ge=0, le=1, description="last learning rate as a fraction of the highest"
    )
    warmup_steps: int = Field(default=50, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW weight decay, on matrices only")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW beta 1")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="AdamW beta 2")
    clip_norm: float = Field(default=1.0, ge=0, description="global gradient norm is clipped to this; 0: no clipping")
    accumulation_steps: int = Field(
        default=1, ge=1, description="windows that each row reads for one optimiser step, one after another"
    )


class CurriculumSettings(Config):
    """How many segments the gradient and the texts of tasks span, stage by stage."""

    num_segments: list[int] = Field(
        default=[1, 2, 3, 4, 6, 8], min_length=1, description="segments of a window in each stage"
    )
    steps: list[int] = Field(
        default=[200, 600, 200, 200, 200, 200], min_length=1, description="optimiser steps of each stage"
    )
    vary: bool = Field(
        default=True, description="each window draws its number of segments, from least_segments to the stage's, evenly"
    )
    least_segments: int = Field(default=1, ge=1, description="with vary: segments of a window, at least")
    advance_below: float | None = Field(
        default=None,
        gt=0,
        description="nats: a stage lasts until the answers' loss is below, and the last until the sum of steps",
    )
    aux_from: int = Field(
        default=0,
        description="the stage, from 0 on or from -1 (the last) back, from which the memory's auxiliary losses count: "
        "what writing costs, say, once it is known what to write; with advance_below a late stage may not come",
    )

    @pydantic.model_validator(mode="after")
    def _check(self) -> "CurriculumSettings":
        if len(self.num_segments) != len(self.steps):
            raise ValueError(
                f"num_segments names {len(self.num_segments)} stages, steps {len(self.steps)}; give one of each a stage"
            )
        if min(self.num_segments) < 1 or min(self.steps) < 1:
            raise ValueError("num_segments and steps must all be at least 1")
        if not -len(self.steps) <= self.aux_from < len(self.steps):
            raise ValueError(
                f"aux_from is {self.aux_from}; it must be a stage, from 0 to {len(self.steps) - 1}, or from -1, the "
                f"last, back to -{len(self.steps)}"
            )
        if self.least_segments > (min(self.num_segments) if self.vary else 1):
            raise ValueError(
                f"least_segments is {self.least_segments}; it needs vary, and at most the {min(self.num_segments)} "
                "segments of the shortest stage"
            )
        return self

    @property
    def aux_stage(self) -> int:
        """The first stage, from 0 on, with auxiliary losses."""
        return self.aux_from % len(self.steps)

    @property
    def shortest(self) -> int:
        """Segments of the shortest window."""
        return self.least_segments if self.vary else min(self.num_segments)


class GradientSettings(Config):
    """How the gradient goes back through a window's segments."""

    mode: Literal["full", "truncated", "checkpoint", "replay"] = Field(
        default="full",
        description="truncated: at most bptt_segments back; checkpoint, replay: full, with one segment's activations",
    )
    bptt_segments: int | None = Field(
        default=None, ge=1, description="with mode truncated: segments a gradient may cross"
    )
    exact_depth: bool = Field(
        default=False,
        description="with mode truncated: every loss goes back through exactly bptt_segments segments, at as many "
        "times the cost",
    )

    @pydantic.model_validator(mode="after")
    def _check(self) -> "GradientSettings":
        check_mode(self.mode, self.bptt_segments, self.exact_depth)
        return self


def _between(value: Any) -> Any:
    """(least, most) from 2, "2", "1,4" or [1, 4]."""
    parts = split_commas(str(value) if isinstance(value, int) else value)
    try:
        numbers = [int(part) for part in parts]
    except (TypeError, ValueError):
        numbers = []
    least, most = (numbers[0], numbers[-1]) if numbers else (0, 0)
    if len(numbers) > 2 or not 1 <= least <= most:
        raise ValueError("needs a whole number from 1 on, or MIN,MAX such as 2,8")
    return least, most


class WorkerSettings(Config):
    """How the work is spread."""

    num_workers: Annotated[tuple[int, int], pydantic.BeforeValidator(_between)] = Field(
        default=(1, 1),
        description="training processes, best a divisor of batch_size; MIN,MAX: as many as the cluster has room for",
    )
    cpus: float = Field(default=1.0, gt=0, description="CPU cores a worker")
    use_gpu: bool = Field(default=False, description="one GPU a worker")
    zero_stage: Literal[0, 1, 2, 3] = Field(default=2, description="DeepSpeed ZeRO: what is sharded over workers")
    offload_optimizer: bool = Field(
        default=False, description="keep the optimiser's state and its step on the CPU (ZeRO-Offload)"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of weights in the model and activations"
    )
    max_failures: int = Field(
        default=3,
        ge=0,
        description="times that the run goes on from its last checkpoint by itself after a worker failed; nodes that "
        "are announced to go are not counted",
    )
    resize_every_s: float = Field(
        default=60.0, gt=0, description="with MIN,MAX: seconds between looks whether there is room for more workers"
    )

    @pydantic.model_validator(mode="after")
    def _check(self) -> "WorkerSettings":
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3; 0 has no sharded optimiser to offload")
        return self

    @property
    def max_workers(self) -> int:
        return self.num_workers[1]


class Span(NamedTuple):
    """Optimiser steps from `start` to before `stop`, counted from 0."""

    start: int
    stop: int


def _span(value: Any) -> Any:
    """`10:15`, or what a saved configuration holds."""
    if value is None:
        return None
    parts = value.split(":") if isinstance(value, str) else value
    try:
        start, stop = (int(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError("needs START:STOP, two numbers of steps, as 10:15") from None
    if not 0 <= start < stop:
        raise ValueError("needs START:STOP with START from 0 on and below STOP, as 10:15")
    return start, stop


class ReportSettings(Config):
    """When the run tells of itself."""

    log_every: int = Field(default=20, ge=1, description="steps between lines of metrics.jsonl and TensorBoard")
    checkpoint_every: int = Field(default=500, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(default=2, ge=1, description="checkpoints kept, the newest")
    backbone: bool = Field(
        default=False, description="write the trained backbone without its memory too: backbone/, for Hugging Face"
    )
    wandb: str | None = Field(default=None, description="project of Weights & Biases that gets the metrics too")
    mlflow: str | None = Field(default=None, description="URI of an MLflow tracking server that gets the metrics too")
    probe_every: int | None = Field(
        default=None, ge=1, description="steps between probes of the loss with and without memory; none: no probes"
    )
    probe_data: str | None = Field(
        default=None,
        description="segment store that probes read; none: the embedded novel that is not trained on, or data",
    )
    probe_segments: int = Field(default=8, ge=2, description="segments of a probe's texts, at most")
    tokens_per_s: float | None = Field(
        default=None, gt=0, description="tokens a second of one device, as another run had; --dry-run tells costs by it"
    )
    peak_flops: float | None = Field(
        default=None,
        gt=0,
        description="operations a second that one device can do at most; none: of known GPUs as the vendor says",
    )
    profile: Annotated[Span | None, pydantic.BeforeValidator(_span)] = Field(
        default=None, description="START:STOP, steps that the torch profiler records, into profile/; none: no trace"
    )


class TrainConfig(Config):
    """A training run."""

    data: Annotated[list[str] | None, pydantic.BeforeValidator(_listed)] = Field(
        default=None,
        min_length=1,
        description="segment stores made by prepare, read together; none: the embedded books, as bytes",
    )
    output: str = Field(default="runs/train", description="directory or s3:// of the run: metrics, checkpoints, model")
    resume: str = Field(
        default="auto", description="auto: go on where the run in output stopped; never; or a checkpoint's path"
    )
    segment_len: Count = Field(
        default=64, ge=1, description="tokens a segment, for the embedded books; a store has its own"
    )
    batch_size: int = Field(default=16, ge=1, description="rows of the global batch")
    seed: int = Field(default=0, ge=0, le=2**62, description="of weights, order of data and texts of tasks")
    seeds: int = Field(
        default=1, ge=1, description="so many runs one after another, with seeds from seed on, in seed-N of output"
    )
    model: ModelSettings = ModelSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    curriculum: CurriculumSettings = CurriculumSettings()
    gradient: GradientSettings = GradientSettings()
    dataset: DataSettings = DataSettings()
    workers: WorkerSettings = WorkerSettings()
    report: ReportSettings = ReportSettings()

    @pydantic.model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.curriculum.advance_below is not None and not self.num_task_lanes:
            raise ValueError("curriculum.advance_below needs answers to judge by; set dataset.task_fraction above 0")
        if not self.num_task_lanes and self.dataset.tasks != DataSettings().tasks:
            raise ValueError(
                f"dataset.tasks are given, but dataset.task_fraction {self.dataset.task_fraction:g} of "
                f"{self.batch_size} rows is no row; set it higher"
            )
        if self.seeds > 1 and self.resume not in ("auto", "never"):
            raise ValueError("resume names the checkpoint of one run; leave it out where seeds is more than 1")
        weights, num_stores = self.dataset.weights, len(self.data or [])
        if weights is not None and (len(weights) != num_stores or min(weights, default=0) <= 0):
            raise ValueError(
                f"dataset.weights are {weights} for {num_stores} stores of data; give one above 0 for each store"
            )
        if self.report.backbone and self.model.feed_forward is not None:
            raise ValueError(
                "report.backbone: a backbone with replaced feed-forward parts is no Hugging Face model; leave it or "
                "model.feed_forward out"
            )
        if self.workers.max_workers > self.batch_size:
            raise ValueError(
                f"workers.num_workers {self.workers.max_workers} exceeds batch_size {self.batch_size}: every worker "
                f"needs a row; use at most {self.batch_size} workers"
            )
        return self

    @property
    def num_steps(self) -> int:
        return sum(self.curriculum.steps)

    @property
    def num_task_lanes(self) -> int:
        return round(self.dataset.task_fraction * self.batch_size)


def model_config(config: TrainConfig, tokenizer: Tokenizer, segment_len: int) -> rmt_core.ModelConfig:
    """The model's configuration for a tokenizer's vocabulary. Raises ValueError where parts do not fit."""
    settings = config.model
    backbone: Any = settings.backbone
    memory, feed_forward = settings.memory, settings.feed_forward
    if settings.start is not None:
        try:
            trained = rmt_core.load_config(settings.start).to_json()
        except ValueError as error:
            raise InputError(f"model.start: {error}") from error
        backbone = trained["backbone"]
        memory = trained["memory"] if memory is None else memory
        feed_forward = trained["feed_forward"] if feed_forward is None else feed_forward
    elif backbone is None:
        backbone = {
            "model_type": settings.family,
            "vocab_size": tokenizer.vocab_size,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_id,
            **_shape(settings),
        }
    elif not Path(backbone).is_dir():
        raise InputError(f"model.backbone {backbone!r} is not a directory; give one saved by Hugging Face")
    return rmt_core.ModelConfig(
        backbone=backbone,
        memory=memory,
        segment_len=segment_len,
        dtype=config.workers.precision,
        feed_forward=feed_forward,
    )


def _shape(settings: ModelSettings) -> dict[str, Any]:
    if settings.family == "gpt2":
        return {
            "n_embd": settings.width,
            "n_layer": settings.num_layers,
            "n_head": settings.num_heads,
            "n_inner": settings.feed_forward_width,
            "n_positions": settings.max_positions,
        }
    return {
        "hidden_size": settings.width,
        "intermediate_size": settings.feed_forward_width,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_heads,
        "head_dim": settings.width // settings.num_heads,
        "max_position_embeddings": settings.max_positions,
        "pad_token_id": None,
    }


def learning_rate(settings: OptimizerSettings, step: int, num_steps: int) -> float:
    """The learning rate of optimiser step `step`, from 0 on: linear warm-up, then a cosine to the final fraction."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(num_steps - settings.warmup_steps, 1)
    decay = 0.5 * (1 + np.cos(np.pi * min(progress, 1.0)))
    return float(settings.learning_rate * (settings.final_fraction + (1 - settings.final_fraction) * decay))


def stage_at(settings: CurriculumSettings, step: int) -> int:
    """The stage of optimiser step `step` where stages have their numbers of steps."""
    stage = int(np.searchsorted(np.cumsum(settings.steps), step, side="right"))
    return min(stage, len(settings.steps) - 1)


def next_stage(settings: CurriculumSettings, stage: int, step: int, answer_loss: float | None) -> int:
    """The stage that follows a report at `step`: by steps, or where `advance_below` is set by the answers' loss."""
    if settings.advance_below is None:
        return stage_at(settings, step)
    learned = answer_loss is not None and answer_loss < settings.advance_below
    return min(stage + learned, len(settings.steps) - 1)


def num_segments_at(settings: CurriculumSettings, stage: int, window: int, seed: int) -> int:
    """Segments of the run's window number `window`, which is in `stage`; the same on every worker."""
    longest = settings.num_segments[stage]
    if not settings.vary:
        return longest
    return int(np.random.default_rng((seed, window)).integers(settings.least_segments, longest + 1))
