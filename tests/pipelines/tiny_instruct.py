"""A tiny instruct model with random weights as a Hugging Face directory, for tests."""

from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from pipelines.data.tokenise import ByteTokenizer

END = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKS = ["<|user|>", END, "<|assistant|>"]


def save(directory: Path, *, chat: bool = True, context_len: int = 1024, seed: int = 0) -> str:
    """Its tokens are bytes and three special ones."""
    ByteTokenizer().save_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.split_special_tokens = False
    if chat:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=context_len,
        initializer_range=0.5,  # so large that what is written depends on what was read
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        bos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, eos_token_id=config.eos_token_id
    )  # which a job must not take over
    model.save_pretrained(directory)
    return str(directory)
