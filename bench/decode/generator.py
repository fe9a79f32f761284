"""Ways of generating, with the times at which tokens arrive on the host and the memory that they take."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import cats_ext
from bench.lib.timing import synchronize
from cats_ext.decode.cache import cache_argument
from cats_ext.decode.engine import DecodeEngine
from cats_ext.patching.detection import MERGED, SEPARATE
from cats_ext.rows import QuantizedLinear

COMPILED = ("compiled", "deferred")
MODES = ("eager", *COMPILED, "captured")


class Generator:
    """One mode of generating, with the cache that it keeps between calls."""

    def __init__(self, model: PreTrainedModel, mode: str, length: int) -> None:
        self.model, self.mode = model, mode
        self.engine = DecodeEngine(model, max_length=length) if mode == "captured" else None
        self.cache = None
        if mode in COMPILED:
            self.cache = transformers.StaticCache(config=model.config, max_cache_len=length)

    def __call__(self, ids: Tensor, new_tokens: int) -> tuple[float, float]:
        """Seconds to the first token, and from each of ``new_tokens`` to the next, greedily."""
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        options["eos_token_id"] = self.model.config.vocab_size  # no token
        options["streamer"] = arrivals = Arrivals()
        synchronize()
        start = time.perf_counter()
        if self.engine is not None:
            self.engine.generate(ids, **options)
        else:
            if self.cache is not None:
                self.cache.reset()
                options[cache_argument(self.model)] = self.cache
            with cats_ext.deferred_stop() if self.mode == "deferred" else contextlib.nullcontext():
                self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        _, first, *later = arrivals.times  # before them the prompt
        return first - start, (later[-1] - first) / len(later) if later else float("nan")


class Arrivals:
    """A streamer that remembers when tokens arrived."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def weight_bytes(model: PreTrainedModel) -> int:
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def read_bytes(model: PreTrainedModel, mlp_share: float = 1.0) -> float:
    """Bytes of weights that a step reads, if it reads this share of those of the MLPs."""
    read = 0.0
    for path, linear in model.named_modules():
        if isinstance(linear, nn.Linear | QuantizedLinear):
            in_mlp = path.rpartition(".")[2] in (*SEPARATE, *MERGED)
            read += linear.weight.nbytes * (mlp_share if in_mlp else 1.0)
    return read


def allocated_by(act: Callable[[], Any]) -> tuple[Any, int, int]:
    """What ``act`` returns, the bytes that torch has allocated on the GPU since, and the most there were meanwhile."""
    if not torch.cuda.is_available():
        return act(), 0, 0

    def settled() -> int:
        synchronize()
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # 34 MB that belong to neither model
        return torch.cuda.memory_allocated()

    before = settled()
    torch.cuda.reset_peak_memory_stats()
    result = act()
    most = torch.cuda.max_memory_allocated()
    return result, settled() - before, most - before
