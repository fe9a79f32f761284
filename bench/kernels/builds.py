"""Times two builds of cats_ext in turns: the op, the host time of an MLP, and a captured decode step.

    python bench kernels.builds --before ../before --output bench/results/h100/builds.csv

``--before`` and ``--after`` are directories that hold a ``cats_ext`` with its compiled libraries; ``--after`` is this
repository by default. Each build runs in a process of its own, ``--rounds`` times in turns, and the medians are
compared. Only public names are used, so that builds of different ages can be compared. Decoding takes the
time of a token from the difference of two lengths, with random weights of Mistral-7B's shape.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, INTERMEDIATE, LAYERS = 4096, 14336, 8  # 8 layers' weights are 20 times the L2 cache of an H100
SPARSITIES = (0, 0.5, 0.7, 0.9)
SMALL = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)


def op_times(tokens: int) -> dict[str, float]:
    """Microseconds a layer of ``torch.ops.cats.sparse_mlp`` in a CUDA graph over distinct layers, bf16."""

    def weights(scale: int) -> Tensor:
        return torch.randn(INTERMEDIATE, HIDDEN, device="cuda", dtype=torch.bfloat16) * scale**-0.5

    layers = [(weights(HIDDEN), weights(HIDDEN), weights(INTERMEDIATE)) for _ in range(LAYERS)]
    thresholds = [torch.zeros((), device="cuda") for _ in layers]
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        for layer, threshold in zip(layers, thresholds, strict=True):
            torch.ops.cats.sparse_mlp(x, *layer, threshold)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        run()
    times = {}
    for sparsity in SPARSITIES:
        for (w_gate, *_), threshold in zip(layers, thresholds, strict=True):
            v = F.silu(F.linear(x.float(), w_gate.float())).abs().flatten().sort().values
            threshold.fill_(v[int(sparsity * len(v))] if sparsity else 0)
        seconds = []
        for _ in range(70):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) * 1e3 / LAYERS)
        times[f"sparse_mlp, {tokens} tokens, {sparsity:.0%} sparse, us"] = statistics.median(seconds[10:])
    return times


def host_times(name: str, model: nn.Module) -> dict[str, float]:
    """Host microseconds of an eager call of a patched MLP, whose kernels take less than that."""
    import cats_ext

    config = cats_ext.calibrate(model, [torch.randint(64, (1, 256), device="cuda")], sparsity=0.5, progress=False)
    mlp = cats_ext.apply_cats(model, config).model.layers[0].mlp
    times = {}
    for tokens in (1, 64):
        x = torch.randn(1, tokens, 64, device="cuda", dtype=torch.bfloat16)
        rounds = []
        with torch.no_grad():
            for _ in range(40):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(200):
                    mlp(x)
                rounds.append((time.perf_counter() - start) / 200 * 1e6)
        times[f"host, {name}, {tokens} tokens, us"] = statistics.median(rounds[5:])
    return times


def decode_times(model: nn.Module) -> dict[str, float]:
    """Microseconds a token of ``DecodeEngine``, dense and sparse, after a prompt of 64 tokens."""
    import cats_ext

    ids = torch.randint(32000, (1, 512), device="cuda")

    def microseconds() -> float:
        engine = cats_ext.DecodeEngine(model, max_length=512)

        def seconds(tokens: int) -> float:
            start = time.perf_counter()
            options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
            engine.generate(ids[:, :64], **options)
            return time.perf_counter() - start

        seconds(160)  # makes the graph
        return statistics.median((seconds(160) - seconds(32)) / 128 * 1e6 for _ in range(5))

    times = {"decode, dense, us": microseconds()}
    cats_ext.apply_cats(model, cats_ext.calibrate(model, [ids], rule="plain", sparsity=0.5, progress=False))
    for sparsity in SPARSITIES[1:]:
        cats_ext.set_sparsity(model, sparsity)
        times[f"decode, {sparsity:.0%} sparse, us"] = microseconds()
    return times


def measure(layers: int) -> dict[str, float]:
    """All times of the build that is imported."""
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config

    import cats_ext  # noqa: F401  registers the ops

    def model(config: object) -> nn.Module:
        torch.manual_seed(0)
        with torch.device("cuda"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    times: dict[str, float] = {}
    for tokens in (1, 2, 4):
        times |= op_times(tokens)
    small = {"separate projections": LlamaConfig(**SMALL), "merged": Phi3Config(**SMALL, pad_token_id=0)}
    for name, config in small.items():
        times |= host_times(name, model(config))
    return times | decode_times(model(MistralConfig(sliding_window=None, num_hidden_layers=layers)))


def times_of(tree: Path, layers: int) -> dict[str, float]:
    """:func:`measure` in a process that imports cats_ext from ``tree``."""
    code = f"import json, runpy; print(json.dumps(runpy.run_path({__file__!r})['measure']({layers})))"
    with tempfile.TemporaryDirectory() as elsewhere:  # python -c puts the working directory first in sys.path
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tree), os.environ.get("PYTHONPATH", "")))}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, cwd=elsewhere, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    from bench.lib import machine
    from bench.lib.command import command
    from bench.lib.results import ResultFile
    from bench.lib.timing import in_turns

    parser = command(__spec__, __doc__, output="CSV file")
    parser.add_argument("--before", type=Path, required=True, help="directory of the earlier build")
    parser.add_argument("--after", type=Path, default=machine.ROOT, help="of the later one; default: this repository")
    parser.add_argument("--before-commit", default="", help="for the result rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=32, help="of the model that decodes")
    arguments = parser.parse_args()
    facts = machine.facts("cuda", arguments.commit) | {"before_commit": arguments.before_commit}
    facts |= {"rounds": arguments.rounds, "layers": arguments.layers}
    results = ResultFile(arguments.output, facts, digits=5)
    trees = arguments.before.resolve(), arguments.after.resolve()
    before, after = in_turns(trees, lambda tree: times_of(tree, arguments.layers), arguments.rounds)
    for what in after[0]:
        old, new = (statistics.median(times[what] for times in rounds) for rounds in (before, after))
        results.add({"what": what, "before": old, "after": new, "ratio": new / old})
        print(f"{what:48} {old:9.2f} {new:9.2f} {new / old:7.3f}", flush=True)


if __name__ == "__main__":
    main()
