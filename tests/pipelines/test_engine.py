"""Two workers under DeepSpeed equal one process and plain torch, for every ZeRO stage and gradient mode."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rmt_core
from pipelines.config import InputError, build
from pipelines.data import lanes
from pipelines.data.books import BookStore
from pipelines.training import engine as engines
from pipelines.training.reading import make_lanes
from pipelines.training.settings import TrainConfig, learning_rate, model_config, num_segments_at, stage_at
from pipelines.training.steps import Stepper, agree, seed_of
from pipelines.training.weights import choose_trained, plain_tensors
from rmt_core.checkpoint import tensors_of
from tests.process_group import spawn

STEPS, WORLD_SIZE = 3, 2
MODES = {
    "full": {"mode": "full"},
    "truncated": {"mode": "truncated", "bptt_segments": 2},
    "checkpoint": {"mode": "checkpoint"},
    "replay": {"mode": "replay"},
    "exact": {"mode": "truncated", "bptt_segments": 2, "exact_depth": True},
}
ACCUMULATED = {"optimizer": {"accumulation_steps": 2}}
UNEVEN = {"batch_size": 5}
OFFLOADED = {"workers": {"offload_optimizer": True}}
GATED = {
    "model": {"memory": {"kind": "rmt", "num_tokens": 2, "gate": "lstm", "write_cost": 2.0}},
    "curriculum": {"aux_from": -1},
}
SAMPLING = {"model": {"memory": {"kind": "infinity", "num_basis": 8, "kl_weight": 1.0}}}
DROPOUT = {"model": {"family": "gpt2", "max_positions": 64, "memory": {"kind": "rmt", "num_tokens": 2}}}
LORA = {"model": {"train": "lora", "lora": {"rank": 2}}, "optimizer": {"learning_rate": 0.02}}
FROZEN = {"model": {"train": "memory"}, "optimizer": {"learning_rate": 0.02}}
# ZeRO stages and modes that the default tests take; all others come with the long ones.
USUAL = [(0, "full"), (1, "truncated"), (2, "full"), (2, "replay"), (3, "checkpoint"), (3, "replay")]
# Name -> ZeRO stage, gradient mode, other settings.
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    **{f"zero{stage}-{mode}": (stage, mode, {}) for stage, mode in USUAL},
    "zero2-accumulated-full": (2, "full", ACCUMULATED),
    "zero3-uneven-full": (3, "full", UNEVEN),
    "zero2-offload": (2, "replay", OFFLOADED),
    "zero2-sampling": (2, "replay", {**SAMPLING, **UNEVEN}),
    "zero2-aux-full": (2, "full", {**GATED, **UNEVEN}),
    "zero3-aux-replay": (3, "replay", {**GATED, **ACCUMULATED}),
    "zero3-lora-checkpoint": (3, "checkpoint", LORA),
    "zero1-memory": (1, "replay", FROZEN),
}
MORE: dict[str, tuple[int, str, dict[str, Any]]] = {
    **{
        f"zero{stage}-{mode}": (stage, mode, {})
        for stage in range(4)
        for mode in MODES
        if mode != "exact" and (stage, mode) not in USUAL
    },
    **{f"zero{stage}-accumulated-full": (stage, "full", ACCUMULATED) for stage in (0, 1, 3)},
    **{f"zero{stage}-exact": (stage, "exact", {}) for stage in (2, 3)},
    **{f"zero{stage}-accumulated-replay": (stage, "replay", ACCUMULATED) for stage in (2, 3)},
    "zero1-uneven-replay": (1, "replay", UNEVEN),
    "zero1-offload": (1, "full", OFFLOADED),
    "zero3-offload": (3, "replay", OFFLOADED),
    "zero3-sampling": (3, "checkpoint", SAMPLING),
    **{f"zero{stage}-lora": (stage, "full", LORA) for stage in range(4)},
    "zero2-lora-replay": (2, "replay", LORA),
    "zero3-memory": (3, "full", FROZEN),
}
DROPPING = {f"zero{stage}-dropout-{mode}": (stage, mode, DROPOUT) for stage in (0, 2, 3) for mode in ("full", "replay")}
DROPPING["zero2-dropout-checkpoint"] = (2, "checkpoint", DROPOUT)


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    found = dict(values)
    for name, value in changes.items():
        found[name] = merged(found[name], value) if isinstance(value, dict) and name in found else value
    return found


def settings(zero_stage: int, mode: str, changes: dict[str, Any]) -> TrainConfig:
    """Documents of other lengths in every lane, a longer window from the third step on, clipping that bites."""
    base = {
        "batch_size": 4,
        "segment_len": 48,
        "model": {"width": 32, "feed_forward_width": 48},
        "optimizer": {"warmup_steps": 1, "clip_norm": 0.5, "weight_decay": 0.1},
        "curriculum": {"num_segments": [3, 4], "steps": [2, 10], "vary": False},
        "dataset": {"piece_segments": 2, "task_fraction": 0.25},
        "workers": {"num_workers": WORLD_SIZE, "zero_stage": zero_stage},
        "gradient": MODES[mode],
    }
    base["model"]["memory"] = changes.get("model", {}).get("memory", {"kind": "rmt", "num_tokens": 2})  # type: ignore[index]
    return build(TrainConfig, merged(base, changes))


def aux_counts(config: TrainConfig, step: int) -> bool:
    """Whether auxiliary losses are part of the step's loss."""
    stages = range(len(config.curriculum.steps))
    return stage_at(config.curriculum, step) >= stages[config.curriculum.aux_from]


books = functools.cache(BookStore)


def fresh_model(config: TrainConfig) -> rmt_core.RecurrentModel:
    store = books(config.segment_len)
    torch.manual_seed(config.seed)
    model = rmt_core.build(model_config(config, store.load_tokenizer(), config.segment_len)).train()
    choose_trained(model, config.model)
    return model


def lanes_of(config: TrainConfig, rank: int, world_size: int) -> lanes.Lanes:
    store = books(config.segment_len)
    return lanes.Lanes(make_lanes(config, store, store.load_tokenizer())[rank::world_size], config.segment_len)


def windows_of(config: TrainConfig, mine: lanes.Lanes, step: int) -> list[lanes.Window]:
    """What the lanes read in an optimiser step."""
    count, stage = config.optimizer.accumulation_steps, stage_at(config.curriculum, step)
    numbers = range(step * count, (step + 1) * count)
    return [mine.window(n, num_segments_at(config.curriculum, stage, n, config.seed)) for n in numbers]


class Reduced:
    """Numbers that went through collective reductions of gradients."""

    NAMES = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base", "all_to_all")

    def __init__(self) -> None:
        self.count = 0
        for name in self.NAMES:
            if hasattr(torch.distributed, name):
                setattr(torch.distributed, name, self._counting(getattr(torch.distributed, name)))

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            lists = [t for a in (*args, *kwargs.values()) if isinstance(a, list | tuple) for t in a]
            sizes = [t.numel() for t in (*tensors, *lists) if isinstance(t, torch.Tensor)]
            self.count += max(sizes, default=0) if max(sizes, default=0) > 16 else 0
            return function(*args, **kwargs)

        return counted


def worker(rank: int, folder: str, cases: dict[str, tuple[int, str, dict[str, Any]]]) -> None:
    """The cases on one of two processes; rank 0 writes each case's parameters and what was reduced."""
    import deepspeed

    reduced, counts = Reduced(), {}
    for name, case in cases.items():
        config = settings(*case)
        given = engines.deepspeed_config(config, WORLD_SIZE)
        given["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # shard even the smallest parameter
        engine = engines.start_engine(fresh_model(config), config, given)
        mine = lanes_of(config, rank, WORLD_SIZE)
        stepper, model = Stepper(engine, config), engine.module.model
        with deepspeed.zero.GatheredParameters(list(model.memory.parameters()), enabled=case[0] == 3):
            state = rmt_core.state.tree_map(torch.clone, rmt_core.state.detach(model.init_state(len(mine.lanes))))
        torch.manual_seed(rank)
        for step in range(STEPS):
            windows = windows_of(config, mine, step)
            agreed = agree(windows, [step == 1, False], engine.device)
            assert agreed.wishes == [step == 1, False]
            before = reduced.count
            rate = learning_rate(config.optimizer, step, STEPS)
            with_aux = aux_counts(config, step)
            result = stepper.step(windows, state, agreed.weight, step=step, rate=rate, with_aux=with_aux)
            state = result.state
            counts[f"{name}-{step}"] = reduced.count - before
        engines.save_portable(Path(folder) / name, engine, model.config, None)
        torch.distributed.barrier()
    differing = [window._replace(tokens=window.tokens[:, : 2 + rank]) for window in windows]
    with pytest.raises(RuntimeError, match="different numbers of segments"):
        agree(differing, [], engine.device)
    if rank == 0:
        (Path(folder) / "reduced.json").write_text(json.dumps(counts))


def window_loss(model: rmt_core.RecurrentModel, config: TrainConfig, segments: Any, state: Any, generator: Any) -> Any:
    """From the definition of each mode: sum over labels of weighted nats, the state after the window, mean cost."""
    depth = config.gradient.bptt_segments
    if not config.gradient.exact_depth:
        result = model.unroll(segments, state, bptt_segments=depth, generator=generator)
        return result.loss_sum, result.state, result.aux
    assert depth is not None
    states, total = [state], torch.zeros(())
    for i, segment in enumerate(segments):
        first = max(0, i + 1 - depth)
        carried = states[first]
        for earlier in segments[first:i]:
            carried = model.state_after(earlier, carried)
        result = model.unroll([segment], carried)
        total = total + result.loss_sum
        states.append(rmt_core.state.detach(result.state))
    return total, states[-1], torch.zeros(())


@functools.cache
def reference(words: str) -> dict[str, torch.Tensor]:
    """The same steps in one process: the mean over all rows and windows, clipped, by torch's own AdamW."""
    config = build(TrainConfig, json.loads(words))
    model = fresh_model(config)
    groups = engines.parameter_groups(model, config.optimizer.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(config.optimizer.beta1, config.optimizer.beta2))
    everything = lanes_of(config, 0, 1)
    state = rmt_core.state.detach(model.init_state(len(everything.lanes)))
    for step in range(STEPS):
        windows = windows_of(config, everything, step)
        total, costs, weight = torch.zeros(()), torch.zeros(()), 0.0
        for i, window in enumerate(windows):
            generator = torch.Generator().manual_seed(seed_of(config.seed, step * len(windows) + i))
            segments = engines.segments_of(window, torch.device("cpu"))
            loss, state, cost = window_loss(model, config, segments, rmt_core.state.detach(state), generator)
            total, costs = total + loss, costs + cost
            weight += float((window.weights * (window.labels != rmt_core.IGNORED)).sum())
        optimizer.zero_grad()
        if not aux_counts(config, step):
            costs = torch.zeros(())
        (total / weight + costs / len(windows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, STEPS)
        optimizer.step()
    return plain_tensors(model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_cases(tmp_path_factory.mktemp("engine"), CASES)


@pytest.fixture(scope="module")
def more_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_cases(tmp_path_factory.mktemp("engine"), MORE | DROPPING)


def run_cases(folder: Path, cases: dict[str, tuple[int, str, dict[str, Any]]]) -> Path:
    spawn(worker, WORLD_SIZE, str(folder), cases)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_workers_equal_one_process(trained: Path, name: str) -> None:
    check_against_reference(trained / name, settings(*CASES[name]))


@pytest.mark.long
@pytest.mark.parametrize("name", MORE)
def test_two_workers_equal_one_process_in_further_ways(more_trained: Path, name: str) -> None:
    check_against_reference(more_trained / name, settings(*MORE[name]))


def check_against_reference(folder: Path, config: TrainConfig) -> None:
    same = config.model_dump(mode="json") | {"workers": {"num_workers": 1}}
    if config.gradient.bptt_segments is None:
        same["gradient"] = MODES["full"]  # the modes that are exact have one reference
    start, found = plain_tensors(fresh_model(config)), rmt_core.load(folder)
    wanted = reference(json.dumps(same))
    moved = 0.0
    for key, tensor in tensors_of(found).items():
        torch.testing.assert_close(tensor, wanted[key], atol=1e-5, rtol=0)
        moved = max(moved, float((tensor - start[key]).abs().max()))
    assert moved > 1e-3  # otherwise nothing was learned and the equality says nothing


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in DROPPING if not name.endswith("full")])
def test_what_is_computed_again_drops_out_the_same(more_trained: Path, name: str) -> None:
    stage = DROPPING[name][0]
    found, wanted = rmt_core.load(more_trained / name), rmt_core.load(more_trained / f"zero{stage}-dropout-full")
    for key, tensor in tensors_of(found).items():
        torch.testing.assert_close(tensor, tensors_of(wanted)[key], atol=1e-6, rtol=0)


def test_replay_reduces_gradients_once_a_step(trained: Path) -> None:
    check_reduced_once(json.loads((trained / "reduced.json").read_text()), 2)


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_replay_reduces_gradients_once_a_step_in_every_stage(trained: Path, more_trained: Path, stage: int) -> None:
    counts = [json.loads((folder / "reduced.json").read_text()) for folder in (trained, more_trained)]
    check_reduced_once(counts[0] | counts[1], stage)


def check_reduced_once(counts: dict[str, int], stage: int) -> None:
    """As many numbers as one backward pass reduces, however many segments there are, or windows."""
    parameters = sum(parameter.numel() for parameter in fresh_model(settings(*CASES["zero0-full"])).parameters())
    for step in range(STEPS):
        once = counts[f"zero{stage}-full-{step}"]
        assert once >= parameters
        assert counts[f"zero{stage}-replay-{step}"] == once
        assert counts[f"zero{stage}-accumulated-full-{step}"] == once


def test_offloading_on_gpus_names_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    config = build(TrainConfig, {"workers": {"offload_optimizer": True, "use_gpu": True, "zero_stage": 2}})
    with pytest.raises(InputError, match="no a C\\+\\+ compiler and ninja"):
        engines.start_engine(fresh_model(config), config, {})
