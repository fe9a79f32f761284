"""Tiny random models of the supported families, and text for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
)

VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS = 128, 64, 176, 3

_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=INTERMEDIATE,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama-bias": lambda: LlamaConfig(**_SIZES, mlp_bias=True),
    "llama-relu": lambda: LlamaConfig(**_SIZES, hidden_act="relu"),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=32),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "gemma2": lambda: Gemma2Config(**_SIZES, head_dim=16),
    "gemma3": lambda: Gemma3TextConfig(**_SIZES, head_dim=16),
    "phi3": lambda: Phi3Config(**_SIZES),
}


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A random model in eval mode. Weights are wide enough for activations of order one, as in real models."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name and parameter.dim() == 2:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
            elif "_proj" in name:
                parameter.normal_(0, 0.5)
    return model.to(dtype).eval()


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """``count`` random token ids, none of them special."""
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


class CharacterTokenizer:
    """One token per character; with ``bos`` every encoded text starts with token 1, as Llama's and Gemma's do."""

    def __init__(self, bos: bool = False) -> None:
        self.bos = bos
        self.bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        start = [self.bos_token_id] if self.bos and add_special_tokens else []
        return {"input_ids": start + [3 + ord(c) % (VOCABULARY - 3) for c in text]}
