"""Packed rows (int4, int8, fp8) on a GPU: sparse_mlp_packed against dense int4, int8 and bf16 products of PyTorch.

    python bench kernels.packed --output bench/results/h100/packed.csv

Every path is captured in a CUDA graph over layers of distinct weights, several times the L2 in all; paths take turns,
medians are reported. Thresholds are exact quantiles of |act(gate)| for the x in use; with several tokens a neuron's row
is read if one of them keeps it. "40 / 60 %" has a second threshold, on h: 40 % of the up rows and 60 % of the down rows
are skipped, the bytes of one threshold at 50 %. "int4pack" is torch's tinygemm kernel, groups of 128, compiled with its
activation; "int8" is a product with weights that torch.compile converts as it reads them, one scale a row. From 4
tokens on "product" is packed_matmul, which reads all packed rows, with the mask of the first sparsity between its
products.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lib import machine
from bench.lib.command import command
from bench.lib.graphs import Captured, Run
from bench.lib.layers import kth_threshold
from bench.lib.packed_rows import random_packed
from bench.lib.read_limit import gpu_read_limit
from bench.lib.results import ResultFile
from bench.lib.shapes import SHAPES, parse_shape
from bench.lib.timing import replay_seconds
from cats_ext import ops
from cats_ext.rows import RowFormat
from cats_ext.rows.product import has_product

FORMATS = ["int4_g128", "int4_g128_zp", "int4_g64", "int8_g128", "fp8_e4m3", "int4_g128+int8_g128"]


@dataclass
class Variant:
    """One line of the result file: ``replay`` runs all layers once and reads ``layer_bytes`` of each."""

    path: str
    name: str
    sparsity: float
    layer_bytes: float
    layers: int
    replay: Run


def formats_of(name: str) -> tuple[RowFormat, RowFormat, RowFormat]:
    """``A`` for gate, up and down, or ``A+B``: A for gate and up, B for down."""
    first, _, last = name.partition("+")
    dot = RowFormat.parse(first)
    return dot, dot, RowFormat.parse(last or first)


def packed_variants(name: str, x: Tensor, intermediate: int, sparsities: list[float], count: int) -> Iterator[Variant]:
    hidden, forms = x.shape[-1], formats_of(name)
    layers = [[random_packed(form, intermediate, hidden) for form in forms] for _ in range(count)]
    values = [F.silu(x.float() @ forms[0].unpack(w[0], hidden).t()).abs() for w in layers]
    names = [form.name for form in forms]
    gate, up, down = (form.row_bytes(hidden) for form in forms)
    products = [v * (x.float() @ forms[1].unpack(w[1], hidden).t()).abs() for v, w in zip(values, layers, strict=True)]

    def kept(tests: list[Tensor], thresholds: list[Tensor]) -> float:
        """Rows of a layer that some token keeps, in the mean."""
        return sum(int((v >= t).any(0).sum()) for v, t in zip(tests, thresholds, strict=True)) / count

    for sparsity, offset in [(s, 0.0) for s in sparsities] + [(0.5, 0.1)] * (0.5 in sparsities):
        thresholds = [kth_threshold(v, sparsity - offset) for v in values]
        pairs: list[tuple[Tensor, Tensor | None]] = [(t, None) for t in thresholds]
        up_rows = down_rows = kept(values, thresholds)
        path, title = name, f"{name} {sparsity:.0%}"
        if offset:
            passed = [h.where(v >= t, 0) for h, v, t in zip(products, values, thresholds, strict=True)]
            second = [kth_threshold(h, sparsity + offset) for h in passed]
            pairs, down_rows = list(zip(thresholds, second, strict=True)), kept(passed, second)
            path, title = f"{name} two", f"{name} {sparsity - offset:.0%} / {sparsity + offset:.0%}"

        def run(pairs: list[tuple[Tensor, Tensor | None]] = pairs) -> list[Tensor]:
            return [
                ops.sparse_mlp_packed(x, *w, *names, t, down_threshold=d)
                for w, (t, d) in zip(layers, pairs, strict=True)
            ]

        read = intermediate * gate + up_rows * up + down_rows * down
        yield Variant(path, title, sparsity, read, count, Captured(run))
    if not has_product(x) or len(x) < 4:
        return
    thresholds = [kth_threshold(v, sparsities[0]) for v in values]

    def mlp(w: list[Tensor], threshold: Tensor) -> Tensor:
        g, u = (ops.packed_matmul(x, rows, form, hidden) for rows, form in zip(w[:2], names, strict=False))
        h = ops.gated_threshold(g, u, threshold)
        return ops.packed_matmul(h, w[2], names[2], hidden, True)

    replay = Captured(lambda: [mlp(w, t) for w, t in zip(layers, thresholds, strict=True)])
    read = intermediate * (gate + up + down)
    yield Variant(f"{name} product", f"{name}, packed_matmul", sparsities[0], read, count, replay)


def int4pack_layer(intermediate: int, hidden: int) -> list[tuple[Tensor, Tensor]]:
    layer = []
    for n, k in ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate)):
        q = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        scales = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16) * 0.01
        layer.append((torch._convert_weight_to_int4pack(q, 8), scales))
    return layer


def dense_variants(x: Tensor, intermediate: int, count: int) -> Iterator[Variant]:
    hidden = x.shape[-1]

    def over(layers: list, product: Callable[..., Tensor]) -> Run:
        def mlp(x: Tensor, gate: object, up: object, down: object) -> Tensor:
            return product(F.silu(product(x, gate)) * product(x, up), down)

        compiled = torch.compile(mlp, dynamic=False, options={"coordinate_descent_tuning": True})
        return Captured(lambda: [compiled(x, *layer) for layer in layers])

    weights = 3 * hidden * intermediate
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    int4 = [int4pack_layer(intermediate, hidden) for _ in range(count)]
    replay = over(int4, lambda a, w: torch._weight_int4pack_mm(a, w[0], 128, w[1]))
    yield Variant("int4pack", "int4pack, dense", 0.0, weights * (0.5 + 4 / 128), count, replay)

    def int8_weight(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        q = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device="cuda")
        return q, torch.rand(rows, device="cuda", dtype=x.dtype)

    int8 = [[int8_weight(*shape) for shape in shapes] for _ in range(count)]
    replay = over(int8, lambda a, w: F.linear(a, w[0].to(a.dtype)) * w[1])
    yield Variant("int8", "int8, dense, compiled", 0.0, weights, count, replay)
    bf16 = [[torch.randn(shape, device="cuda", dtype=x.dtype) for shape in shapes] for _ in range(3)]
    yield Variant("bf16", "bf16, dense, compiled", 0.0, 2 * weights, len(bf16), over(bf16, F.linear))


@torch.inference_mode()
def bench(shape: str, tokens: int, arguments: argparse.Namespace) -> Iterator[dict]:
    hidden, intermediate = parse_shape(shape)
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    limit = gpu_read_limit()
    for name in ["dense", *arguments.format]:
        if name == "dense":
            variants = list(dense_variants(x, intermediate, arguments.layers))
        else:
            variants = list(packed_variants(name, x, intermediate, arguments.sparsity, arguments.layers))
        seconds = replay_seconds([v.replay for v in variants], arguments.repetitions)
        for v, total in zip(variants, seconds, strict=True):
            us = total / v.layers * 1e6
            gb_per_s = v.layer_bytes / us / 1e3
            yield {
                "shape": shape,
                "hidden_size": hidden,
                "intermediate_size": intermediate,
                "tokens": tokens,
                "path": v.path,
                "variant": v.name,
                "sparsity": v.sparsity,
                "us": round(us, 2),
                "limit_us": round(v.layer_bytes / limit / 1e3, 2),
                "read_limit_gb_per_s": round(limit),
                "share_of_limit": round(gb_per_s / limit, 3),
                "layers": v.layers,
            }
        del variants


def main() -> None:
    parser = command(__spec__, __doc__, output="CSV file")
    parser.add_argument("--shape", nargs="+", default=["mistral-7b"], help=f"HxI or {', '.join(SHAPES)}")
    parser.add_argument("--format", nargs="+", default=FORMATS, help="of all rows, or of gate and up + down")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.0, 0.5, 0.7, 0.9])
    parser.add_argument("--layers", type=int, default=12, help="of distinct weights")
    parser.add_argument("--repetitions", type=int, default=50)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    facts = machine.facts("cuda", arguments.commit)
    machine.print_facts(facts)
    results = ResultFile(arguments.output, facts)
    for shape, tokens in itertools.product(arguments.shape, arguments.tokens):
        for row in bench(shape, tokens, arguments):
            results.add(row)
            times = f"{row['us']:8.2f} us, its bytes alone {row['limit_us']:6.2f} us"
            print(f"{shape:12} {tokens} tokens  {row['variant']:28} {times}", flush=True)
        torch.compiler.reset()


if __name__ == "__main__":
    main()
