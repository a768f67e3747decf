"""How many bytes of tensors are alive, counted at every operation, on any device and of tensors without numbers."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within its block, the bytes of the storages that operations of this thread have made and that are still alive.

    What was made before the block and what libraries hold outside of tensors is not counted. An operation's inputs are
    held until it is done, so that peaks can come out some percent high. On CPUs backward passes run in the thread that
    calls them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self.peak_bytes = 0
        self._known: set[StorageWeakRef] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._see(tensor, is_made=False)  # so that views of what was there before are not taken for new
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self._see(tensor, is_made=True)
        return out

    def _see(self, tensor: Any, *, is_made: bool) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference in self._known:
            return
        self._known.add(reference)
        size = storage.nbytes() if is_made else 0
        weakref.finalize(storage, self._forget, reference, size)
        self.num_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)

    def _forget(self, reference: StorageWeakRef, size: int) -> None:
        self._known.discard(reference)
        self.num_bytes -= size
