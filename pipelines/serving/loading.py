"""A saved model with its tokenizer."""

from typing import NamedTuple

import rmt_core
from pipelines import storage
from pipelines.config import InputError
from pipelines.data.tokenise import Tokenizer, load_tokenizer


class Loaded(NamedTuple):
    """A model with memory and its tokenizer."""

    model: rmt_core.RecurrentModel
    tokenizer: Tokenizer
    fingerprint: str


def load(uri: str, device: str = "cpu") -> Loaded:
    """The model in a directory on disk or S3, with its tokenizer; InputError where they are not there or do not fit."""
    with storage.local_directory(uri) as directory:
        try:
            model = rmt_core.load(directory, device)
        except Exception as error:  # a damaged file raises whatever its library likes
            raise InputError(f"model {uri} cannot be loaded: {error}") from error
        try:
            tokenizer = load_tokenizer(str(directory))
        except InputError as error:
            raise InputError(f"model {uri} needs its tokenizer beside it: {error}") from error
    vocab_size = model.backbone.lm.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"model {uri} has {vocab_size} token embeddings, its tokenizer {tokenizer.vocab_size} tokens; save the "
            "model with the tokenizer that it was trained with"
        )
    return Loaded(model, tokenizer, rmt_core.fingerprint(model))
