"""Decoding over several GPUs with transformers' tensor parallelism, dense and with CATS.

    python bench serving.tensor_parallel -h
    torchrun --nproc-per-node 2 bench serving.tensor_parallel --output bench/results/h200/tensor_parallel.csv
    torchrun --nproc-per-node 2 bench serving.tensor_parallel --compile --output bench/results/h200/tensor_parallel.csv

Layers of Llama-3-70B's shape with random weights, thresholds calibrated on random tokens with the paper's rule, one
sequence. Dense and sparse steps are the model's own forward on the same weights, with --compile both compiled, each
captured in a CUDA graph on every rank, and replayed in turns. Beside the time of a step: that of the step without its
all-reduces, if it is not compiled, which shows what they take with the waiting for the slowest rank (its masks are
others, of about the same size), that of an all-reduce by itself, the busiest rank's kept rows to the mean in one step,
and the read limit of the first GPU. `serving.scaling` predicts other numbers of ranks from the rows that are not
compiled. Appends, so that runs with 2, 4 and 8 ranks share a file. Without a GPU it runs on gloo, uncaptured, as a
test.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig

import cats_ext
from bench.lib import machine
from bench.lib.command import command
from bench.lib.graphs import Captured, Run
from bench.lib.models import random_model
from bench.lib.read_limit import gpu_read_limit
from bench.lib.results import ResultFile
from bench.lib.timing import device_seconds, host_seconds, in_turns
from cats_ext.cli import torchrun
from cats_ext.decode.session import Session
from cats_ext.patching.apply import sparse_mlps

SHAPES = {
    "llama-3-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 8},
}
PROMPT, LENGTH, VOCABULARY = 64, 256, 8192
REPLAYS = 20  # between two looks at the clock


def load(shape: str, layers: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model over all ranks, whose checkpoint the first one makes."""
    config = LlamaConfig(**SHAPES[shape], num_key_value_heads=8, vocab_size=VOCABULARY, num_hidden_layers=layers)
    fast = "/dev/shm" if Path("/dev/shm").is_dir() else None
    names = [tempfile.mkdtemp(dir=fast) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names, device=device)
    directory = Path(names[0])
    if dist.get_rank() == 0:
        random_model(config, dtype, device).save_pretrained(directory)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    dist.barrier()
    parallel = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, distributed_config=parallel)
    dist.barrier()
    if dist.get_rank() == 0:
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
    return model.eval().requires_grad_(False)


def captured(run: Run) -> Run:
    return Captured(run, warmup=3) if torch.cuda.is_available() else run


def seconds(run: Run) -> float:
    def repeatedly() -> None:
        for _ in range(REPLAYS):
            run()

    dist.barrier()
    return (device_seconds if torch.cuda.is_available() else host_seconds)(repeatedly) / REPLAYS


def all_reduce_seconds(model: nn.Module, count: int, rounds: int) -> float:
    """Of one of a token's row, among ``count`` of them."""
    row = torch.zeros(1, 1, model.config.hidden_size, dtype=model.dtype, device=model.device)
    run = captured(lambda: [dist.all_reduce(row) for _ in range(count)])
    return statistics.median(seconds(run) for _ in range(rounds)) / count


def busiest_to_mean(model: nn.Module, step: Run) -> float:
    """Kept rows of the busiest rank to the mean, over the layers of one step."""
    modules = list(sparse_mlps(model).values())
    cats_ext.reset_sparsity(model)
    with cats_ext.track_sparsity(model):
        step()
    kept = torch.stack([module.counts[1:].sum() for module in modules]).double()
    ranks = [torch.empty_like(kept) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, kept)
    rows = torch.stack(ranks)
    return (rows.amax(0) / rows.mean(0).clamp(min=1)).mean().item()


class Steps:
    """The dense and the sparse step of a model, of the token after a prompt, and each without its all-reduces; of a
    compiled one not that, for a compiled step keeps its all-reduces.
    """

    def __init__(self, model: nn.Module, configs: dict[float, cats_ext.CatsConfig], compile: bool) -> None:
        self.model, self.configs = model, configs
        session = Session(model, 1, LENGTH, False, (), False, compile)
        ids = torch.randint(0, VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(1)).to(model.device)
        session.start(ids, None, [], False)
        session.prefill()
        session.position.fill_(PROMPT)
        self.step = session._step
        self.runs: dict[tuple[bool, bool], Run] = {}
        self.variants = [(sparsity, alone) for sparsity in (0.0, *configs) for alone in (False, True)[: 2 - compile]]
        for dense in (True, False):
            for alone in (False, True)[: 2 - compile]:
                with (
                    cats_ext.masking_disabled(model) if dense else nullcontext(),
                    patch.object(dist, "all_reduce", lambda *_, **__: None) if alone else nullcontext(),
                ):
                    self.runs[dense, alone] = captured(self.step)

    def seconds(self, variant: tuple[float, bool]) -> float:
        sparsity, alone = variant
        if sparsity:
            for module in sparse_mlps(self.model).values():
                module.set_thresholds(self.configs[sparsity])
        if torch.cuda.is_available():
            return seconds(self.runs[not sparsity, alone])
        with (  # nothing has been captured
            nullcontext() if sparsity else cats_ext.masking_disabled(self.model),
            patch.object(dist, "all_reduce", lambda *_, **__: None) if alone else nullcontext(),
        ):
            return seconds(self.step)


def main() -> None:
    parser = command(__spec__, __doc__, "CSV file for the results; rows are appended")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-70b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="the model's forward, dense and sparse")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    options = {"device_id": device} if cuda else {}
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=5), **options)
    first = dist.get_rank() == 0
    result = ResultFile(
        arguments.output if first else None, machine.facts(device, arguments.commit), append=True, digits=5
    )
    with torch.no_grad():
        model = load(arguments.shape, arguments.layers, torch.bfloat16 if cuda else torch.float32, device)
        ids = torch.randint(0, VOCABULARY, (1024,), generator=torch.Generator().manual_seed(0))
        thresholds = cats_ext.calibrate(model, ids, rule="plain", sparsity=0.5, sequence_length=512, progress=False)
        configs = {sparsity: thresholds.at_sparsity(sparsity) for sparsity in arguments.sparsities}
        cats_ext.apply_cats(model, thresholds)
        steps = Steps(model, configs, arguments.compile)
        found = in_turns(steps.variants, steps.seconds, arguments.rounds, 1)
        times = {variant: statistics.median(values) for variant, values in zip(steps.variants, found, strict=True)}
        reduce_seconds = all_reduce_seconds(model, 2 * arguments.layers, arguments.rounds)
        limit = gpu_read_limit() if cuda and first else float("nan")
        dist.barrier()
        for sparsity in (0.0, *configs):
            imbalance = 1.0
            if sparsity:
                steps.seconds((sparsity, False))  # sets the thresholds
                imbalance = busiest_to_mean(model, steps.step)
            step, alone = times[sparsity, False], times.get((sparsity, True))
            row: dict[str, Any] = {
                "shape": arguments.shape,
                "hidden_size": model.config.hidden_size,
                "intermediate_size": model.config.intermediate_size,
                "kv_size": model.config.num_key_value_heads * model.config.head_dim,
                "element_bytes": model.dtype.itemsize,
                "layers": arguments.layers,
                "compiled": int(arguments.compile),
                "ranks": dist.get_world_size(),
                "sparsity": sparsity,
                "tokens_per_s": 1 / step,
                "speedup": times[0.0, False] / step,
                "step_us": step * 1e6,
                "without_all_reduce_us": "" if alone is None else alone * 1e6,
                "all_reduce_share": "" if alone is None else 1 - alone / step,
                "all_reduce_us": reduce_seconds * 1e6,
                "busiest_to_mean": imbalance,
                "read_gb_s": limit,
            }
            if first:
                print({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
                result.add(row)
        del steps  # NCCL does not end before the graphs that have its kernels
        gc.collect()
    torchrun.end()


if __name__ == "__main__":
    main()
