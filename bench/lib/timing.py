"""Timing: device events for what runs on a GPU, the host's clock for the rest, and turns between what is compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from bench.lib.graphs import Run

T = TypeVar("T")


def synchronize() -> None:
    if torch.cuda.is_initialized():  # is_available takes longer than a small MLP
        torch.cuda.synchronize()


def host_seconds(run: Run) -> float:
    """Seconds on the host until the device is done too."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def recorded(run: Run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Device events before and after ``run``, which need not be over yet."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    return start, end


def device_seconds(run: Run) -> float:
    start, end = recorded(run)
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def in_turns(things: Sequence[T], measure: Callable[[T], Any], rounds: int, warmup: int = 0) -> list[list[Any]]:
    """What ``measure`` finds for each of ``things`` in each round; a change of the machine's speed hits all of them."""
    found: list[list[Any]] = [[] for _ in things]
    for turn in range(-warmup, rounds):
        for thing, values in zip(things, found, strict=True):
            value = measure(thing)
            if turn >= 0:
                values.append(value)
    return found


def replay_seconds(replays: Sequence[Run], rounds: int) -> list[float]:
    """Median device seconds of each, in turns; the host queues all and waits once, so that the device never does."""
    pairs = in_turns(replays, recorded, rounds, warmup=3)
    torch.cuda.synchronize()
    return [statistics.median(start.elapsed_time(end) / 1e3 for start, end in each) for each in pairs]
