"""Columns skipped by the input inside the MLPs, beside the package's rule, at equal bytes of the MLPs, on one model.

    python bench quality.compare_inputs --model DIR_OR_GGUF --data ../shared/data --output inputs.json.gz
    python bench quality.compare_columns --model DIR_OR_GGUF --name NAME --inputs inputs.json.gz \
        --output bench/results/quality

The gate, and up with it or not, skip the columns whose input is small; else up skips the rows of neurons with a small
gate as the package does. Down skips by the contribution as the package does. Attention is read whole. As in
quality.compare, thresholds are exact quantiles and masks plain PyTorch, in float32 with TF32 products.
``columns_NAME_text.csv`` has the shares read of each matrix and of the MLPs, and the divergence on the windows for
development (dev) and on those that are reported (c4). Of the latter it has the change from the first variant, too, with
its standard error, paired by windows. ``columns_NAME_tasks.csv`` has the tasks, items of even index reported.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.lib import machine
from bench.lib.command import command
from bench.lib.results import ResultFile
from bench.quality.compare_model import Comparison
from bench.quality.compare_rules import Layer, Variant, quantile

_PACKAGE = Variant("package")  # what weights its tests


@dataclass(frozen=True)
class Columns:
    """A rule for the MLPs; ``gate``, ``up`` and ``down`` are the shares of each matrix that are read.

    Attributes:
        up_by: rows (of neurons, by the gate) or columns (by the input).
        score: what weights an input: none, or gradient (the root mean square of the derivative through that matrix).
        tasks: whether tasks are measured.
    """

    name: str
    gate: float
    up: float
    down: float
    up_by: str = "rows"
    score: str = "none"
    tasks: bool = False


@dataclass
class Threshold:
    """Keeps what reaches it: ``|x| * weight >= value``."""

    value: Tensor | float = 0.0
    weight: Tensor | float = 1.0

    @classmethod
    def at(cls, share: float, x: Tensor, weight: Tensor | float) -> Threshold:
        return cls(quantile(x.abs() * weight, 1 - share), weight)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` with zeros for what is skipped, and what is kept."""
        kept = x.abs() * self.weight >= self.value
        return torch.where(kept, x, 0), kept


@dataclass
class ColumnRule:
    """One sparse MLP: tests of the inputs of gate and up, of act(gate) for rows of up, of the contributions."""

    gate: Threshold = field(default_factory=Threshold)
    up: Threshold = field(default_factory=Threshold)
    rows: Threshold = field(default_factory=Threshold)
    down: Threshold = field(default_factory=Threshold)
    seen: list = field(default_factory=lambda: [0, 0.0, 0.0, 0.0])  # tokens, the sums of their shares of each matrix

    def __call__(self, mlp: nn.Module, x: Tensor) -> Tensor:
        (for_gate, gate), (for_up, up) = self.gate(x), self.up(x)
        v, rows = self.rows(F.silu(mlp.gate_proj(for_gate)))
        h, down = self.down(v * mlp.up_proj(for_up))
        gate, up, rows, down = (kept.float().mean(-1) for kept in (gate, up, rows, down & rows))
        for i, count in enumerate((gate.numel(), gate.sum(), (up * rows).sum(), down.sum())):
            self.seen[i] = self.seen[i] + count
        return mlp.down_proj(h)


@torch.no_grad()
def column_weights(layer: Layer, score: str) -> tuple[Tensor | float, Tensor | float]:
    """Of the inputs of gate and of up."""
    if score == "none":
        return 1.0, 1.0
    mlp, r = layer.mlp, layer.g @ layer.down
    z, u = mlp.gate_proj(layer.x), mlp.up_proj(layer.x)
    s = torch.sigmoid(z)
    by_gate = (r * u * s * (1 + z * (1 - s))) @ mlp.gate_proj.weight
    by_up = (r * z * s) @ mlp.up_proj.weight
    return by_gate.square().mean(0).sqrt(), by_up.square().mean(0).sqrt()


@torch.no_grad()
def rule_of(layer: Layer, variant: Columns) -> ColumnRule:
    """Each threshold is a quantile on the calibration text, behind the tests before it."""
    mlp, x = layer.mlp, layer.x
    gate_weight, up_weight = column_weights(layer, variant.score)
    rule = ColumnRule(gate=Threshold.at(variant.gate, x, gate_weight))
    v = F.silu(mlp.gate_proj(rule.gate(x)[0]))
    if variant.up_by == "columns":
        rule.up = Threshold.at(variant.up, x, up_weight)
    else:
        rule.rows = Threshold.at(variant.up, v, layer.weights[_PACKAGE.gate] ** _PACKAGE.power(layer.last))
    h = rule.rows(v)[0] * mlp.up_proj(rule.up(x)[0])
    rule.down = Threshold.at(variant.down, h, layer.weights[f"down {_PACKAGE.down}"])
    return rule


def by_window(comparison: Comparison, name: str) -> tuple[Tensor, float]:
    """The divergence of each window of a text, and the perplexity."""
    windows = comparison.texts[name]
    dense = comparison.dense(name, windows).split(windows.shape[1])
    found = [comparison.divergence(ids[None], states) for ids, states in zip(windows, dense, strict=True)]
    each = torch.tensor(found, dtype=torch.float64)
    return each[:, 0], math.exp(each[:, 1].mean())


def shares(rules: list) -> dict[str, float]:
    """What was read of each matrix, and of the MLPs: means over tokens and layers."""
    seen = torch.tensor([[float(count) for count in rule.seen] for rule in rules], dtype=torch.float64)
    read = (seen[:, 1:] / seen[:, :1]).mean(0).tolist()
    return dict(zip(("gate", "up", "down"), read, strict=True)) | {"mlp_share": sum(read) / 3}


def main() -> None:
    parser = command(__spec__, __doc__, output="directory", required=True)
    parser.add_argument("--model", type=Path, required=True, help="directory or .gguf file")
    parser.add_argument("--name", required=True, help="of the model, in the rows")
    parser.add_argument("--inputs", type=Path, required=True, help="of quality.compare_inputs")
    parser.add_argument("--variants", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--batch", type=int, default=8, help="windows in a forward pass of the dense model")
    parser.add_argument("--batch-tokens", type=int, default=65536, help="of tasks")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing after so long")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    started = time.perf_counter()
    comparison = Comparison(args)
    print(f"calibrated after {time.perf_counter() - started:.1f} s", flush=True)
    facts = machine.facts(comparison.device, args.commit)
    files = (args.output / f"columns_{args.name}_{part}.csv" for part in ("text", "tasks"))
    texts, tasks = (ResultFile(file, facts, digits=5) for file in files)
    variants = [Columns(**fields) for fields in json.loads(args.variants.read_text())]
    first: list[Tensor] = []  # the divergence of the first variant, by windows

    def measure(variant: Columns | None, part: str) -> None:
        name, began = variant.name if variant else "dense", time.perf_counter()
        comparison.rules = [rule_of(layer, variant) if variant else None for layer in comparison.layers]
        if part == "tasks":
            print(f"{args.name} {name}", flush=True)
            comparison.measure_tasks(name, tasks)
            print(f"  {time.perf_counter() - began:.1f} s", flush=True)
            return
        divergence, perplexity = by_window(comparison, "c4")
        row = {"model": args.name, "variant": name}
        row |= shares(comparison.rules) if variant else dict.fromkeys(("gate", "up", "down", "mlp_share"), 1.0)
        row |= {"tokens": comparison.texts["c4"].numel(), "c4_kl": float(divergence.mean())}
        if variant:
            first.append(divergence)
            change = divergence - first[0]
            row |= {"c4_change": float(change.mean()), "c4_change_se": float(change.std() / len(change) ** 0.5)}
        row |= {"c4_ppl": perplexity, "dev_kl": float(by_window(comparison, "dev")[0].mean())}
        texts.add(row | {"seconds": time.perf_counter() - began})
        print({key: value for key, value in texts.rows[-1].items() if key not in facts}, flush=True)

    parts = [(variant, "text") for variant in (None, *variants)]
    parts += [(variant, "tasks") for variant in (None, *(one for one in variants if one.tasks))]
    for variant, part in parts:
        if time.perf_counter() - started > args.seconds:
            print(f"stopped before {variant.name if variant else 'dense'}, {part}")
            break
        measure(variant, part)
    print(f"done after {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
