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


class Failure:
    """The first error of this rank, kept until all ranks of ``group`` are told: they would wait for one that stopped.

    Without a group (None: a model of one process) errors are raised where they are.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._error: Exception | None = None
        self._step = self._steps = 0  # at which it was raised, and so far: on all ranks the same ones

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep an error that is raised inside, which must not leave out communication, and go on after it."""
        self._steps += 1
        try:
            yield
        except Exception as error:
            if self._group is None:
                raise
            if self._error is None:
                self._error, self._step = error, self._steps

    def raise_together(self) -> None:
        """Raise on all ranks the error of the earliest step; later ones may follow from what that rank has sent."""
        if self._group is None:
            return
        own = None if self._error is None else (self._step, f"{type(self._error).__name__}: {self._error}")
        try:
            told = _gathered(self._group, own)
        except Exception as lost:  # another rank has died
            if self._error is None:
                raise
            raise self._error from (self._error.__cause__ or lost)
        failed = [(said[0], rank) for rank, said in enumerate(told) if said is not None]
        if not failed:
            return
        first, rank = min(failed)
        if own is not None and own[0] == first:
            raise self._error
        raise ValueError(f"rank {rank} has stopped with {told[rank][1]}")


@contextmanager
def raised_together(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Raise an error of one rank on all of them. Inside there must be no communication."""
    failure = Failure(group)
    with failure.kept():
        yield
    failure.raise_together()


def check_same(group: dist.ProcessGroup | None, name: str, digest: Callable[[], object]) -> None:
    """Raise ValueError on all ranks unless they have the same ``digest``, of what the message calls ``name``."""
    if group is None:
        return
    with raised_together(group):
        own = digest()
    values = _gathered(group, own)
    other = next((rank for rank, said in enumerate(values) if said != values[0]), None)
    if other is not None:
        raise ValueError(f"{name} must be the same on all ranks, but rank {other} has another one than rank 0")


def _gathered(group: dist.ProcessGroup, value: object) -> list:
    """``value`` of every rank."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
