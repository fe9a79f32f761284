"""Models of known shapes with random weights, made on the device."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel

from bench.lib.packed_rows import random_packed
from bench.lib.shapes import TRAINING_SHAPES
from cats_ext.rows import FORMATS, QuantizedLinear

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    # Without a window, as from version 0.2 on: with one, generate compiles the step twice and passes a number a layer.
    "mistral-7b": lambda: MistralConfig(sliding_window=None),
    "llama-2-7b": lambda: LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32),
    "llama-3-8b": lambda: LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                                      num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
    # A small vocabulary: beside the few layers that fit, the whole one would weigh too much.
    "llama-3-70b-layers": lambda: LlamaConfig(vocab_size=8192, hidden_size=8192, intermediate_size=28672,
                                              num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8),
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


def random_quantized_model(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device | str, name: str
) -> PreTrainedModel:
    """As ``random_model``, with packed rows in the format ``name``, and of the output layer in int8.

    The rows are random themselves: no linear layer has dense weights at any time.
    """
    head = next(f"int8_g{size}" for size in (128, 64, 32) if config.hidden_size % size == 0)
    dense = nn.Linear.__init__
    on_meta = lambda self, *sizes, **options: dense(self, *sizes, **options | {"device": "meta"})  # noqa: E731
    with patch.object(nn.Linear, "__init__", on_meta):
        model = random_model(config, dtype, device)
    for path, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear:
            continue
        form = FORMATS[head if path == "lm_head" else name]
        made = QuantizedLinear(
            linear.in_features, linear.out_features, form, input_rows=path.endswith("down_proj"), device="meta"
        )
        rows = random_packed(form, len(made.weight), made.row_width, device)
        made.weight = nn.Parameter(rows, requires_grad=False)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, made)
    return model
