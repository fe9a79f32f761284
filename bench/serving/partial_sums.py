"""What rounding the ranks' parts of an MLP's output before they are summed up costs in a tensor-parallel model.

    python bench serving.partial_sums --model MODEL --texts shared/data --output bench/results/cpu/partial_sums.csv

The ranks are simulated in one process, in bfloat16. ``rounded`` is what is done: every rank's sum, made in float32, is
rounded to bfloat16, and so is the result of every addition of two of them. ``float32`` keeps both in float32 up to the
end. ``dense`` is what transformers does with a dense model, whose activations between the products are rounded too.
Errors are relative: of an MLP's output against the same weights and input in float64, the mean and the largest of all
layers; of the logits against the whole model in float64, from which ``kl`` is the divergence, in nats a token. One rank
is one process. The text is WikiText-2's test split, thresholds are calibrated on the validation split.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoTokenizer

import cats_ext
from bench.lib import machine
from bench.lib.command import command
from bench.lib.results import ResultFile
from bench.quality.texts import load_texts, token_ids
from cats_ext.ops.reference import ACTIVATIONS, sparse_mlp_ref
from cats_ext.patching.apply import find_dense_mlps
from cats_ext.patching.detection import GatedMLP

RANKS = (1, 2, 4, 8)
Forward = Callable[[GatedMLP, Tensor], Tensor]


def summed(parts: list[Tensor]) -> Tensor:
    """One after the other, as in a ring: each sum has the dtype of the parts."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def sparse_parts(config: cats_ext.CatsConfig, ranks: int, mlp: GatedMLP, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Each rank's sum over its neurons, computed in ``dtype``."""
    module = mlp.module
    rows = zip(
        *(w.chunk(ranks) for w in (module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight.t())),
        *(
            thresholds[mlp.name].expand(mlp.neurons).chunk(ranks)
            for thresholds in (config.thresholds, config.down_thresholds)
        ),
        strict=True,
    )
    return [sparse_mlp_ref(x.to(dtype), *own, mlp.activation, compute_dtype=dtype) for own in rows]


def rounded(config: cats_ext.CatsConfig, ranks: int, mlp: GatedMLP, x: Tensor) -> Tensor:
    return summed([part.to(x.dtype) for part in sparse_parts(config, ranks, mlp, x, torch.float32)])


def in_float32(config: cats_ext.CatsConfig, ranks: int, mlp: GatedMLP, x: Tensor) -> Tensor:
    return summed(sparse_parts(config, ranks, mlp, x, torch.float32)).to(x.dtype)


def exact(config: cats_ext.CatsConfig, mlp: GatedMLP, x: Tensor) -> Tensor:
    (part,) = sparse_parts(config, 1, mlp, x, torch.float64)
    return part


def dense(ranks: int, mlp: GatedMLP, x: Tensor) -> Tensor:
    """In any dtype."""
    module = mlp.module
    h = ACTIVATIONS[mlp.activation](linear(x, module.gate_proj.weight)) * linear(x, module.up_proj.weight)
    columns = module.down_proj.weight.chunk(ranks, dim=1)
    return summed([linear(own, w) for own, w in zip(h.chunk(ranks, dim=-1), columns, strict=True)])


def logits_with(forward: Forward, model: nn.Module, ids: Tensor) -> Tensor:
    with ExitStack() as stack:
        for mlp in find_dense_mlps(model):
            stack.enter_context(patch.object(mlp.module, "forward", partial(forward, mlp)))
        return model(ids).logits[0].double()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@torch.no_grad()
def main() -> None:
    parser = command(__spec__, __doc__, "CSV file for the results")
    parser.add_argument("--model", type=Path, required=True, help="directory of a model with its tokenizer")
    parser.add_argument("--texts", type=Path, required=True, help="directory of the texts, as for quality.measure")
    parser.add_argument("--tokens", type=int, default=512, help="that errors are measured on")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    double = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval().double()
    texts = load_texts(arguments.texts)
    ids = token_ids(tokenizer, texts["wikitext"], arguments.tokens)[None]
    calibration = token_ids(tokenizer, texts["wikitext_valid"], 4096)
    with torch.enable_grad():
        config = cats_ext.calibrate(model, calibration, sparsity=0.5, importance="norm", sequence_length=512)
    facts = machine.facts("cpu", arguments.commit)
    machine.print_facts(facts)
    result = ResultFile(arguments.output, facts, digits=4)
    references = {"sparse": partial(exact, config), "dense": partial(dense, 1)}
    expected = {name: logits_with(forward, double, ids) for name, forward in references.items()}
    for name, kind, variant in (
        ("rounded", "sparse", partial(rounded, config)),
        ("float32", "sparse", partial(in_float32, config)),
        ("dense", "dense", dense),
    ):
        for ranks in RANKS:
            errors: list[float] = []

            def forward(mlp: GatedMLP, x: Tensor, variant=variant, ranks=ranks, kind=kind, errors=errors) -> Tensor:
                y = variant(ranks, mlp, x)
                wide = GatedMLP(mlp.name, double.get_submodule(mlp.name), mlp.activation, mlp.merged)
                errors.append(relative(y, references[kind](wide, x.double())))
                return y

            logits = logits_with(forward, model, ids)
            log_p, log_q = (values.log_softmax(-1) for values in (expected[kind], logits))
            row = {
                "model": arguments.model.name,
                "sparsity": config.sparsity if kind == "sparse" else 0.0,
                "sums": name,
                "ranks": ranks,
                "tokens": ids.numel(),
                "mlp_error": sum(errors) / len(errors),
                "mlp_error_largest": max(errors),
                "logits_error": relative(logits, expected[kind]),
                "kl": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
            }
            print({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()}, flush=True)
            result.add(row)


if __name__ == "__main__":
    main()
