"""Decoding with gpt-fast (github.com/meta-pytorch/gpt-fast) from a checkout, on random weights of a model's shape."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bench.lib.timing import synchronize

CONFIGS = {"mistral-7b": "Mistral-7B", "llama-2-7b": "7B", "llama-3-8b": "llama-3-8b"}
WEIGHTS = {"bf16": None, "int4_g128": 128, "int4_g64": 64, "int4_g32": 32}  # group sizes


def load(path: Path) -> ModuleType:
    """Its ``generate`` module. Its tokenizers, which need packages of their own, are left out."""
    if not (path / "generate.py").is_file():
        raise ValueError(f"--peer-path {path}: there is no generate.py, so it is no checkout of gpt-fast")
    tokenizer: Any = ModuleType("tokenizer")
    tokenizer.get_tokenizer = None
    sys.modules.setdefault("tokenizer", tokenizer)
    if str(path) not in sys.path:
        sys.path.append(str(path))
    return importlib.import_module("generate")


class GptFast:
    """Its model and its compiled step, as ``generate.py --compile`` makes them; all of it is int4 or none."""

    def __init__(self, path: Path, config: str | dict[str, Any], weights: str, length: int, device: str) -> None:
        self._module, self.device = load(path), device
        transformer = self._module.Transformer
        arguments = sys.modules["model"].ModelArgs
        args = arguments.from_name(config) if isinstance(config, str) else arguments(**config)
        with torch.device("meta"):
            model = transformer(args).to(torch.bfloat16)
            if WEIGHTS[weights] is not None:
                quantize = importlib.import_module("quantize")
                quantize.WeightOnlyInt4QuantHandler(model, groupsize=WEIGHTS[weights]).convert_for_runtime()
        self.model = model.to_empty(device=device).eval()
        _fill(self.model)
        with torch.device(device):
            self.model.setup_caches(max_batch_size=1, max_seq_length=length)
        step = self._module.__dict__.setdefault("plain_step", self._module.decode_one_token)
        self._step = step if device == "cpu" else torch.compile(step, mode="reduce-overhead", fullgraph=True)

    @torch.no_grad()
    def __call__(self, ids: Tensor, new_tokens: int) -> float:
        """Seconds from each of ``new_tokens`` to the next, after the prompt ``ids`` ``[1, T]``."""
        module, count = self._module, ids.shape[1]
        module.decode_one_token = self._step
        token = module.prefill(self.model, ids, torch.arange(count, device=self.device), temperature=0.0)
        begin = 0.0

        def arrived(_: Tensor) -> None:
            nonlocal begin
            if not begin:
                synchronize()
                begin = time.perf_counter()

        position = torch.tensor([count], device=self.device)
        module.decode_n_tokens(self.model, token.view(1, -1), position, new_tokens, callback=arrived, temperature=0.0)
        synchronize()
        return (time.perf_counter() - begin) / (new_tokens - 1)


def _fill(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.int32:
            tensor.random_(-(2**31), 2**31 - 1)
        elif tensor.dim() > 1:
            tensor.data.normal_(0, 0.02 if tensor.dim() == 2 else 0.001)
        else:
            tensor.data.fill_(1.0)
