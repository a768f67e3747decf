"""A Hugging Face causal language model that follows instructions: prompts in, replies out, many at a time.

A document is put into a prompt as text only: what looks like a special token in it is read as its characters, so that
it cannot end the user's turn.

Axes: B prompts, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

import rmt_core
from pipelines import storage
from pipelines.config import InputError
from pipelines.summarising.documents import DocumentError
from rmt_core.generation import sample

_SLOT = "\ue000{}\ue000"  # of the private use area: stands where text will be put
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
_TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "chat_template*",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)


class Fingerprints(NamedTuple):
    """Of the files of a directory, 64 hexadecimal digits each."""

    model: str
    tokenizer: str


class Reply(NamedTuple):
    """What was written after a prompt."""

    ids: list[int]  # without special tokens
    finish_reason: str  # "stop": the model ended it; "length": all tokens that it may write


class Ask(NamedTuple):
    """A prompt and how it is to be answered."""

    prompt: list[int]
    max_new_tokens: int
    sampling: rmt_core.Sampling
    seed: int


def is_plain(uri: str) -> bool:
    """Whether a directory is one of Hugging Face, not of `rmt_core`; InputError where it holds no model."""
    config = storage.join(storage.absolute(uri), "config.json")
    try:
        value = storage.read_json(config)
    except FileNotFoundError:
        if not storage.is_directory(uri):
            raise InputError(f"model {uri}: there is no such directory") from None
        raise InputError(f"model {uri} has no config.json; give the directory of a model") from None
    except (OSError, ValueError) as error:
        raise InputError(f"model {uri} cannot be loaded: {config} cannot be read: {error}") from error
    return isinstance(value, dict) and "format" not in value


def fingerprints(directory: Path) -> Fingerprints:
    """Of all files that decide what the model writes."""
    return Fingerprints(_digest(directory, _WEIGHTS), _digest(directory, _TOKENIZER))


def _digest(directory: Path, patterns: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


class InstructModel:
    """A model with its tokenizer, loaded from a directory on disk or S3. InputError where it cannot be used."""

    def __init__(self, uri: str, device: str = "cpu") -> None:
        with storage.local_directory(uri) as directory:
            self.fingerprints = fingerprints(directory)
            self.tokenizer = _load_tokenizer(uri, directory)
            self.model = _load_model(uri, directory, device)
        self.context_len = _context_len(uri, self.model.config)
        self.device = torch.device(device)
        self._special = frozenset(self.tokenizer.all_special_ids)
        self._generation = _generation_config(self.model, self.tokenizer)
        self.model.generation_config = transformers.GenerationConfig()  # generate takes from it what ours leaves open

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """(ids of plain text, the character at which each begins)."""
        found = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        return found["input_ids"], [start for start, _ in found["offset_mapping"]]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def frame(self, message: Sequence[str]) -> list[list[int]]:
        """The ids of a prompt around the texts that are put between the parts of a user's message."""
        slots = [_SLOT.format(n) for n in range(len(message) - 1)]
        content = "".join(part for pair in zip(message, [*slots, ""], strict=True) for part in pair)
        bos: list[int] = []
        if self.tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": content}]
            content = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        elif self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]:
            bos = [self.tokenizer.bos_token_id]
        parts = []
        for slot in slots:
            part, found, content = content.partition(slot)
            if not found:
                raise InputError("the chat template of the model's tokenizer does not keep the user's message whole")
            parts.append(part)
        encoded = [self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in [*parts, content]]
        return [bos + encoded[0], *encoded[1:]]

    @torch.inference_mode()
    def generate(self, asks: Sequence[Ask]) -> list[Reply]:
        """A reply to each, all with the same `max_new_tokens`; DocumentError where values are not finite."""
        longest = max(len(ask.prompt) for ask in asks)
        padding = self._generation.pad_token_id
        tokens = torch.tensor([[padding] * (longest - len(ask.prompt)) + ask.prompt for ask in asks])
        mask = torch.tensor([[0] * (longest - len(ask.prompt)) + [1] * len(ask.prompt) for ask in asks])
        (max_new_tokens,) = {ask.max_new_tokens for ask in asks}
        self._generation.max_new_tokens = max_new_tokens
        written = self.model.generate(
            tokens.to(self.device),
            attention_mask=mask.to(self.device),
            generation_config=self._generation,
            logits_processor=transformers.LogitsProcessorList([_Draw(asks)]),
        )
        return [self._reply(row) for row in written[:, longest:].tolist()]

    def _reply(self, row: list[int]) -> Reply:
        ends = self._generation.eos_token_id or ()
        length = next((n for n, token in enumerate(row) if token in ends), None)
        kept = [token for token in row[:length] if token not in self._special]
        return Reply(kept, "length" if length is None else "stop")


class _Draw(transformers.LogitsProcessor):
    """Leaves one token a row: each prompt draws from its own random numbers, whoever stands beside it."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        self._samplings = [ask.sampling for ask in asks]
        self._generators = [torch.Generator().manual_seed(ask.seed) for ask in asks]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool(torch.isfinite(scores.max(-1).values).all()):  # NaN is the maximum of a row that has one
            raise DocumentError("the model's values are not finite")
        rows = zip(scores, self._samplings, self._generators, strict=True)
        chosen = torch.cat([sample(row[None], sampling, [draw]) for row, sampling, draw in rows])
        only = torch.full_like(scores, float("-inf"))
        return only.scatter(1, chosen[:, None].to(scores.device), 0.0)


def _load_tokenizer(uri: str, directory: Path) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # a damaged file raises whatever its library likes
        raise InputError(f"model {uri} needs its tokenizer beside it: {error}") from error
    if not tokenizer.is_fast:
        raise InputError(f"model {uri}: its tokenizer has no tokenizer.json; save it once with save_pretrained")
    return tokenizer


def _load_model(uri: str, directory: Path, device: str) -> Any:
    """In float32 on a CPU, else in the type that it was saved in."""
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        if config.is_encoder_decoder:
            raise InputError(f"model {uri} is an encoder-decoder ({config.model_type}); give a causal language model")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32 if device == "cpu" else "auto",
        )
    except InputError:
        raise
    except Exception as error:  # a damaged file raises whatever its library likes
        raise InputError(f"model {uri} cannot be loaded: {error}") from error
    return model.to(device).eval()


def _context_len(uri: str, config: Any) -> int:
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        raise InputError(f"model {uri}: its config.json does not say how many positions it has")
    return length


def _generation_config(model: Any, tokenizer: Any) -> transformers.GenerationConfig:
    """Nothing but where a reply ends: how tokens are drawn is said by the job, not by the model's directory."""
    given = model.generation_config.eos_token_id
    ends = list(given) if isinstance(given, list) else [given]
    ends = [end for end in dict.fromkeys([*ends, tokenizer.eos_token_id]) if end is not None]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    return transformers.GenerationConfig(do_sample=False, eos_token_id=ends or None, pad_token_id=padding)
