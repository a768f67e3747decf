"""The diagonal order, and the one that is chosen, against the sequential one; on an accelerator full attention too."""

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

import rmt_core
from rmt_core import RecurrentModel
from rmt_core.diagonal import Part
from rmt_core.schedule import choose

from .measuring import VOCAB, Compared, compare, random_tokens, seconds, tell

MIN_AUTO_RATIO = 0.97  # of the sequential order's time to that of the chosen one
MIN_DIAGONAL_RATIO = 1.8  # on an accelerator, with segments of 512 to 1024 tokens
MAX_DIFFERENCE = 1e-4  # of hidden states in float32, of their largest entry
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A model with an associative memory and the text that it reads."""

    width: int
    num_layers: int
    segment_len: int
    num_segments: int
    num_rows: int = 1
    learns: bool = False  # forward and backward; false: forward alone
    heads: tuple[int, int] = (4, 2)  # query and key-value heads
    num_memory_tokens: int = 8
    dtype: str = "float32"


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    cases: tuple[Case, ...]
    repeats: int = 11  # timed rounds of each case
    full_attention_tokens: int = 0  # of the text that is read under full attention too; 0 leaves it out


CPU = Sizes(
    cases=(
        Case(128, 8, 32, 24),
        Case(128, 8, 64, 16),
        Case(256, 6, 128, 8),
        Case(256, 4, 128, 6, num_rows=4),
        Case(512, 4, 256, 4),
        Case(128, 6, 64, 10, learns=True),
        Case(256, 4, 128, 6, learns=True),
    )
)
BILLION: dict[str, Any] = {"width": 2048, "num_layers": 16, "heads": (32, 8), "dtype": "bfloat16"}
CUDA = Sizes(
    cases=(
        Case(segment_len=512, num_segments=64, num_memory_tokens=16, **BILLION),
        Case(segment_len=1024, num_segments=32, num_memory_tokens=16, **BILLION),
        Case(segment_len=2048, num_segments=32, num_memory_tokens=16, **BILLION),
        Case(segment_len=4096, num_segments=24, num_memory_tokens=16, **BILLION),
        Case(segment_len=512, num_segments=24, num_memory_tokens=16, num_rows=4, **BILLION),
        Case(segment_len=512, num_segments=20, num_memory_tokens=16, learns=True, **BILLION),
    ),
    repeats=5,
    full_attention_tokens=128 * 1024,
)
QUICK = Sizes(cases=(Case(32, 3, 8, 4), Case(32, 3, 8, 4, num_rows=2, learns=True)), repeats=3)


def sizes(device: str, quick: bool) -> Sizes:
    """The full sizes for a device, or tiny ones."""
    return QUICK if quick else CUDA if device == "cuda" else CPU


def build(case: Case, device: str, max_positions: int = 8192) -> RecurrentModel:
    """A llama with random weights."""
    torch.manual_seed(0)
    queries, keys = case.heads
    config = LlamaConfig(
        hidden_size=case.width,
        num_hidden_layers=case.num_layers,
        num_attention_heads=queries,
        num_key_value_heads=keys,
        intermediate_size=4 * case.width,
        vocab_size=VOCAB,
        max_position_embeddings=max_positions,
    )
    memory = {"kind": "armt", "num_tokens": case.num_memory_tokens}
    with torch.device(device):  # a billion weights take half a minute to draw on a CPU
        return rmt_core.build(backbone=config, memory=memory, segment_len=case.segment_len)


def reader(model: RecurrentModel, tokens: Tensor, order: str, learns: bool) -> Callable[[], Tensor]:
    """Reads the text in an order; gives the hidden states."""

    def read() -> Tensor:
        with torch.set_grad_enabled(learns):
            hidden = rmt_core.run(model, tokens, order=order)[0].hidden
        if learns:
            model.zero_grad()
            hidden.square().mean().backward()
        return hidden.detach()

    return read


def difference(model: RecurrentModel, case: Case, device: str) -> float:
    """Between both orders in the model's type, relative to the largest entry, over two segments more than layers."""
    size = case.segment_len * min(case.num_segments, case.num_layers + 2) - 1
    tokens = random_tokens(case.num_rows, size, device)
    one, other = (reader(model, tokens, order, False)() for order in ("sequential", "diagonal"))
    return float((one - other).abs().max() / one.abs().max())


def measure(case: Case, repeats: int, device: str) -> dict[str, Any]:
    """Both comparisons of one case. The model is in float32 when equality is checked, then in the case's type."""
    model = build(case, device)
    found = difference(model, case, device)
    model.to(DTYPES[case.dtype])
    tokens = random_tokens(case.num_rows, case.segment_len * case.num_segments, device)
    sequential, diagonal, auto = (
        reader(model, tokens, order, case.learns) for order in ("sequential", "diagonal", "auto")
    )
    chosen = compare(sequential, auto, repeats, device)  # the first reading, which measures, is not timed
    grouped = compare(sequential, diagonal, repeats, device)
    with torch.set_grad_enabled(case.learns):
        parts = [Part(part, None) for part in tokens.split(case.segment_len, 1)]
        order = choose(model, "auto", parts)
    num_tokens = tokens.numel()
    return {
        **asdict(case),
        "max_difference": found,
        "chosen": order,
        "sequential_us_per_token": 1e6 * grouped.first_s / num_tokens,
        "diagonal_us_per_token": 1e6 * grouped.second_s / num_tokens,
        "diagonal": grouped._asdict(),
        "auto": chosen._asdict(),
    }


@torch.inference_mode()
def against_full_attention(num_tokens: int, device: str) -> dict[str, Any]:
    """Seconds and peak memory of reading one text: segment by segment in both orders, and under full attention.

    Full attention is Hugging Face's own forward of the same layers, with the fast kernel and no logits.
    """
    case = Case(segment_len=1024, num_segments=num_tokens // 1024, num_memory_tokens=16, **BILLION)
    model = build(case, device, max_positions=num_tokens).to(DTYPES[case.dtype])
    body: Any = model.backbone.lm.model
    tokens = random_tokens(1, num_tokens, device)
    ways: dict[str, Callable[[], object]] = {
        "sequential": reader(model, tokens, "sequential", False),
        "diagonal": reader(model, tokens, "diagonal", False),
        "full_attention": lambda: body(tokens, use_cache=False).last_hidden_state,
    }
    found: dict[str, Any] = {"num_tokens": num_tokens}
    for name, read in ways.items():
        read()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found[f"{name}_s"] = min(seconds(read, device) for _ in range(3))
        found[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated() - before
    found["ratio"] = found["full_attention_s"] / found["diagonal_s"]
    return found


def orders(sizes: Sizes, device: str) -> dict[str, Any]:
    """Figures, and for each promise whether it is kept."""
    tell("Sequential order's time to that of the diagonal one, and of the one that `auto` chooses")
    names = (
        "width x layers",
        "tokens x rows",
        "pass",
        "diagonal",
        "quartiles",
        "auto",
        "quartiles",
        "chosen",
        "difference",
    )
    widths = (16, 15, 8, 10, 10, 8, 10, 12, 12)
    tell("".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True)))
    cases = []
    for case in sizes.cases:
        cases.append(found := measure(case, sizes.repeats, device))
        tell(_line(case, found))
        gc.collect()  # a model and its graph are a ring
    result: dict[str, Any] = {"least_auto_ratio": min(Compared(**found["auto"]).highest() for found in cases)}
    promises = {
        "auto_never_slower": result["least_auto_ratio"] >= MIN_AUTO_RATIO,
        "orders_agree": all(found["max_difference"] <= MAX_DIFFERENCE for found in cases),
    }
    if device == "cuda":
        promised = [
            Compared(**found["diagonal"]).highest()
            for found in cases
            if 512 <= found["segment_len"] <= 1024 and found["num_rows"] == 1 and not found["learns"]
        ]
        result["least_diagonal_ratio"] = min(promised, default=None)
        promises["diagonal_pays"] = all(ratio >= MIN_DIAGONAL_RATIO for ratio in promised)
    if sizes.full_attention_tokens:
        result["full_attention"] = against_full_attention(sizes.full_attention_tokens, device)
        tell(f"against full attention: {result['full_attention']}")
    return {**result, "promises": promises, "cases": cases}


def _line(case: Case, found: dict[str, Any]) -> str:
    """A case's row of the table."""
    line = f"{f'{case.width} x {case.num_layers}':>16}{f'{case.segment_len} x {case.num_rows}':>15}"
    line += f"{'both' if case.learns else 'forward':>8}"
    for order, width in (("diagonal", 10), ("auto", 8)):
        low, high = found[order]["ratio_quartiles"]
        line += f"{found[order]['ratio']:>{width}.3f} {low:.2f}-{high:.2f}"
    return f"{line}{found['chosen']:>12}{found['max_difference']:>12.1e}"
