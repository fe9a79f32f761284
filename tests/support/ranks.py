"""Runs a function on several processes that make a process group (gloo), as torchrun would; or torchrun itself."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

# transformers' tensor parallelism makes DTensors and replaces forward since then.
takes_tensor_parallelism = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.17"), reason="needs tensor parallelism as of transformers 5.17"
)
SECONDS = 300.0  # for all of a call
GROUP_SECONDS = 120.0  # after which a rank stops waiting for others


class RankError(Exception):
    """What a rank has raised, as text."""


def on_ranks(function: Callable[..., Any], *arguments: Any, ranks: int = 2, fail: bool = False) -> list[Any]:
    """What ``function(*arguments)`` returns on each rank; a module's own function, imported there.

    Args:
        fail: errors are returned, as :class:`RankError`; otherwise the first is raised.
    """
    context = multiprocessing.get_context("forkserver")
    # Not cats_ext: the server would look for it in the working directory first, in a clone for the sources.
    context.set_forkserver_preload(["transformers", "transformers.models.llama.modeling_llama"])
    with tempfile.TemporaryDirectory() as scratch:
        ends, processes = [], []
        for rank in range(ranks):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(rank, ranks, scratch, theirs, function, arguments))
            process.start()
            theirs.close()
            ends.append(mine)
            processes.append(process)
        results = [_result(end) for end in ends]
        for process in processes:
            process.join(5)
            process.kill()
    for result in results:
        if isinstance(result, RankError) and not fail:
            raise result
    return results


def run_torchrun(*command: object, count: int = 2, cwd: Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run([*launcher, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=240)


def _result(end: Connection) -> Any:
    if not wait([end], SECONDS):
        return RankError(f"no answer in {SECONDS:.0f} s")
    try:
        return pickle.loads(end.recv_bytes())
    except EOFError:
        return RankError("the process has ended")


def _run(rank: int, ranks: int, scratch: str, end: Connection, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    store = f"file://{Path(scratch) / 'store'}"
    dist.init_process_group("gloo", store, timedelta(seconds=GROUP_SECONDS), ranks, rank)
    try:
        result = function(*arguments)
    except Exception as error:
        traceback.print_exc()
        result = RankError(f"{type(error).__name__}: {error}")
    end.send_bytes(pickle.dumps(result))  # by value: send() shares the memory of tensors, which ends with the process
    if not isinstance(result, RankError):
        dist.barrier()
        dist.destroy_process_group()


def load_parallel(directory: Path, **options: Any) -> torch.nn.Module:
    """The model of a checkpoint, tensor-parallel over all ranks."""
    from transformers.distributed import DistributedConfig

    parallel = DistributedConfig(tp_plan=options.pop("tp_plan", "auto"))
    return AutoModelForCausalLM.from_pretrained(directory, distributed_config=parallel, **options).eval()
