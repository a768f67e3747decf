"""What has been read before: the memory at each segment boundary of past documents, found by the tokens up to there.

A boundary's key is `h_i = SHA-256(h_{i-1} | tokens of segment i)`, from `h_0 = HMAC-SHA-256(server key, model |
tenant)`. So a key stands for all tokens from the document's first on, one tenant's keys tell nothing of another's, and
nobody without the server's key can make one.
"""

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from rmt_core.state import State, leaves

_ENTRY_BYTES, _TENSOR_BYTES = 384, 960  # of an entry beside its tensors, and of a tensor beside its numbers, about


class Boundary(NamedTuple):
    """A reader at the end of a segment."""

    state: State  # one row
    hidden: Tensor  # (1, D) at the segment's last token

    @property
    def num_bytes(self) -> int:
        tensors = [*leaves(self.state), self.hidden]
        return sum(tensor.nbytes + _TENSOR_BYTES for tensor in tensors) + _ENTRY_BYTES


def first_key(server_key: bytes, fingerprint: str, tenant: str) -> bytes:
    """The key of a document of which nothing has been read."""
    return hmac.digest(server_key, f"{fingerprint} {tenant}".encode(), "sha256")


def next_key(key: bytes, tokens: Sequence[int]) -> bytes:
    """The key after a further segment."""
    return hashlib.sha256(key + np.asarray(tokens, dtype="<i8").tobytes()).digest()


class PrefixCache:
    """Boundaries by key, of at most `max_bytes` together; the longest unused goes first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[bytes, Boundary] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: bytes) -> Boundary | None:
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: bytes, boundary: Boundary) -> None:
        if key in self._kept or boundary.num_bytes > self.max_bytes:
            return
        self._kept[key] = boundary
        self.num_bytes += boundary.num_bytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def clear(self) -> None:
        self._kept.clear()
        self.num_bytes = 0
