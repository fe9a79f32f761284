"""How evenly the kept rows of an MLP spread over the ranks of a tensor-parallel model, from a model's activations.

    python bench serving.balance --model MODEL --texts shared/data --output bench/results/cpu/balance.csv

The slowest rank sets the time of a layer. The masks are those of one process, so no ranks are started. Two orders of
the neurons are compared: as they are, each rank with a contiguous part, and a permutation of them that gives every rank
the same sum of keep frequencies, counted on the calibration's text. Ratios are those of the busiest rank to the mean of
all, of each token and layer: of kept rows of up and down, and of all rows that are read, with the gate's. Of the latter
there is also the ratio of sums over the layers, by which a token takes longer. Texts are WikiText-2's: thresholds and
frequencies from the validation split, masks on the test split.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import cats_ext
from bench.lib import machine
from bench.lib.command import command
from bench.lib.results import ResultFile
from bench.quality.texts import load_texts, token_ids
from cats_ext._inputs import batches_of
from cats_ext.calibration.passes import run_pass
from cats_ext.ops.reference import ACTIVATIONS
from cats_ext.patching.apply import find_dense_mlps
from cats_ext.patching.detection import GatedMLP

RANKS = (2, 4, 8)
SPARSITIES = (0.5, 0.7, 0.9)
WINDOW = 512


def balanced_order(frequencies: Tensor, ranks: int) -> Tensor:
    """A permutation of the neurons whose ``ranks`` equal parts have about equal sums of ``frequencies`` ``[I]``.

    By frequency, to and fro: each round gives every rank one neuron, and the next goes the other way.
    """
    order = frequencies.argsort(descending=True, stable=True)
    rounds = order.view(-1, ranks).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.t().reshape(-1)


def parts(kept: Tensor, order: Tensor, ranks: int) -> Tensor:
    """Of ``kept`` rows ``[T, I]``, how many each rank has, ``[T, ranks]``."""
    return kept[:, order].view(len(kept), ranks, -1).sum(-1)


def busiest_to_mean(rows: Tensor) -> Tensor:
    """``[T]`` from ``[T, ranks]``; 1 where nobody has any."""
    mean = rows.mean(-1)
    return torch.where(mean > 0, rows.amax(-1) / mean.clamp(min=1e-9), 1.0)


class Masks:
    """Rows that are kept, 0 to 2 a neuron and token, of each layer at each sparsity."""

    def __init__(self, configs: dict[float, cats_ext.CatsConfig]) -> None:
        self.configs = configs

    def of(self, mlp: GatedMLP, gate: Tensor, up: Tensor) -> dict[float, Tensor]:
        v = ACTIVATIONS[mlp.activation](gate.float())
        found = {}
        for sparsity, config in self.configs.items():
            kept = passed = v.abs() >= config.thresholds[mlp.name]
            if config.down_thresholds:
                kept = passed & ((v * up.float()).abs() >= config.down_thresholds[mlp.name])
            found[sparsity] = passed.float() + kept.float()
        return found


def frequencies(model: torch.nn.Module, masks: Masks, windows: list[Tensor]) -> dict[tuple[str, float], Tensor]:
    """Rows kept of each neuron, ``[I]``, by layer and sparsity."""
    sums: dict[tuple[str, float], Tensor] = defaultdict(lambda: torch.zeros(()))

    def observe(mlp: GatedMLP, gate: Tensor, up: Tensor) -> None:
        for sparsity, kept in masks.of(mlp, gate, up).items():
            sums[mlp.name, sparsity] = sums[mlp.name, sparsity] + kept.sum(0)

    run_pass(model, find_dense_mlps(model), batches_of(windows, 1), observe)
    return dict(sums)


def measure(
    model: torch.nn.Module, masks: Masks, windows: list[Tensor], orders: dict[tuple[str, str, float, int], Tensor]
) -> list[dict[str, Any]]:
    """A row for each of ``orders``' names, sparsity and number of ranks. Orders are by name, layer, sparsity, ranks."""
    rows: dict[tuple[str, float, int], dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))

    def observe(mlp: GatedMLP, gate: Tensor, up: Tensor) -> None:
        for sparsity, kept in masks.of(mlp, gate, up).items():
            for ranks in RANKS:
                for name in ("contiguous", "balanced"):
                    share = parts(kept, orders[name, mlp.name, sparsity, ranks], ranks)
                    read = share + kept.shape[1] / ranks  # with those of the gate
                    found = rows[name, sparsity, ranks]
                    found["rows"].append(busiest_to_mean(share))
                    found["read"].append(busiest_to_mean(read))
                    found["busiest"].append(read.amax(-1).sum())
                    found["mean"].append(read.mean(-1).sum())

    mlps = find_dense_mlps(model)
    run_pass(model, mlps, batches_of(windows, 1), observe)
    results = []
    for (name, sparsity, ranks), found in rows.items():
        kept, read = (torch.cat(found[key]) for key in ("rows", "read"))
        results.append(
            {
                "sparsity": sparsity,
                "ranks": ranks,
                "order": name,
                "tokens": len(kept) // len(mlps),
                "layers": len(mlps),
                "neurons": mlps[0].intermediate_size,
                "rows_mean": kept.mean().item(),
                "rows_p95": kept.quantile(0.95).item(),
                "read_mean": read.mean().item(),
                "read_p95": read.quantile(0.95).item(),
                "token_time": (sum(found["busiest"]) / sum(found["mean"])).item(),
            }
        )
    return results


def main() -> None:
    parser = command(__spec__, __doc__, "CSV file for the results")
    parser.add_argument("--model", type=Path, required=True, help="directory of a model with its tokenizer")
    parser.add_argument("--texts", type=Path, required=True, help="directory of the texts, as for quality.measure")
    parser.add_argument("--tokens", type=int, default=2048, help="of each split")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    texts = load_texts(arguments.texts)
    windows, held_out = (
        list(token_ids(tokenizer, texts[name], arguments.tokens).split(WINDOW))
        for name in ("wikitext_valid", "wikitext")
    )
    facts = machine.facts("cpu", arguments.commit)
    machine.print_facts(facts)
    result = ResultFile(arguments.output, facts, digits=5)
    for rule in ("plain", "two_threshold"):
        config = cats_ext.calibrate(
            model, windows, sparsity=0.5, rule=rule, sequence_length=WINDOW, max_tokens=arguments.tokens
        )
        masks = Masks({sparsity: config.at_sparsity(sparsity) for sparsity in SPARSITIES})
        counted = frequencies(model, masks, windows)
        orders = {}
        for (layer, sparsity), kept in counted.items():
            for ranks in RANKS:
                orders["contiguous", layer, sparsity, ranks] = torch.arange(len(kept))
                orders["balanced", layer, sparsity, ranks] = balanced_order(kept, ranks)
        for row in measure(model, masks, held_out, orders):
            row = {"model": arguments.model.name, "rule": rule, "importance": config.importance} | row
            print(
                {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
            result.add(row)


if __name__ == "__main__":
    main()
