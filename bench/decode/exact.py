"""Tokens per second of whole models that are sparse by themselves, as they are and with apply_exact.

    python bench decode.exact --output bench/results/h200/decode_exact.csv

Modes as in decode.speed: "compiled" is transformers' generate with a static cache, "captured" DecodeEngine. Weights are
random: Gemma 3n keeps the largest 5 % of any, in 10 of its 35 layers; of a random ReLU half is zero, not the 66 to 99 %
of trained ones. To compile all of Gemma 3n takes minutes: "gemma-3n-e4b-7" has a fifth of its layers, two of them
sparse. Each model is in a process of its own, so that both compile at the same time; then they are timed in turns, and
the speedup is the median of the turns'.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

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
# The released models have embeddings of 262,400 tokens, of each layer only of 262,144: the others stand for images and
# sound, and a random model would write them.
_VOCABULARY = dict(vocab_size=262144, vocab_size_per_layer_input=262144)
_PATTERN = ["sliding_attention"] * 4 + ["full_attention"]
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma-3n-e4b": lambda: Gemma3nTextConfig(**_VOCABULARY),
    "gemma-3n-e2b": lambda: Gemma3nTextConfig(
        num_hidden_layers=30, intermediate_size=8192, num_kv_shared_layers=10, **_VOCABULARY
    ),
    "gemma-3n-e4b-7": lambda: Gemma3nTextConfig(
        num_hidden_layers=7,
        layer_types=[*_PATTERN, *_PATTERN[-2:]],
        activation_sparsity_pattern=[0.95] * 2 + [0.0] * 5,
        num_kv_shared_layers=0,
        **_VOCABULARY,
    ),
    "llama-2-7b-relu": lambda: LlamaConfig(intermediate_size=11008, hidden_act="relu"),
    "tiny": lambda: LlamaConfig(vocab_size=512, hidden_act="relu", **_SMALL),
    "tiny-gemma-3n": lambda: Gemma3nTextConfig(
        vocab_size=512, vocab_size_per_layer_input=512, hidden_size_per_layer_input=16, head_dim=16, laurel_rank=8,
        layer_types=_PATTERN[-2:], activation_sparsity_pattern=[0.95, 0.0], num_kv_shared_layers=0, **_SMALL
    ),
}  # fmt: skip
PATHS = ("dense", "exact")


def serve(connection: Connection, name: str, path: str, prompt: int, new_tokens: int) -> None:
    """Sends the share of neurons skipped; then for each (mode, tokens) received the seconds a token, until None."""
    device = machine.default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(MODELS[name](), dtype, device).eval().requires_grad_(False)
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), device=device)
    reached = 0.0
    if path == "exact":
        with cats_ext.track_sparsity(cats_ext.apply_exact(model)), torch.inference_mode():
            model(input_ids=ids)
        reached = cats_ext.sparsity_report(model).down_sparsity
    connection.send(reached)
    generators: dict[str, Generator] = {}
    for mode, count in iter(connection.recv, None):
        if mode not in generators:
            generators[mode] = Generator(model, mode, prompt + new_tokens)
        connection.send(generators[mode](ids, count)[1])


def seconds_a_token(connection: Connection, mode: str, new_tokens: int) -> float:
    connection.send((mode, new_tokens))
    return connection.recv()


def start(name: str, prompt: int, new_tokens: int) -> list[Connection]:
    """A process for each of PATHS, and the connection to it."""
    context, connections = multiprocessing.get_context("spawn"), []
    for path in PATHS:
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, name, path, prompt, new_tokens), daemon=True)
        process.start()
        there.close()  # so that recv ends when the process does
        connections.append(here)
    return connections


def bench(name: str, modes: list[str], prompt: int, new_tokens: int, turns: int, add: Callable[[dict], Any]) -> None:
    connections = start(name, prompt, new_tokens)
    reached = [connection.recv() for connection in connections]
    for mode in modes:
        for connection in connections:
            connection.send((mode, 4))
        for connection in connections:
            connection.recv()
        measure = partial(seconds_a_token, mode=mode, new_tokens=new_tokens)
        seconds = in_turns(connections, measure, turns, warmup=1)
        speedups = [1.0, statistics.median(a / b for a, b in zip(*seconds, strict=True))]
        for path, times, sparsity, speedup in zip(PATHS, seconds, reached, speedups, strict=True):
            took = statistics.median(times)
            row = {"model": name, "mode": mode, "path": path, "prompt": prompt, "new_tokens": new_tokens}
            row |= {"sparsity": round(sparsity, 4), "ms_per_token": round(took * 1e3, 4)}
            row |= {"tokens_per_s": round(1 / took, 2), "speedup": round(speedup, 4)}
            add(row)
            print(*(f"{key}={value}" for key, value in row.items()), flush=True)
    for connection in connections:
        connection.send(None)


def main() -> None:
    parser = command(__spec__, __doc__, output="CSV file")
    parser.add_argument("--model", nargs="+", default=["gemma-3n-e4b"], choices=list(MODELS))
    parser.add_argument("--modes", nargs="+", default=["captured", "compiled"], choices=["captured", "compiled"])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--append", action="store_true", help="continue the file")
    arguments = parser.parse_args()
    facts = machine.facts(machine.default_device(), arguments.commit)
    results = ResultFile(arguments.output, facts, append=arguments.append)
    for name in arguments.model:
        bench(name, arguments.modes, arguments.prompt, arguments.new_tokens, arguments.turns, results.add)


if __name__ == "__main__":
    main()
