"""Time and memory of a calibration of a model of a known shape with random weights.

    python bench quality.calibration_time --model mistral-7b --output bench/results/h200/calibration.csv

Tokens are random too: neither changes what is computed. The first calibration of the process is timed apart, as the row
``first``: it pays for what CUDA and its libraries set up once. Memory is that of torch's allocator, the weights in it.
"""

from __future__ import annotations

import time

import torch

import cats_ext
from bench.lib import machine
from bench.lib.command import command
from bench.lib.models import CONFIGS, random_model
from bench.lib.results import ResultFile


def main() -> None:
    parser = command(__spec__, __doc__, "CSV file of the results")
    parser.add_argument("--model", choices=CONFIGS, default="mistral-7b")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window", type=int, default=1024, help="tokens")
    args = parser.parse_args()

    device = machine.default_device()
    on_gpu = device.type == "cuda"
    config = CONFIGS[args.model]()
    model = random_model(config, torch.bfloat16 if on_gpu else torch.float32, device).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    shape = (args.windows, args.window)
    ids = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    results = ResultFile(args.output, machine.facts(device, args.commit), digits=4)

    for name, allocation in (("first", "uniform"), ("again", "uniform"), ("again", "search")):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        cats_ext.calibrate(model, ids, allocation=allocation, sequence_length=args.window, progress=False)
        row = {"model": args.model, "allocation": allocation, "run": name, "tokens": ids.numel()}
        row |= {"seconds": time.perf_counter() - started, "weights_gb": weights / 1e9}
        row["beside_weights_gb"] = torch.cuda.max_memory_allocated() / 1e9 - weights / 1e9 if on_gpu else ""
        results.add(row)
        print(*(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
