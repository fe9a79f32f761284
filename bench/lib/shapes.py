"""Shapes and dtypes by name."""

from __future__ import annotations

import torch

from cats_ext.cli.op_benchmark import SHAPES, parse_shape

__all__ = ["DTYPES", "EXPERT_SHAPES", "SHAPES", "TRAINING_SHAPES", "parse_shape"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# hidden size, intermediate size, experts, experts a token
EXPERT_SHAPES = {
    "small": (1024, 3584, 8, 2),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "tiny": (64, 40, 4, 2),
}
# hidden size, intermediate size, layers, heads, key-value heads, vocabulary
TRAINING_SHAPES = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "mistral-7b, 2 layers": (4096, 14336, 2, 32, 8, 32000),
    "tiny": (64, 172, 2, 4, 2, 512),
}
