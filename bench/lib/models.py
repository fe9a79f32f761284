"""Models of known shapes with random weights, made on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel

from bench.lib.shapes import TRAINING_SHAPES

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    # Without a window, as from version 0.2 on: with one, generate compiles the step twice and passes a number a layer.
    "mistral-7b": lambda: MistralConfig(sliding_window=None),
    "llama-2-7b": lambda: LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32),
    "tiny": lambda: LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=2,
                                num_attention_heads=4, num_key_value_heads=2),
}  # fmt: skip


def training_config(shape: str) -> LlamaConfig:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = dict(zip((*names, "vocab_size"), TRAINING_SHAPES[shape], strict=True))
    return LlamaConfig(**sizes, tie_word_embeddings=shape.startswith("smollm2"))


def random_model(config: PretrainedConfig, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
