"""What apply_cats costs on a GPU: memory at rest, peak memory and time, for a model of exact layer shapes.

python bench decode.patching --output bench/results/h100/patching.csv
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

import cats_ext
from bench.lib import machine
from bench.lib.command import command
from bench.lib.models import CONFIGS, random_model
from bench.lib.results import ResultFile
from bench.lib.timing import host_seconds


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes allocated now, and the most there were since the statistics were reset; on a CPU nothing is known."""
    on_gpu = device.type == "cuda"
    return (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) if on_gpu else (0, 0)


def bench(name: str, model: PreTrainedModel, rule: str, device: torch.device) -> dict:
    """Patch ``model``, measure, and make it dense again."""
    ids = torch.randint(model.config.vocab_size, (4, 256), device=device)
    config = cats_ext.calibrate(model, [ids], sparsity=0.5, rule=rule, progress=False)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before, _ = memory(device)
    seconds = host_seconds(lambda: cats_ext.apply_cats(model, config))
    after, peak = memory(device)
    cats_ext.remove_cats(model)
    return {
        "model": name,
        "layers": model.config.num_hidden_layers,
        "rule": rule,
        "bytes_before": before,
        "bytes_after": after,
        "added_share": round((after - before) / max(before, 1), 6),
        "peak_extra_bytes": peak - before,
        "seconds": round(seconds, 4),
    }


def main() -> None:
    parser = command(__spec__, __doc__, output="CSV file")
    parser.add_argument("--model", nargs="+", choices=CONFIGS, default=["mistral-7b", "llama-2-7b"])
    arguments = parser.parse_args()
    device = machine.default_device()
    results = ResultFile(arguments.output, machine.facts(device, arguments.commit))
    for name in arguments.model:
        model = random_model(CONFIGS[name](), torch.bfloat16, device).eval()
        for rule in ("plain", "two_threshold"):
            results.add(bench(name, model, rule, device))
            print(results.rows[-1], flush=True)
        del model


if __name__ == "__main__":
    main()
