"""Routed experts for a few tokens: a patched block of experts against transformers' own implementations.

    python bench kernels.experts --shape small qwen3-30b-a3b --experts 16 --output bench/results/cpu-NAME/experts.csv
    python bench kernels.experts --device cuda --implementations grouped_mm batched_mm --blocks 3 --repetitions 15 \
        --output bench/results/h100/experts.csv

Blocks are transformers' Qwen3MoeExperts with random weights; "eager", "grouped_mm" and "batched_mm" are its values of
`experts_implementation`. Every call works on another block with routing of its own, so that no cache holds what it
reads. Thresholds are exact quantiles of |act(gate)| of the routed experts. On the CPU all paths take turns within one
repetition. On CUDA a path runs over all blocks at once, as kernels launched one by one ("eager", host time included)
and as a replayed graph ("graph"). Medians, per block. Several tokens on CUDA were measured with ``--sparsity 0.5
--tokens 4 8 16 --most-tokens 64``.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from bench.lib import machine
from bench.lib.command import command
from bench.lib.graphs import Captured
from bench.lib.results import ResultFile
from bench.lib.shapes import DTYPES, EXPERT_SHAPES
from bench.lib.timing import host_seconds, in_turns
from cats_ext import CatsConfig, apply_cats, functional
from cats_ext.thresholds.config import LayerConfig

RunBlock = Callable[[int], Tensor]  # runs block number i


class Blocks:
    """The same weights as dense and as patched experts, with an input and routing for each."""

    def __init__(self, shape: tuple[int, ...], tokens: int, dtype: torch.dtype, device: str, count: int) -> None:
        hidden, intermediate, experts, top_k = shape
        generator, host = torch.Generator(device).manual_seed(0), torch.Generator().manual_seed(0)
        self.shape, self.dense, self.patched, self.inputs = shape, [], [], []
        for _ in range(count):
            block = self._block(shape)
            sizes = {"gate_up_proj": (2 * intermediate, hidden), "down_proj": (hidden, intermediate)}
            for name, (rows, columns) in sizes.items():
                weight = torch.empty(experts, rows, columns, dtype=dtype, device=device)
                setattr(block, name, nn.Parameter(weight.normal_(0, columns**-0.5, generator=generator), False))
            twin = self._block(shape)
            twin.gate_up_proj = block.gate_up_proj
            twin.down_proj = nn.Parameter(block.down_proj.data.clone(), False)
            x = torch.randn(tokens, hidden, generator=generator, device=device).to(dtype)
            chosen = torch.rand(tokens, experts, generator=host).argsort(-1)[:, :top_k].to(device)
            weights = torch.rand(tokens, top_k, generator=generator, device=device).to(dtype)
            self.dense.append(block)
            self.patched.append(apply_cats(nn.Sequential(twin), self._config(torch.zeros(())))[0])
            self.inputs.append((x, chosen, weights))

    @staticmethod
    def _block(shape: tuple[int, ...]) -> Qwen3MoeExperts:
        hidden, intermediate, experts, top_k = shape
        sizes = dict(hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=experts)
        config = Qwen3MoeConfig(**sizes, num_experts_per_tok=top_k)
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            return Qwen3MoeExperts(config).eval()

    def _config(self, threshold: Tensor) -> CatsConfig:
        hidden, intermediate, experts, _ = self.shape
        layers = {"0": LayerConfig(hidden, intermediate, "silu", 0.0, 0.0, experts)}
        return CatsConfig({"0": threshold}, layers, None, 0.0)

    def set_sparsity(self, sparsity: float) -> None:
        for block, (x, chosen, _) in zip(self.patched, self.inputs, strict=True):
            w_gate = block.gate_up_proj[:, : self.shape[1]]
            gates = [w_gate[experts] @ row for row, experts in zip(x, chosen, strict=True)]
            cut = silu(torch.stack(gates).float()).abs().flatten().quantile(sparsity)
            block.threshold.copy_(cut if sparsity else torch.zeros(()))

    def run_dense(self, implementation: str) -> RunBlock:
        def run(i: int) -> Tensor:
            self.dense[i].config._experts_implementation = implementation
            return self.dense[i](*self.inputs[i])

        return run

    def run_patched(self, i: int) -> Tensor:
        return self.patched[i](*self.inputs[i])


def measure_cpu(paths: dict[str, tuple[RunBlock, float | None]], blocks: Blocks, repetitions: int) -> dict[str, float]:
    """Median seconds a block, the paths taking turns."""
    turn = itertools.count()

    def measure(path: tuple[RunBlock, float | None]) -> float:
        run, sparsity = path
        if sparsity is not None:
            blocks.set_sparsity(sparsity)
        block = next(turn) // len(paths) % len(blocks.dense)  # the same for all paths of a turn
        return host_seconds(lambda: run(block))

    taken = in_turns(list(paths.values()), measure, repetitions, warmup=1)
    return {name: statistics.median(times) for name, times in zip(paths, taken, strict=True)}


def measure_cuda(run: RunBlock, count: int, graph: bool, repetitions: int) -> float:
    """Median seconds a block."""

    def every() -> None:
        for i in range(count):
            run(i)

    every()
    replay = Captured(every) if graph else every
    (taken,) = in_turns([replay], host_seconds, repetitions, warmup=1)
    return statistics.median(taken) / count


def bench(
    blocks: Blocks, implementations: list[str], sparsities: list[float], device: str, repetitions: int
) -> list[dict]:
    paths: dict[str, tuple[RunBlock, float | None]] = {name: (blocks.run_dense(name), None) for name in implementations}
    paths |= {f"patched {s:.0%}": (blocks.run_patched, s) for s in sparsities}
    blocks.set_sparsity(0.0)
    want = blocks.run_dense(implementations[0])(0).float()
    assert (blocks.run_patched(0).float() - want).norm() < 0.03 * want.norm()
    if device == "cpu":
        taken = measure_cpu(paths, blocks, repetitions)
        return [{"path": name, "mode": "eager", "us": round(seconds * 1e6, 1)} for name, seconds in taken.items()]
    rows = []
    for name, (run, sparsity) in paths.items():
        if sparsity is not None:
            blocks.set_sparsity(sparsity)
        for mode in ("eager", "graph") if name != "eager" else ("eager",):
            seconds = measure_cuda(run, len(blocks.dense), mode == "graph", repetitions)
            rows.append({"path": name, "mode": mode, "us": round(seconds * 1e6, 1)})
    return rows


@torch.inference_mode()
def main() -> None:
    parser = command(__spec__, __doc__, output="CSV file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", nargs="+", choices=EXPERT_SHAPES, default=["qwen3-30b-a3b", "mixtral-8x7b"])
    parser.add_argument("--experts", type=int, help="experts a block, instead of the shape's, to save memory")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--implementations", nargs="+", default=["eager", "grouped_mm"], help="of transformers")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.0, 0.5, 0.7, 0.9])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--most-tokens", type=int, help="that the sparse kernel takes, instead of the package's limit")
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    if arguments.most_tokens:
        functional.MAX_EXPERT_TOKENS["cuda" if device.startswith("cuda") else "cpu"] = arguments.most_tokens
    results = ResultFile(arguments.output, {"threads": arguments.threads} | machine.facts(device, arguments.commit))
    for shape, dtype, tokens in itertools.product(arguments.shape, arguments.dtype, arguments.tokens):
        hidden, intermediate, experts, top_k = EXPERT_SHAPES[shape]
        experts = arguments.experts or experts
        blocks = Blocks((hidden, intermediate, experts, top_k), tokens, DTYPES[dtype], device, arguments.blocks)
        case = {"shape": shape, "hidden_size": hidden, "intermediate_size": intermediate, "experts": experts}
        case |= {"experts_per_token": top_k, "dtype": dtype, "tokens": tokens}
        for row in bench(blocks, arguments.implementations, arguments.sparsity, device, arguments.repetitions):
            results.add(case | row)
            print(f"{shape}, {dtype}, {tokens} tokens, {row['path']:14}{row['mode']:6}{row['us']:10.1f} us", flush=True)


if __name__ == "__main__":
    main()
