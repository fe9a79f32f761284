"""For how many tokens the sparse kernel pays under vLLM: MAX_SERVED_TOKENS of cats_ext/ops/dispatch.py, without vLLM.

    python bench serving.tokens --output bench/results/h200/serving_tokens.csv

An MLP as the plugin calls it (cats_ext/integrations/vllm_op.py), by the kernel and by dense products with the mask
between them, with and without counting, against the dense one as vLLM computes it: one product for gate and up,
SiLU and product in one compiled kernel, down in its own layout. Each is a CUDA graph over layers of distinct weights,
several times the L2 in all; they take turns, and medians are reported. Thresholds are exact quantiles for the x in use.
Tokens are independent, so that masks have nothing in common but chance; those of real text share more rows.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lib import machine
from bench.lib.command import command
from bench.lib.graphs import Captured, Run
from bench.lib.layers import kth_threshold, random_rows
from bench.lib.results import ResultFile
from bench.lib.timing import replay_seconds
from cats_ext.ops import dispatch
from cats_ext.ops.definitions import masked_product


def silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class Layer:
    """Weights as vLLM has them, and the down projection by neuron besides."""

    def __init__(self, hidden: int, intermediate: int, dtype: torch.dtype, device: str) -> None:
        self.gate_up = random_rows(2 * intermediate, hidden, dtype, device)
        self.down_t = random_rows(intermediate, hidden, dtype, device)
        self.down = self.down_t.t().contiguous()
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)

    def threshold(self, x: Tensor, sparsity: float) -> Tensor:
        """A vector, as the plugin has it."""
        gate = self.gate_up.chunk(2)[0]
        found = kth_threshold(F.silu(F.linear(x, gate).float()).abs(), sparsity)
        return found.repeat(len(gate))

    def kernel(self, x: Tensor, threshold: Tensor, counts: Tensor | None) -> Tensor:
        operands = (*self.gate_up.chunk(2), self.down_t), (None, None, None)
        return dispatch.Projections.kernel(x, operands, (threshold, None, "silu"), counts)

    def masked(self, x: Tensor, threshold: Tensor, counts: Tensor | None) -> Tensor:
        gate, up = F.linear(x, self.gate_up).chunk(2, -1)
        return F.linear(masked_product(gate, up, threshold, None, "silu", counts), self.down_t.t())


@torch.inference_mode()
def bench(arguments: argparse.Namespace, layers: list[Layer], tokens: int, device: str, file: ResultFile) -> None:
    hidden = layers[0].down_t.shape[1]
    x = torch.randn(tokens, hidden, device=device).to(layers[0].down_t)
    activation = torch.compile(silu_and_mul, dynamic=False)
    runs: dict[tuple[str, float], Run] = {
        ("dense", 0.0): lambda: [F.linear(activation(F.linear(x, w.gate_up)), w.down) for w in layers]
    }
    for sparsity in arguments.sparsities:
        thresholds = [w.threshold(x, sparsity) for w in layers]
        for path in ("kernel", "masked"):
            for counted in (False, True) if sparsity == arguments.sparsities[0] else (False,):

                def run(path=path, counted=counted, thresholds=thresholds) -> list[Tensor]:
                    pairs = zip(layers, thresholds, strict=True)
                    return [getattr(w, path)(x, t, w.counts if counted else None) for w, t in pairs]

                runs[f"{path}, counted" if counted else path, sparsity] = run
        y, expected = (getattr(layers[0], path)(x, thresholds[0], None).float() for path in ("kernel", "masked"))
        if not (error := float((y - expected).norm() / expected.norm())) < 0.2:  # neurons at the threshold differ
            raise RuntimeError(f"{tokens} tokens at {sparsity}: kernel and masked products differ by {error:.2g}")
    seconds = replay_seconds([Captured(run) for run in runs.values()], arguments.repetitions)
    dense = seconds[0]
    for (path, sparsity), total in zip(runs, seconds, strict=True):
        row = {"hidden_size": hidden, "intermediate_size": len(layers[0].down_t), "tokens": tokens, "path": path}
        row |= {"sparsity": sparsity, "us": total / len(layers) * 1e6, "speedup": dense / total, "layers": len(layers)}
        file.add(row)
        print(f"{tokens} tokens, {path:16} {sparsity:.0%}: {row['us']:7.1f} us, {row['speedup']:.3f}", flush=True)


def main() -> None:
    parser = command(__spec__, __doc__, "CSV file of the results")
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 14336], metavar=("H", "I"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repetitions", type=int, default=30)
    arguments = parser.parse_args()
    device = str(machine.default_device())
    facts = machine.facts(device, arguments.commit)
    machine.print_facts(facts)
    file = ResultFile(arguments.output, facts, digits=4)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layers = [Layer(*arguments.shape, dtype, device) for _ in range(arguments.layers)]
    for tokens in arguments.tokens:
        bench(arguments, layers, tokens, device, file)


if __name__ == "__main__":
    main()
