"""Tokens per second and time to first token of whole models, dense and with CATS, in four ways of generating.

    python bench decode.speed --model mistral-7b --output bench/results/h100

Modes: "eager", transformers' generate; "compiled", generate with a static cache and its own torch.compile; "deferred",
that inside cats_ext.deferred_stop(); "captured", cats_ext's DecodeEngine. Shapes get random weights, a directory its
own; thresholds are calibrated on the model at hand, with random tokens and the paper's rule unless --rule names
another. A token's time is the mean from the first of --new-tokens to the last as they arrive on the host, greedy, past
any end-of-text token, and of that the median of --repetitions. What generate takes for a token, and the first token,
depend on the host, whose speed varies from second to second: the dense model is kept beside the patched one, both are
timed in turns, --turns times, and the ratio is the median of the turns'. For the first token there is the ratio of the
least times too. Minima resist jitter of the host, but one fast run decides them. Memory is what torch has allocated:
at rest the weights and what the mode keeps between calls, and the most during a call. With --weights models in packed
rows follow, in captured mode; speedups are over the dense bf16 model where that ran too. With --peer-path
gpt-fast, from a checkout, decodes the same shapes and weights, dense and compiled as its own command does it; its
output layer has the weights of the others, ours int8. Results are appended to decode.csv and first_token.csv as they
come, so that a run can be cut short or done in parts; tables.decode_figure draws the paper's figure 4 from them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import cats_ext
from bench.decode import gpt_fast
from bench.decode.generator import COMPILED, MODES, Generator, allocated_by, read_bytes, weight_bytes
from bench.lib import machine
from bench.lib.command import command
from bench.lib.models import CONFIGS, random_model, random_quantized_model
from bench.lib.read_limit import gpu_read_limit
from bench.lib.results import ResultFile
from bench.lib.timing import in_turns
from cats_ext.rows import FORMATS
from cats_ext.thresholds.rules import RULES

DENSE = "bf16"  # on CUDA; on a CPU float32


def load(name: str, layers: int | None, device: str, weights: str = DENSE) -> PreTrainedModel:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if name not in CONFIGS:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device).eval()
        return model if weights == DENSE else cats_ext.quantize(model, weights, scope="all", progress=False)
    config = CONFIGS[name]()
    config.num_hidden_layers = layers or config.num_hidden_layers
    random = random_model if weights == DENSE else partial(random_quantized_model, name=weights)
    return random(config, dtype, device).eval().requires_grad_(False)


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.started = arguments, time.perf_counter()
        self.device = str(machine.default_device())
        facts = machine.facts(self.device, arguments.commit) | {"transformers": transformers.__version__}
        paths = {name: arguments.output and arguments.output / name for name in ("decode.csv", "first_token.csv")}
        self.files = {name: ResultFile(path, facts, append=True) for name, path in paths.items()}
        self.limit = gpu_read_limit() if self.device == "cuda" else float("nan")
        self.dense: dict[tuple, float] = {}  # seconds a captured token, by model and prompt

    def add(self, name: str, row: dict[str, Any]) -> None:
        print(name, *(f"{key}={value}" for key, value in row.items()), flush=True)
        self.files[name].add(row)

    def out_of_time(self) -> bool:
        return time.perf_counter() - self.started > self.arguments.seconds

    def models(self, name: str) -> None:
        for weights in sorted(self.arguments.weights, key=lambda weights: weights != DENSE):  # speedups are over it
            self.weights = weights
            if weights == DENSE:
                self.model(name)
            else:
                self.quantized(name)
            if self.arguments.peer_path and name in gpt_fast.CONFIGS and weights in gpt_fast.WEIGHTS:
                self.peer(name)

    def peer(self, name: str) -> None:
        arguments, new = self.arguments, self.arguments.new_tokens
        length = max(arguments.prompt) + new
        generate = gpt_fast.GptFast(arguments.peer_path, gpt_fast.CONFIGS[name], self.weights, length, self.device)
        for prompt in arguments.prompt:
            if self.out_of_time():
                return print("out of time", flush=True)
            ids = torch.randint(3, 32000, (1, prompt), device=self.device)
            before = time.perf_counter()
            generate(ids, 4)
            row = {"model": name, "layers": len(generate.model.layers), "mode": "gpt-fast", "weights": self.weights}
            row |= {"prompt": prompt, "new_tokens": new, "rule": "", "sparsity": 0.0, "reached": "", "mlp_share": 1.0}
            row["prepare_s"] = round(time.perf_counter() - before, 2)
            seconds = statistics.median(generate(ids, new) for _ in range(arguments.repetitions))
            row |= {"ms_per_token": round(seconds * 1e3, 4), "tokens_per_s": round(1 / seconds, 2)}
            self.add("decode.csv", row)
        del generate
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()

    def quantized(self, name: str) -> None:
        self.name, model = name, load(name, self.arguments.layers, self.device, self.weights)
        self.captured(model, 0.0)
        self.patch(model)
        self.captured(model, *self.arguments.sparsity)
        del model
        gc.collect()
        torch.cuda.empty_cache()

    def patch(self, model: PreTrainedModel) -> None:
        windows = torch.randint(model.config.vocab_size, (8, 256), device=self.device)
        config = cats_ext.calibrate(model, [windows], sparsity=0.5, rule=self.arguments.rule, progress=False)
        cats_ext.apply_cats(model, config)

    def model(self, name: str) -> None:
        self.name, model = name, load(name, self.arguments.layers, self.device)
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e9:.2f}e9 parameters", flush=True)
        modes, prompts = self.arguments.modes, self.arguments.prompt
        compiled = [mode for mode in modes if mode in COMPILED]
        if "captured" in modes:
            self.captured(model, 0.0)
            gc.collect()  # the engine's graph and cache, which the sparse rows' memory would count
        twin = copy.deepcopy(model) if compiled or "eager" in modes else None
        self.patch(model)
        if "captured" in modes:
            self.captured(model, *self.arguments.sparsity)
        if "eager" in modes:
            self.in_turns("eager", prompts, twin, model)
        # The compiled step attends over the whole static cache: each prompt gets one of its length.
        for prompt in prompts if compiled else ():
            for mode in compiled:
                self.in_turns(mode, [prompt], twin, model)
            torch.compiler.reset()
        del model, twin
        gc.collect()
        torch.cuda.empty_cache()

    def captured(self, model: PreTrainedModel, *sparsities: float) -> None:
        """The captured step at each sparsity; it is made once and follows the thresholds."""
        arguments = self.arguments
        generator = Generator(model, "captured", max(arguments.prompt) + arguments.new_tokens)
        for sparsity in sparsities:
            reached = self.set_sparsity(model, sparsity)
            for prompt in arguments.prompt:
                if self.out_of_time():
                    return print("out of time", flush=True)
                self.speed(generator, sparsity, prompt, reached)

    def set_sparsity(self, model: PreTrainedModel, sparsity: float) -> dict[str, float | str]:
        """What is reached at it, over a prompt of 64 tokens and 16 generated ones.

        The share of neurons that is skipped before up (reached; empty if dense), and the share of the MLPs' bytes that
        is read (mlp_share).
        """
        if not sparsity:
            return {"reached": "", "mlp_share": 1.0}
        cats_ext.set_sparsity(model, sparsity)
        with cats_ext.track_sparsity(model):
            Generator(model, "eager", 0)(self.prompt(model, 64), 17)
            report = cats_ext.sparsity_report(model)
        cats_ext.reset_sparsity(model)
        return {"reached": round(report.up_sparsity, 4), "mlp_share": round(report.bytes_share, 4)}

    def in_turns(self, mode: str, prompts: list[int], dense: PreTrainedModel, sparse: PreTrainedModel) -> None:
        """Tokens of generate, at each sparsity beside the dense model, and with "eager" the first token."""
        if self.out_of_time():
            return print("out of time", flush=True)
        arguments, eager = self.arguments, mode == "eager"
        new, dense_times, dense_memory = arguments.eager_tokens if eager else arguments.new_tokens, {}, {}
        first_prompt = self.prompt(dense, prompts[0])

        def make(model: PreTrainedModel) -> tuple[Generator, float]:
            generator = Generator(model, mode, max(prompts) + new)
            return generator, self.prepare(generator, first_prompt)

        made = [allocated_by(lambda model=model: make(model)) for model in (dense, sparse)]
        generators, prepared = zip(*(result for result, _, _ in made), strict=True)
        at_rest = [weight_bytes(g.model) + kept for g, (_, kept, _) in zip(generators, made, strict=True)]

        def memory(prompt: int) -> list[dict[str, int]]:
            ids = self.prompt(dense, prompt)
            most = [allocated_by(lambda g=generator: g(ids, new))[2] for generator in generators]
            return [{"bytes_at_rest": r, "bytes_peak": r + above} for r, above in zip(at_rest, most, strict=True)]

        def times(prompt: int, turns: int, seconds: Callable[[Generator, Tensor], float]) -> list[list[float]]:
            ids = self.prompt(dense, prompt)
            for generator in generators:
                seconds(generator, ids)
            gc.collect()
            gc.disable()  # as timeit does
            found = in_turns(generators, lambda generator: seconds(generator, ids), turns)
            gc.enable()
            return found

        def ratio(above: list[float], below: list[float]) -> float:
            return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 4)

        for sparsity in arguments.sparsity:
            reached = self.set_sparsity(sparse, sparsity)
            for prompt in prompts:
                if self.out_of_time():
                    break
                taken = memory(prompt)
                before, after = times(prompt, arguments.turns, lambda g, ids: g(ids, new)[1])
                dense_times.setdefault(prompt, []).extend(before)
                dense_memory[prompt] = taken[0]
                row = self.row(generators[1], prompt, new, sparsity, reached, statistics.median(after))
                row |= {"speedup": ratio(before, after), "prepare_s": prepared[1]}
                self.add("decode.csv", row | taken[1])
            for prompt in arguments.first_token if eager else ():
                if self.out_of_time():
                    break
                before, after = times(prompt, arguments.first_token_turns, lambda g, ids: g(ids, 1)[0])
                row = {"model": self.name, "layers": dense.config.num_hidden_layers}
                row |= {"prompt": prompt, "sparsity": sparsity}
                row |= {"dense_ms": round(min(before) * 1e3, 3), "ms": round(min(after) * 1e3, 3)}
                row |= {"of_dense": round(min(after) / min(before), 4), "of_dense_median": ratio(after, before)}
                self.add("first_token.csv", row | {"turns": arguments.first_token_turns})
        for prompt, seconds in dense_times.items():
            row = self.row(generators[0], prompt, new, 0.0, self.set_sparsity(dense, 0.0), statistics.median(seconds))
            self.add("decode.csv", row | {"speedup": 1.0, "prepare_s": prepared[0]} | dense_memory[prompt])
        if self.out_of_time():
            print("out of time", flush=True)

    def prepare(self, generator: Generator, ids: Tensor) -> float:
        """Seconds of a short run; the first one compiles or captures."""
        before = time.perf_counter()
        generator(ids, 4)
        return round(time.perf_counter() - before, 2)

    def prompt(self, model: PreTrainedModel, tokens: int) -> Tensor:
        seeded = torch.Generator().manual_seed(tokens)
        return torch.randint(3, model.config.vocab_size, (1, tokens), generator=seeded).to(self.device)

    def row(
        self, generator: Generator, prompt: int, new: int, sparsity: float, reached: dict[str, Any], seconds: float
    ) -> dict[str, Any]:
        row = {"model": self.name, "layers": generator.model.config.num_hidden_layers, "mode": generator.mode}
        row["weights"] = self.weights
        row |= {"prompt": prompt, "new_tokens": new, "rule": self.arguments.rule if sparsity else ""}
        row |= {"sparsity": sparsity} | reached
        return row | {"ms_per_token": round(seconds * 1e3, 4), "tokens_per_s": round(1 / seconds, 2)}

    def speed(self, generator: Generator, sparsity: float, prompt: int, reached: dict[str, Any]) -> None:
        arguments, model, new = self.arguments, generator.model, self.arguments.new_tokens
        ids = self.prompt(model, prompt)
        prepared = self.prepare(generator, ids)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(generator(ids, new)[1] for _ in range(arguments.repetitions))
        dense = self.dense.setdefault((self.name, prompt), seconds)
        memory = (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) if self.device == "cuda" else (0, 0)
        row = self.row(generator, prompt, new, sparsity, reached, seconds)
        row |= {"speedup": round(dense / seconds, 4), "prepare_s": prepared}
        gb_per_s = read_bytes(model, reached["mlp_share"]) / seconds / 1e9
        row |= {"gb_per_s": round(gb_per_s), "share_of_limit": round(gb_per_s / self.limit, 3)}
        self.add("decode.csv", row | {"bytes_at_rest": memory[0], "bytes_peak": memory[1]})


def main() -> None:
    parser = command(__spec__, __doc__, output="directory for decode.csv and first_token.csv")
    known = ", ".join(CONFIGS)
    parser.add_argument("--model", nargs="+", default=["mistral-7b", "llama-2-7b"], help=f"{known}, a path")
    parser.add_argument("--layers", type=int, help="of random weights: only so many of the model's layers")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.7, 0.9])
    parser.add_argument("--rule", default="plain", choices=RULES)
    parser.add_argument("--weights", nargs="+", choices=(DENSE, *FORMATS), default=[DENSE])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--peer-path", type=Path, help="a checkout of gpt-fast")
    parser.add_argument("--prompt", nargs="+", type=int, default=[64, 1024], help="lengths to decode after")
    parser.add_argument("--first-token", nargs="*", type=int, default=[128, 1024, 4096], help="prompts, in eager mode")
    parser.add_argument("--turns", type=int, default=5, help="of both models, with generate")
    parser.add_argument("--first-token-turns", type=int, default=20, help="of both models, up to the first token")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--eager-tokens", type=int, default=16, help="new tokens in eager mode")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing more after so long")
    bench = Bench(parser.parse_args())
    for name in bench.arguments.model:
        bench.models(name)


if __name__ == "__main__":
    main()
