"""The part of an MLP's neurons that one rank has, and what the ranks of a group tell each other.

Whatever communicates has to be called on all ranks of the group, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Shard:
    """The ``neurons`` of an MLP that this rank has, from ``first`` on, of ``total`` on all ranks of ``group``."""

    group: dist.ProcessGroup
    device: torch.device  # on which the group communicates
    first: int
    neurons: int
    total: int

    def own(self, values: Tensor | None) -> Tensor | None:
        """This rank's part of ``values``: ``[I]``, or ``[]`` for all neurons, which stays as it is."""
        if values is None or values.dim() == 0:
            return values
        return values[self.first : self.first + self.neurons]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        total = values.to(self.device, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(values.device)

    def whole(self, values: Tensor | None) -> Tensor | None:
        """``[I]`` from the ``[neurons]`` of each rank; ``[]`` stays as it is."""
        if values is None or values.dim() == 0:
            return values
        whole = values.new_zeros(self.total)
        whole[self.first : self.first + self.neurons] = values
        return self.sum(whole)


@contextmanager
def raised_together(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Raise an error of one rank on all: the others would wait for that rank in their next communication.

    Inside there must be no communication. None is a model of one process.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if group is None:
            raise
        error = caught
    if group is None:
        return
    messages = _gathered(group, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = next((rank for rank, message in enumerate(messages) if message is not None), None)
    if failed is not None:
        raise ValueError(f"rank {failed} has stopped with {messages[failed]}")


def check_same(group: dist.ProcessGroup | None, name: str, digest: Callable[[], object]) -> None:
    """Raise ValueError on all ranks unless they have the same ``digest``, of what the message calls ``name``."""
    if group is None:
        return
    values = _gathered(group, digest())
    other = next((rank for rank, said in enumerate(values) if said != values[0]), None)
    if other is not None:
        raise ValueError(f"{name} must be the same on all ranks, but rank {other} has another one than rank 0")


def _gathered(group: dist.ProcessGroup, value: object) -> list:
    """``value`` of every rank."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
