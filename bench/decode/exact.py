"""Tokens per second of whole models that are sparse by themselves, as they are and with apply_exact.

    python bench decode.exact --output bench/results/h200/decode_exact.csv

Modes as in decode.speed: "compiled" is transformers' generate with a static cache, "captured" DecodeEngine. Weights are
random: Gemma 3n keeps the largest 5 % of any, in 10 of its 35 layers; of a random ReLU half is zero, not the 66 to 99 %
of trained ones. Both models are timed in turns on their own weights, and the speedup is the median of the turns'.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import torch
from transformers import Gemma3nTextConfig, LlamaConfig, PreTrainedConfig

import cats_ext
from bench.decode.generator import Generator
from bench.lib import machine
from bench.lib.command import command
from bench.lib.models import random_model
from bench.lib.results import ResultFile
from bench.lib.timing import in_turns

_SMALL = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma-3n-e4b": Gemma3nTextConfig,
    "llama-2-7b-relu": lambda: LlamaConfig(intermediate_size=11008, hidden_act="relu"),
    "tiny": lambda: LlamaConfig(vocab_size=512, hidden_act="relu", **_SMALL),
}


def main() -> None:
    parser = command(__spec__, __doc__, output="CSV file")
    parser.add_argument("--model", nargs="+", default=["gemma-3n-e4b"], choices=list(MODELS))
    parser.add_argument("--modes", nargs="+", default=["captured", "compiled"], choices=["captured", "compiled"])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    device = str(machine.default_device())
    results = ResultFile(arguments.output, machine.facts(device, arguments.commit))
    for name in arguments.model:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        dense = random_model(MODELS[name](), dtype, device).eval().requires_grad_(False)
        exact = cats_ext.apply_exact(copy.deepcopy(dense))
        ids = torch.randint(3, dense.config.vocab_size, (1, arguments.prompt), device=device)
        with cats_ext.track_sparsity(exact), torch.inference_mode():
            exact(input_ids=ids)
        reached = cats_ext.sparsity_report(exact).down_sparsity
        for mode in arguments.modes:
            made = [Generator(model, mode, arguments.prompt + arguments.new_tokens) for model in (dense, exact)]
            for generator in made:
                generator(ids, 4)
            seconds = in_turns(made, lambda g: g(ids, arguments.new_tokens)[1], arguments.turns)  # noqa: B023
            speedup = statistics.median(a / b for a, b in zip(*seconds, strict=True))
            for path, times in zip(("dense", "exact"), map(statistics.median, seconds), strict=True):
                row = {"model": name, "mode": mode, "path": path, "prompt": arguments.prompt}
                row |= {"new_tokens": arguments.new_tokens, "sparsity": round(reached if path == "exact" else 0.0, 4)}
                row |= {"ms_per_token": round(times * 1e3, 4), "tokens_per_s": round(1 / times, 2)}
                row |= {"speedup": round(speedup if path == "exact" else 1.0, 4)}
                results.add(row)
                print(*(f"{key}={value}" for key, value in row.items()), flush=True)
            torch.compiler.reset()


if __name__ == "__main__":
    main()
