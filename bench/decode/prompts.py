"""What prompts take with packed rows in all linear layers, beside 16-bit weights.

    python bench decode.prompts --output bench/results/h200/prompts.csv

A model of exact layer shapes with random weights, fewer layers where --layers says so, computes the logits after a
prompt. On a GPU each forward is a CUDA graph, so the host's time is left out; models take turns, and medians are
reported. The output layer of a packed model is in int8.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from transformers import PreTrainedModel

from bench.lib import machine
from bench.lib.command import command
from bench.lib.graphs import Captured, Run
from bench.lib.models import CONFIGS, random_model, random_quantized_model
from bench.lib.results import ResultFile
from bench.lib.timing import host_seconds, in_turns, replay_seconds


def made(arguments: argparse.Namespace, weights: str, device: str) -> PreTrainedModel:
    config = CONFIGS[arguments.model]()
    config.num_hidden_layers = min(arguments.layers, config.num_hidden_layers)
    if weights == "dense":
        return random_model(config, torch.bfloat16, device).eval()
    return random_quantized_model(config, torch.bfloat16, device, weights).eval()


@torch.inference_mode()
def bench(arguments: argparse.Namespace, models: dict[str, PreTrainedModel], prompt: int, file: ResultFile) -> None:
    device = next(iter(models.values())).device

    def forward(model: PreTrainedModel) -> Run:
        ids = torch.randint(3, model.config.vocab_size, (1, prompt), device=device)
        run = lambda: model(ids, use_cache=False, logits_to_keep=1).logits  # noqa: E731
        return Captured(run) if device.type == "cuda" else run

    runs = [forward(model) for model in models.values()]
    if device.type == "cuda":
        seconds = replay_seconds(runs, arguments.repetitions)
    else:
        seconds = [statistics.median(found) for found in in_turns(runs, host_seconds, arguments.repetitions, warmup=1)]
    for weights, taken in zip(models, seconds, strict=True):
        row = {"model": arguments.model, "layers": models[weights].config.num_hidden_layers, "prompt": prompt}
        file.add(row | {"weights": weights, "ms": taken * 1e3, "of_dense": taken / seconds[0]})
        print(f"{weights}, prompt of {prompt}: {taken * 1e3:.2f} ms, {taken / seconds[0]:.3f} of dense", flush=True)


def main() -> None:
    parser = command(__spec__, __doc__, "CSV file of the results")
    parser.add_argument("--model", choices=CONFIGS, default="mistral-7b")
    parser.add_argument("--layers", type=int, default=8, help="no more than the model has")
    parser.add_argument("--weights", nargs="+", default=["int4_g128", "int8_g128", "fp8_e4m3"])
    parser.add_argument("--prompt", nargs="+", type=int, default=[512, 1024, 2048, 4096], help="tokens")
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    device = str(machine.default_device())
    facts = machine.facts(device, arguments.commit)
    machine.print_facts(facts)
    file = ResultFile(arguments.output, facts, digits=4)
    models = {weights: made(arguments, weights, device) for weights in ("dense", *arguments.weights)}
    for prompt in arguments.prompt:
        bench(arguments, models, prompt, file)


if __name__ == "__main__":
    main()
