"""The products of packed rows in a step of decoding, packed_linear_step, against dense products of PyTorch.

    python bench kernels.packed_linear --output bench/results/h200/packed_linear.csv

Shapes are OUTPUTSxINPUTS. Each path is captured in a CUDA graph over distinct weights, several times the L2 in all;
paths of a shape take turns, medians are reported. "norm" normalises its input, and adds the previous block's output to
it; "merge" is the product after an attention over four parts of the keys, with the residual addition. "int4pack" is
torch's tinygemm kernel, groups of 128.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.lib import machine
from bench.lib.command import command
from bench.lib.graphs import Captured, Run
from bench.lib.packed_rows import random_packed
from bench.lib.read_limit import gpu_read_limit
from bench.lib.results import ResultFile
from bench.lib.timing import replay_seconds
from cats_ext import ops
from cats_ext.rows import FORMATS

SHAPES = ("6144x4096", "4096x4096", "32000x4096")
HEAD_DIM, SPLITS = 128, 4
_BYTES = 400e6  # of distinct weights


@dataclass
class Variant:
    path: str
    form: str
    weight_bytes: float
    count: int
    replay: Run


def packed_variants(name: str, outputs: int, inputs: int) -> Iterator[Variant]:
    on = {"device": "cuda", "dtype": torch.bfloat16}
    form = FORMATS[name]
    size = outputs * form.row_bytes(inputs)
    weights = [random_packed(form, outputs, inputs) for _ in range(max(2, int(_BYTES / size)))]
    x, norm, residual, x_new = (torch.randn(n, **on) for n in (inputs, inputs, outputs, inputs))
    delta, y = torch.randn(inputs, device="cuda"), torch.empty(outputs, **on)
    heads = inputs // HEAD_DIM
    partials = torch.randn(SPLITS, heads, HEAD_DIM, device="cuda")
    largest, total = torch.randn(2, SPLITS, heads, device="cuda").abs().unbind()

    def run(call: Callable) -> Run:
        return Captured(lambda: [call(w) for w in weights])

    op = ops.packed_linear_step
    normed = run(lambda w: op(x, delta, norm, 1e-5, [w], name, [], None, None, None, y, x_new))
    yield Variant(name, "norm", size, len(weights), normed)
    merged = run(lambda w: op(partials, None, None, 0.0, [w], name, [], residual, largest, total, y, None))
    yield Variant(name, "merge", size, len(weights), merged)


def dense_variants(outputs: int, inputs: int) -> Iterator[Variant]:
    x = torch.randn(1, inputs, device="cuda", dtype=torch.bfloat16)
    size = 2 * outputs * inputs
    weights = [torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) for _ in range(int(_BYTES / size) + 1)]
    yield Variant("bf16", "product", size, len(weights), Captured(lambda: [F.linear(x, w) for w in weights]))
    size = outputs * inputs * (0.5 + 4 / 128)
    packed = []
    for _ in range(max(2, int(_BYTES / size))):
        q = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device="cuda")
        scales = torch.rand(inputs // 128, outputs, 2, device="cuda", dtype=torch.bfloat16) * 0.01
        packed.append((torch._convert_weight_to_int4pack(q, 8), scales))
    replay = Captured(lambda: [torch._weight_int4pack_mm(x, w, 128, s) for w, s in packed])
    yield Variant("int4pack", "product", size, len(packed), replay)


@torch.inference_mode()
def bench(shape: str, arguments: argparse.Namespace) -> Iterator[dict]:
    outputs, inputs = map(int, shape.split("x"))
    limit = gpu_read_limit()
    variants = [] if arguments.packed_only else list(dense_variants(outputs, inputs))
    for name in arguments.format:
        variants += packed_variants(name, outputs, inputs)
    seconds = replay_seconds([v.replay for v in variants], arguments.repetitions)
    for v, total in zip(variants, seconds, strict=True):
        us = total / v.count * 1e6
        gb_per_s = v.weight_bytes / us / 1e3
        row = {"shape": shape, "path": v.path, "form": v.form, "us": round(us, 2)}
        row |= {"limit_us": round(v.weight_bytes / limit / 1e3, 2), "read_limit_gb_per_s": round(limit)}
        yield row | {"share_of_limit": round(gb_per_s / limit, 3), "weights": v.count}


def main() -> None:
    parser = command(__spec__, __doc__, output="CSV file")
    parser.add_argument("--shape", nargs="+", default=SHAPES)
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["int4_g128", "int8_g128"])
    parser.add_argument("--packed-only", action="store_true", help="without the dense products")
    parser.add_argument("--repetitions", type=int, default=20)
    arguments = parser.parse_args()
    results = ResultFile(arguments.output, machine.facts("cuda", arguments.commit))
    for row in itertools.chain.from_iterable(bench(shape, arguments) for shape in arguments.shape):
        results.add(row)
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
