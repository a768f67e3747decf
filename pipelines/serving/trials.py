"""Random rows of each kind of work, for finding out which batches agree.

Axes: R rows, n tokens, D width.
"""

from collections.abc import Sequence

import torch

from rmt_core import RecurrentModel
from rmt_core import state as states
from rmt_core.open_segments import OpenSegments
from rmt_core.state import State

from .batch_sizes import Compute
from .scheduling import Shape


def draw(model: RecurrentModel, generator: torch.Generator, shape: Shape, num_rows: int) -> Compute:
    """Random rows of a shape, each at the beginning of its document."""
    embeddings = model.backbone.lm.get_input_embeddings().weight
    device = embeddings.device

    def random_tokens(num_tokens: int) -> torch.Tensor:
        return torch.randint(len(embeddings), (num_rows, num_tokens), generator=generator).to(device)

    state = states.detach(model.init_state(num_rows))
    if shape.stage == "choose":
        hidden = torch.randn(num_rows, embeddings.shape[1], generator=generator).to(embeddings)
        return lambda rows: model.backbone.head(hidden[list(rows)])
    tokens = random_tokens(shape.num_tokens)
    if shape.stage == "close":

        def close(rows: Sequence[int]) -> State:
            out, after = model.step(tokens[list(rows)], states.select(state, list(rows)))
            return out.hidden[:, -1], after

        return close
    segments = OpenSegments(model, num_rows)
    everyone = torch.arange(num_rows, device=device)
    if shape.stage == "open":
        lengths = torch.randint(shape.num_tokens, (num_rows,), generator=generator).to(device) + 1

        def open_(rows: Sequence[int]) -> State:
            chosen = list(rows)
            return segments.open(everyone[: len(chosen)], tokens[chosen], lengths[chosen], states.select(state, chosen))

        return open_
    lengths = torch.randint(model.segment_len - 1, (num_rows,), generator=generator).to(device) + 1
    _, within = segments.open(everyone, random_tokens(model.segment_len), lengths, state)
    begun = within if model.memory.runs_within else state

    def extend(rows: Sequence[int]) -> State:
        chosen = list(rows)
        return segments.extend(everyone[chosen], tokens[chosen, 0], lengths[chosen], states.select(begun, chosen))

    return extend
