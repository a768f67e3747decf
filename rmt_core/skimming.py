"""Reading on where nothing is asked: only the state is wanted, segment after segment, millions of times.

Axes: B rows, T tokens of a segment.
"""

from collections import Counter
from collections.abc import Hashable
from functools import partial

import torch
from torch import Tensor

from . import state as states
from .recurrent import RecurrentModel
from .state import State

_WARM_UP = 3  # runs before a graph is recorded: kernels are chosen and workspaces made in them
PATIENCE, PATIENCE_TO_COMPILE = 64, 4096  # steps first: recording takes milliseconds, compiling half a minute


class Skimmer:
    """The state after further segments, as `model.step` gives it, without hidden states.

    A small model's step keeps a GPU busy for less time than a CPU needs to launch it. So there, once `after` has been
    called `patience` times for segments of one shape, the step is recorded as a CUDA graph and replayed. That is done
    for memories whose rows stand in the text and nothing else (`Memory.has_rows_only`), in evaluation mode. On a CPU
    with `compiled` the step is compiled for that shape instead (`torch.compile`, which needs a C++ compiler), for every
    memory: about twice as fast, with other roundings. Everywhere else, and under full attention, each call is a step.
    Both take the weights as they are: change none while a skimmer is in use.
    """

    def __init__(self, model: RecurrentModel, patience: int | None = None, *, compiled: bool = False) -> None:
        on_gpu = next(model.parameters()).is_cuda
        is_fixed = type(model) is RecurrentModel and not model.training
        self._kind: type[_Recorded] | type[_Compiled] | None = None
        if is_fixed and on_gpu and model.memory.has_rows_only:
            self._kind = _Recorded
        elif is_fixed and not on_gpu and compiled:
            self._kind = _Compiled
        usual = PATIENCE_TO_COMPILE if self._kind is _Compiled else PATIENCE
        self._model = model
        self._patience = usual if patience is None else patience
        self._seen: Counter[Hashable] = Counter()
        self._made: dict[Hashable, _Recorded | _Compiled] = {}
        self._last: _Recorded | _Compiled | None = None

    @torch.inference_mode()
    def after(self, tokens: Tensor, state: State, lengths: Tensor | None = None) -> State:
        """The state after one segment of each row: tokens (B, T) int64, lengths (B,) as for `step`.

        What is given back is valid until the next call; `state` may be what the last call gave.
        """
        if self._kind is None or lengths is not None or tokens.shape[1] != self._model.segment_len:
            return self._model.step(tokens, state, lengths)[1]
        if self._last is not None and self._last.fits(tokens, state):
            return self._last.after(tokens, state)
        shape = (tokens.shape, *((leaf.shape, leaf.dtype) for leaf in states.leaves(state)))
        if shape not in self._made:
            self._seen[shape] += 1
            if self._seen[shape] <= self._patience:
                return self._model.step(tokens, state)[1]
            self._made[shape] = self._kind(self._model, tokens, state)
        self._last = self._made[shape]
        return self._last.after(tokens, state)


class _Recorded:
    """One step as a CUDA graph that reads its tokens and state from places of its own, and leaves the state there."""

    def __init__(self, model: RecurrentModel, tokens: Tensor, state: State) -> None:
        self._tokens = tokens.clone()
        self._state = states.tree_map(lambda tensor: tensor.contiguous().clone(), state)
        beside = torch.cuda.Stream(tokens.device)
        beside.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                model.step(self._tokens, self._state)
        torch.cuda.current_stream(tokens.device).wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            _, new = model.step(self._tokens, self._state)
            states.tree_map(Tensor.copy_, self._state, new)

    def fits(self, tokens: Tensor, state: State) -> bool:
        return tokens.shape == self._tokens.shape and (state is self._state or states.are_alike(state, self._state))

    def after(self, tokens: Tensor, state: State) -> State:
        self._tokens.copy_(tokens)
        if state is not self._state:
            states.tree_map(Tensor.copy_, self._state, state)
        self._graph.replay()
        return self._state


class _Compiled:
    """One step compiled for tokens and a state of these shapes, with the weights as constants."""

    def __init__(self, model: RecurrentModel, tokens: Tensor, state: State) -> None:
        self._shape = tokens.shape
        self._like = state
        self._step = torch.compile(partial(_state_after, model), dynamic=False, options={"freezing": True})

    def fits(self, tokens: Tensor, state: State) -> bool:
        return tokens.shape == self._shape and states.are_alike(state, self._like)

    def after(self, tokens: Tensor, state: State) -> State:
        return self._step(tokens, state)


def _state_after(model: RecurrentModel, tokens: Tensor, state: State) -> State:
    return model.step(tokens, state)[1]
