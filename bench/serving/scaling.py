"""What tensor parallelism over more ranks should give, from what was measured with some: see docs/serving.md.

    python bench serving.scaling --measured bench/results/h200/tensor_parallel.csv --all-reduce-us 4=12 8=15

A token's time in a layer, on N ranks that each read B bytes a second:

    t(N) = (A + G + i (U (1 - s_up) + D (1 - s_down))) / (N B) + 2 a(N) + c

with the bytes of the attention A and of gate, up and down G, U, D, the busiest rank's kept rows to the mean i, the time
of an all-reduce a(N), of which there are two, and what else there is, c, from the dense rows. Numbers of ranks that
were measured have their own a(N) and i; others need --all-reduce-us, and take i of the most ranks below that were
measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from bench.lib.results import read_rows


@dataclass(frozen=True)
class Layer:
    """Bytes of a layer's weights and the rates of one machine, in bytes, microseconds and bytes a microsecond."""

    attention: float
    matrix: float  # each of gate, up and down
    rate: float
    rest_us: float = 0.0

    def micros(
        self, ranks: int, all_reduce_us: float, up: float = 0.0, down: float = 0.0, busiest_to_mean: float = 1.0
    ) -> float:
        """The time of a token, at sparsities ``up`` and ``down``."""
        kept = self.matrix * (2 - up - down) * busiest_to_mean
        return (self.attention + self.matrix + kept) / (ranks * self.rate) + 2 * all_reduce_us + self.rest_us


def layer_of(row: dict[str, str]) -> Layer:
    """From the row of a dense measurement."""
    hidden, intermediate, kv, size = (
        int(row[key]) for key in ("hidden_size", "intermediate_size", "kv_size", "element_bytes")
    )
    bare = Layer(2 * hidden * (hidden + kv) * size, hidden * intermediate * size, float(row["read_gb_s"]) * 1e3)
    predicted = bare.micros(int(row["ranks"]), float(row["all_reduce_us"]))
    rest = float(row["step_us"]) / int(row["layers"]) - predicted
    return Layer(bare.attention, bare.matrix, bare.rate, rest)


def predictions(rows: list[dict[str, str]], all_reduce_us: dict[int, float]) -> list[dict[str, float]]:
    """Of each number of ranks and sparsity: microseconds a layer, and the ratio of the dense time to it."""
    dense = {int(row["ranks"]): row for row in rows if not float(row["sparsity"])}
    latencies = all_reduce_us | {ranks: float(row["all_reduce_us"]) for ranks, row in dense.items()}
    layer = layer_of(dense[min(dense)])
    imbalance = {(int(row["ranks"]), float(row["sparsity"])): float(row["busiest_to_mean"]) for row in rows}
    found = []
    for ranks, latency in sorted(latencies.items()):
        for sparsity in sorted({sparsity for _, sparsity in imbalance}):
            near = max(measured for measured in dense if measured <= max(ranks, min(dense)))
            ratio = imbalance.get((ranks, sparsity), imbalance.get((near, sparsity), 1.0))
            micros = layer.micros(ranks, latency, sparsity, sparsity, ratio)
            speedup = layer.micros(ranks, latency) / micros
            found.append({"ranks": ranks, "sparsity": sparsity, "layer_us": micros, "speedup": speedup})
    return found


def _latency(text: str) -> tuple[int, float]:
    ranks, _, micros = text.partition("=")
    try:
        return int(ranks), float(micros)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be RANKS=MICROSECONDS, got {text!r}") from None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python bench serving.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measured", type=Path, required=True, help="rows of serving.tensor_parallel")
    parser.add_argument("--all-reduce-us", type=_latency, nargs="+", default=[], metavar="RANKS=MICROSECONDS")
    arguments = parser.parse_args()
    if not arguments.measured.is_file():
        raise SystemExit(
            f"--measured {arguments.measured} is not there: torchrun bench serving.tensor_parallel makes it"
        )
    rows = [row for row in read_rows(arguments.measured) if row["compiled"] == "0"]
    for row in predictions(rows, dict(arguments.all_reduce_us)):
        print(f"{row['ranks']} ranks, {row['sparsity']:.0%}: {row['layer_us']:.1f} us a layer, {row['speedup']:.2f}x")


if __name__ == "__main__":
    main()
