"""Reading on where nothing is asked: only the state is wanted, segment after segment, millions of times.

Axes: B rows, T tokens of a segment.
"""

import torch
from torch import Tensor

from . import state as states
from .recurrent import RecurrentModel
from .state import State

_WARM_UP = 3  # runs before a graph is recorded: kernels are chosen and workspaces made in them


class Skimmer:
    """The state after further segments, as `model.step` gives it, without hidden states.

    A small model's step keeps a GPU busy for less time than a CPU needs to launch it. So there, once `after` has been
    called `patience` times for segments of one shape, the step is recorded as a CUDA graph and replayed. That is done
    for memories whose rows stand in the text and nothing else (`Memory.has_rows_only`), in evaluation mode; everywhere
    else, and under full attention, each call is a step. Recording copies weights' addresses: change no weights while a
    skimmer is in use.
    """

    def __init__(self, model: RecurrentModel, patience: int = 64) -> None:
        self._model = model
        self._patience = patience
        self._seen = 0
        self._recorded: _Recorded | None = None
        on_gpu = next(model.parameters()).is_cuda
        is_segmented = type(model) is RecurrentModel
        self._may_record = on_gpu and is_segmented and model.memory.has_rows_only and not model.training

    @torch.inference_mode()
    def after(self, tokens: Tensor, state: State, lengths: Tensor | None = None) -> State:
        """The state after one segment of each row: tokens (B, T) int64, lengths (B,) as for `step`.

        What is given back is valid until the next call; `state` may be what the last call gave.
        """
        if not self._may_record or lengths is not None or tokens.shape[1] != self._model.segment_len:
            return self._model.step(tokens, state, lengths)[1]
        if self._recorded is not None and self._recorded.fits(tokens, state):
            return self._recorded.replay(tokens, state)
        self._seen += 1
        if self._seen > self._patience:
            self._recorded = _Recorded(self._model, tokens, state)
            return self._recorded.replay(tokens, state)
        return self._model.step(tokens, state)[1]


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

    def replay(self, tokens: Tensor, state: State) -> State:
        self._tokens.copy_(tokens)
        if state is not self._state:
            states.tree_map(Tensor.copy_, self._state, state)
        self._graph.replay()
        return self._state
