"""A tiny random model and its tokenizer in a directory, as from_pretrained expects them."""

from __future__ import annotations

from pathlib import Path

from support.models import tiny_model
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast


def save_tiny_model(directory: Path, family: str = "llama", seed: int = 0) -> None:
    """Save a model of ``family`` whose tokens are the ASCII characters, with two special tokens in use."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(i): i for i in range(3, 128)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tiny_model(family, seed=seed).save_pretrained(directory)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(directory)
