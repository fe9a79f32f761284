"""Which way an MLP of packed rows is quickest at how many tokens, and what prompts take.

    python bench kernels.packed_tokens --output bench/results/h200/packed_tokens.csv

MAX_PACKED_TOKENS, MAX_PACKED_BEFORE_PRODUCT and MAX_PRODUCT_TOKENS come from it. An MLP of packed rows as a patched
model computes it for few tokens ("kernel"), for more ("product": packed_matmul with the rows as they are, where there
is one) and for many ("unpacked": each matrix is unpacked into the dtype of x and multiplied), with the mask between the
products, beside the dense MLP of the same shape in the
dtype of x ("dense": eager, so SiLU and product are two kernels). On a GPU each is a CUDA graph over layers of distinct
weights; they take turns, and medians are reported. Thresholds are exact quantiles for the x in use; tokens are
independent.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lib import machine
from bench.lib.command import command
from bench.lib.graphs import Captured, Run
from bench.lib.layers import kth_threshold, random_rows
from bench.lib.packed_rows import random_packed
from bench.lib.results import ResultFile
from bench.lib.timing import host_seconds, in_turns, replay_seconds
from cats_ext import ops
from cats_ext.rows import RowFormat
from cats_ext.rows.product import has_product


@torch.inference_mode()
def bench(arguments: argparse.Namespace, form: RowFormat, tokens: int, device: str, file: ResultFile) -> None:
    hidden, intermediate = arguments.shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    packed = [[random_packed(form, intermediate, hidden, device) for _ in range(3)] for _ in range(arguments.layers)]
    plain = [[random_rows(intermediate, hidden, dtype, device) for _ in range(3)] for _ in range(arguments.layers)]
    gates = [F.silu(F.linear(x, form.unpack(layer[0], hidden, dtype)).float()).abs() for layer in packed]
    thresholds = [kth_threshold(v, arguments.sparsity) for v in gates]
    del gates

    def kernel(layer: list[Tensor], threshold: Tensor) -> Tensor:
        return ops.sparse_mlp_packed(x, *layer, *[form.name] * 3, threshold)

    def product(layer: list[Tensor], threshold: Tensor) -> Tensor:
        gate, up = (ops.packed_matmul(x, rows, form.name, hidden) for rows in layer[:2])
        h = torch.ops.cats.gated_threshold(gate, up, threshold, None, "silu")
        return ops.packed_matmul(h, layer[2], form.name, hidden, True)

    def unpacked(layer: list[Tensor], threshold: Tensor) -> Tensor:
        gate, up = (F.linear(x, form.unpack(rows, hidden, dtype)) for rows in layer[:2])
        h = torch.ops.cats.gated_threshold(gate, up, threshold, None, "silu")
        return h @ form.unpack(layer[2], hidden, dtype)

    def dense(layer: list[Tensor]) -> Tensor:
        return (F.silu(F.linear(x, layer[0])) * F.linear(x, layer[1])) @ layer[2]

    pairs = list(zip(packed, thresholds, strict=True))
    runs: dict[str, Run] = {
        "dense": lambda: [dense(layer) for layer in plain],
        "unpacked": lambda: [unpacked(*pair) for pair in pairs],
    }
    if has_product(x):
        runs["product"] = lambda: [product(*pair) for pair in pairs]
    if tokens <= arguments.kernel_tokens:
        runs["kernel"] = lambda: [kernel(*pair) for pair in pairs]
    expected = unpacked(*pairs[0]).float()
    for path in (product, kernel):
        if path.__name__ in runs:
            error = float((path(*pairs[0]).float() - expected).norm() / expected.norm())
            if not error < 0.2:  # neurons at the threshold differ
                raise RuntimeError(f"{form.name}, {tokens} tokens: {path.__name__} and unpacked differ by {error:.2g}")
    if device == "cuda":
        times = replay_seconds([Captured(run) for run in runs.values()], arguments.repetitions)
    else:
        turns = in_turns(list(runs.values()), host_seconds, arguments.repetitions, warmup=1)
        times = [statistics.median(found) for found in turns]
    seconds = dict(zip(runs, times, strict=True))
    for path, total in seconds.items():
        row = {"hidden_size": hidden, "intermediate_size": intermediate, "format": form.name, "tokens": tokens}
        row |= {"path": path, "sparsity": arguments.sparsity if path != "dense" else 0.0}
        row |= {"us": total / arguments.layers * 1e6, "of_dense": total / seconds["dense"], "layers": arguments.layers}
        file.add(row)
    found = ", ".join(f"{path} {total / arguments.layers * 1e6:.1f} us" for path, total in seconds.items())
    print(f"{form.name}, {tokens} tokens: {found}", flush=True)


def main() -> None:
    parser = command(__spec__, __doc__, "CSV file of the results")
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 14336], metavar=("H", "I"))
    parser.add_argument("--format", nargs="+", default=["int4_g128", "int8_g128"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--kernel-tokens", type=int, default=32, help="the most the kernel is timed for")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    device = str(machine.default_device())
    facts = machine.facts(device, arguments.commit)
    machine.print_facts(facts)
    file = ResultFile(arguments.output, facts, digits=4)
    for name in arguments.format:
        for tokens in arguments.tokens:
            bench(arguments, RowFormat.parse(name), tokens, device, file)


if __name__ == "__main__":
    main()
