"""The program under torchrun: a process a rank, which load one model together. The first one writes what there is."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from packaging.version import Version

PARALLEL = {"generate": "generate", "evaluate": "eval"}  # functions that take a tensor-parallel model, as commands
OLDEST = "5.17"  # transformers whose tensor parallelism patching knows


class ProcessCountError(ValueError):
    """A number of processes that a model or a command cannot have."""


def count() -> int:
    """The number of processes that torchrun has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def is_first() -> bool:
    return count() == 1 or os.environ["RANK"] == "0"


def local_rank() -> int:
    """The index of this process's device on its machine."""
    return int(os.environ["LOCAL_RANK"]) if count() > 1 else 0


@contextmanager
def started(function: str) -> Iterator[None]:
    """Inside, only the first rank writes to standard output.

    Raises:
        ProcessCountError: on every rank, for a command that is no parallel program.
    """
    if count() == 1:
        yield
        return
    if function not in PARALLEL:
        commands = " and ".join(f"cats {command}" for command in PARALLEL.values())
        raise ProcessCountError(f"torchrun must start {count()} processes of {commands} only, got cats {function}")
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def is_first_to_fail() -> bool:
    """For a rank with an error: whether no other has told of one before, which this one's may follow from."""
    if count() == 1:
        return True
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
        return store.add(f"cats_ext/errors/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # no store there
        return is_first()


def loading_options() -> dict[str, Any]:
    """What ``from_pretrained`` needs for a model over all ranks: the model's own plan."""
    if count() == 1:
        return {}
    import transformers

    if Version(transformers.__version__) < Version(OLDEST):
        raise ImportError(f"torchrun needs transformers {OLDEST} or newer, got {transformers.__version__}")
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=count())}


def check_heads(heads: int | None) -> None:
    """Raise :class:`ProcessCountError` for a model whose key-value heads the ranks cannot share evenly."""
    if heads is not None and heads % count():
        raise ProcessCountError(
            f"torchrun must start as many processes as divide the model's {heads} key-value heads, got {count()}"
        )


def end() -> None:
    """Leave the process group, and then the process with code 0 as ``os._exit`` does.

    Threads of gloo outlive their group. One that drops a tensor while Python ends its interpreter aborts the process
    (pytorch/pytorch#190489), and torchrun then takes a run with a whole result for a failure.
    """
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    atexit._run_exitfuncs()  # os._exit does not call them
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
