"""Several segment stores read as one, with or without weights."""

from collections.abc import Sequence

import numpy as np

from pipelines.config import InputError, fingerprint
from pipelines.data.books import BookStore
from pipelines.data.plan import Share
from pipelines.data.store import DocumentEntry, SegmentStore
from pipelines.data.tokenise import Tokenizer


class Mixture:
    """The documents of all stores, in the order of the stores. Use one object from one thread.

    With weights, the stores' segments are read in these proportions, and a small store more often than once an epoch;
    without, every document is read once an epoch. Raises InputError for stores that cannot be read together.
    """

    def __init__(self, stores: Sequence[SegmentStore], weights: Sequence[float] | None) -> None:
        self._stores = list(stores)
        _check_alike(self._stores)
        self.segment_len = stores[0].segment_len
        self.tokenizer_fingerprint = stores[0].tokenizer_fingerprint
        self.fingerprint = fingerprint([store.fingerprint for store in stores])
        self.manifest: list[DocumentEntry] = []
        self.shares: list[Share] = []
        for number, store in enumerate(stores):
            begin = len(self.manifest)
            self.manifest += [entry._replace(file=f"{number}/{entry.file}") for entry in store.manifest]
            if weights is not None:
                if not store.manifest:
                    raise InputError(f"{store.uri} has no documents, so that it cannot have a weight; leave it out")
                self.shares.append(Share(range(begin, len(self.manifest)), weights[number]))

    def load_tokenizer(self) -> Tokenizer:
        return self._stores[0].load_tokenizer()

    def read(self, document: DocumentEntry, start: int, stop: int) -> np.ndarray:
        """The tokens of segments start .. stop-1 of a document, joined: (T,) int32, a copy."""
        number, _, file = document.file.partition("/")
        return self._stores[int(number)].read(document._replace(file=file), start, stop)


Store = SegmentStore | Mixture | BookStore  # what training reads


def _check_alike(stores: Sequence[SegmentStore]) -> None:
    first = stores[0]
    for store in stores[1:]:
        if store.segment_len != first.segment_len:
            raise InputError(
                f"{first.uri} has segments of {first.segment_len} tokens, {store.uri} of {store.segment_len}; "
                "prepare them with the same --segment-len"
            )
        if store.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise InputError(
                f"{first.uri} was made with tokenizer {first.tokenizer_fingerprint[:16]}, {store.uri} with "
                f"{store.tokenizer_fingerprint[:16]}; prepare them with the same --tokenizer"
            )
    uris = [store.uri for store in stores]
    if len(set(uris)) < len(uris):
        twice = next(uri for uri in uris if uris.count(uri) > 1)
        raise InputError(f"{twice} is given twice; give it once, and how much of it is read by dataset.weights")
