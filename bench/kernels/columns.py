"""One token through an MLP whose gate is read by columns: sparse_mlp_columns beside sparse_mlp and the dense MLP.

    python bench kernels.columns --output bench/results/h200/columns.csv

At each budget, the share of the MLP's bytes, sparse_mlp has the two thresholds and sparse_mlp_columns the three of the
package's rules, as exact quantiles of what the layers make of one normal x. Every path is captured in a CUDA graph over
layers of distinct weights, several times the L2 in all; paths take turns, and medians are reported. Results are
compared with the formula in float32 first. The read limit is that of the same run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.mlp import relative_error
from bench.lib import machine
from bench.lib.command import command
from bench.lib.graphs import Captured
from bench.lib.layers import Layer, dense, kth_threshold
from bench.lib.read_limit import gpu_read_limit
from bench.lib.results import ResultFile
from bench.lib.shapes import DTYPES, SHAPES, parse_shape
from bench.lib.timing import replay_seconds
from cats_ext import ops
from cats_ext.ops.reference import masked
from cats_ext.thresholds.rules import sparsity_split


def thresholds_of(layer: Layer, split) -> tuple[Tensor, Tensor, Tensor]:
    """Of inputs, activations and contributions, each behind the tests before it."""
    x, gate, up = layer.x.float(), layer.gate.float(), layer.up.float()
    of_inputs = kth_threshold(x.abs(), split.input)
    v = F.silu(F.linear(torch.where(x.abs() < of_inputs, 0, x), gate))
    of_gates = kth_threshold(v.abs(), split.up)
    h = torch.where(v.abs() < of_gates, 0, v) * F.linear(x, up)
    return of_inputs, of_gates, kth_threshold(h.abs(), split.down)


def expected(layer: Layer, of_inputs: Tensor, of_gates: Tensor, of_contributions: Tensor) -> tuple[Tensor, float]:
    """The result, and the share of the weights that it takes."""
    x = layer.x.float()
    seen = x.abs() >= of_inputs
    v, u = F.silu(F.linear(torch.where(seen, x, 0), layer.gate.float())), F.linear(x, layer.up.float())
    h = masked(v, u, of_gates, of_contributions)
    share = seen.float().mean() + (v.abs() >= of_gates).float().mean() + (h != 0).float().mean()
    return F.linear(h, layer.down.float()), float(share) / 3


@torch.inference_mode()
def bench(shape: str, dtype: str, budgets: list[float], repetitions: int, working_set: int) -> list[dict]:
    hidden, intermediate = parse_shape(shape)
    layer_bytes = 3 * hidden * intermediate * DTYPES[dtype].itemsize
    count = max(3, -(-working_set // layer_bytes))
    x = torch.randn(1, hidden, device="cuda").to(DTYPES[dtype])
    layers = [Layer.random(x, intermediate) for _ in range(count)]
    transposed = [layer.gate.t().contiguous() for layer in layers]
    runs = {"dense": (1.0, 1.0, lambda: [dense(x, w.gate, w.up, w.down) for w in layers])}
    for budget in budgets:
        for path, rule in (("sparse_mlp", "two_threshold"), ("sparse_mlp_columns", "three_threshold")):
            found = [thresholds_of(layer, sparsity_split(1.5 * (1 - budget), rule)) for layer in layers]

            def run(path: str = path, found: list = found) -> list[Tensor]:
                if path == "sparse_mlp":
                    return [
                        ops.sparse_mlp(x, w.gate, w.up, w.down_t, *of[1:]) for w, of in zip(layers, found, strict=True)
                    ]
                parts = zip(layers, transposed, found, strict=True)
                return [ops.sparse_mlp_columns(x, gate_t, w.up, w.down_t, *of) for w, gate_t, of in parts]

            wanted = [expected(layer, *of) for layer, of in zip(layers, found, strict=True)]
            error = max(relative_error(y, right) for y, (right, _) in zip(run(), wanted, strict=True))
            if not error < (1e-3 if dtype == "fp32" else 2e-2):
                raise RuntimeError(f"{path} at {budget}: relative error {error:.2g}")
            runs[f"{path} {budget:.3g}"] = budget, sum(share for _, share in wanted) / count, run
    limit = gpu_read_limit()
    seconds = replay_seconds([Captured(run) for _, _, run in runs.values()], repetitions)
    rows = []
    for (name, (budget, share, _)), total in zip(runs.items(), seconds, strict=True):
        us = total / count * 1e6
        gb_per_s = layer_bytes * share / us / 1e3
        row = {"shape": shape, "hidden_size": hidden, "intermediate_size": intermediate, "dtype": dtype}
        row |= {"path": name.split()[0], "budget": round(budget, 4), "share_read": round(share, 4), "us": round(us, 2)}
        row |= {"gb_per_s": round(gb_per_s), "read_limit_gb_per_s": round(limit)}
        row |= {"share_of_limit": round(gb_per_s / limit, 3), "speedup": round(seconds[0] / total, 3), "layers": count}
        rows.append(row)
    return rows


def main() -> None:
    parser = command(__spec__, __doc__, output="CSV file")
    shapes = ["mistral-7b", "llama-2-7b", "3584x18944", "2048x8192"]
    parser.add_argument("--shape", nargs="+", default=shapes, help=f"HxI or {', '.join(SHAPES)}")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.8, 2 / 3, 0.55, 0.45])
    parser.add_argument("--working-set", type=int, default=1 << 30, help="bytes of weights to rotate through, at least")
    parser.add_argument("--repetitions", type=int, default=50)
    args = parser.parse_args()
    torch.manual_seed(0)
    results = ResultFile(args.output, machine.facts("cuda", args.commit))
    for shape in args.shape:
        for dtype in args.dtype:
            for row in bench(shape, dtype, args.budgets, args.repetitions, args.working_set):
                results.add(row)
                print(*(f"{key}={value}" for key, value in row.items()), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
