"""How sparse the patched MLPs really were, against their targets, on the tokens seen while tracking was on."""

from __future__ import annotations

import io
import warnings
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from cats_ext.parallel.ranks import raised_together
from cats_ext.parallel.sharding import group_of
from cats_ext.patching.apply import patched_mlps
from cats_ext.patching.mlp import PatchedMLP
from cats_ext.thresholds.exact import ExactConfig
from cats_ext.thresholds.fit import weight_of


class SparsityDriftWarning(UserWarning):
    """Layers skip clearly more or fewer neurons than they were calibrated to."""


_INPUT_SHARES = ("input_sparsity", "input_target")


@dataclass(frozen=True)
class LayerSparsity:
    """One MLP: the shares of token-neuron pairs skipped, and of token-input pairs, and those the config aimed at."""

    name: str
    tokens: int
    matrix_bytes: tuple[int, int, int]  # of gate, up and down; of the experts that a token takes
    up_sparsity: float
    up_target: float
    down_sparsity: float
    down_target: float
    input_sparsity: float = 0.0  # of the gate's columns
    input_target: float | None = None  # None where inputs are not tested

    @property
    def weight_bytes(self) -> int:
        return sum(self.matrix_bytes)

    @property
    def bytes_share(self) -> float:
        """Share of the MLP's weight bytes that a token by itself reads (decode at batch size 1)."""
        gate, up, down = self.matrix_bytes
        read = gate * (1 - self.input_sparsity) + up * (1 - self.up_sparsity) + down * (1 - self.down_sparsity)
        return read / self.weight_bytes

    @property
    def bytes_read(self) -> float:
        """Weight bytes that the counted tokens read, each by itself."""
        return self.tokens * self.bytes_share * self.weight_bytes

    @property
    def drift(self) -> float:
        """By how much the sparsity reached differs from its target, the largest of the matrices."""
        return max(abs(reached - target) for _, reached, target in self.shares())

    def shares(self) -> list[tuple[str, float, float]]:
        """By matrix the sparsity reached and its target; of inputs, where they are tested."""
        shares = [("up", self.up_sparsity, self.up_target), ("down", self.down_sparsity, self.down_target)]
        return shares if self.input_target is None else [*shares, ("input", self.input_sparsity, self.input_target)]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        absent = _INPUT_SHARES if self.input_target is None else ()
        numbers = {key: value for key, value in asdict(self).items() if key not in absent}
        return numbers | {"weight_bytes": self.weight_bytes, "bytes_share": self.bytes_share}


@dataclass(frozen=True)
class SparsityReport:
    """Reached against target sparsity, per layer and on average over layers. Prints as a table."""

    layers: list[LayerSparsity]

    def _mean(self, attribute: str) -> float:
        return sum(getattr(layer, attribute) for layer in self.layers) / len(self.layers)

    @property
    def tokens(self) -> int:
        """Tokens counted, the largest number over the layers."""
        return max(layer.tokens for layer in self.layers)

    @property
    def up_sparsity(self) -> float:
        return self._mean("up_sparsity")

    @property
    def down_sparsity(self) -> float:
        return self._mean("down_sparsity")

    @property
    def input_sparsity(self) -> float:
        return self._mean("input_sparsity")

    @property
    def _tests_inputs(self) -> bool:
        return self.layers[0].input_target is not None

    @property
    def bytes_share(self) -> float:
        return self._mean("bytes_share")

    @property
    def bytes_read(self) -> float:
        return sum(layer.bytes_read for layer in self.layers)

    def drifted(self, tolerance: float) -> list[LayerSparsity]:
        """The layers whose sparsity is further than ``tolerance`` from its target, the furthest first."""
        return sorted((layer for layer in self.layers if layer.drift > tolerance), key=lambda layer: -layer.drift)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return {
            "tokens": self.tokens,
            "bytes_read": self.bytes_read,
            "up_sparsity": self.up_sparsity,
            "up_target": self._mean("up_target"),
            "down_sparsity": self.down_sparsity,
            "down_target": self._mean("down_target"),
            **{share: self._mean(share) for share in _INPUT_SHARES if self._tests_inputs},
            "bytes_share": self.bytes_share,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def __rich__(self) -> Table:
        inputs = self._tests_inputs
        columns = ("tokens", "up", "target", "down", "target", *(("input", "target") * inputs), "MLP bytes")
        table = Table("layer", title="sparsity reached (share of neurons skipped)")
        for column in columns:
            table.add_column(column, justify="right")

        def row(name: str, tokens: int, *shares: float) -> None:
            table.add_row(name, str(tokens), *(f"{share:.1%}" for share in shares))

        shares = ("up_sparsity", "up_target", "down_sparsity", "down_target", *(_INPUT_SHARES * inputs), "bytes_share")
        for layer in self.layers:
            row(layer.name, layer.tokens, *(getattr(layer, share) for share in shares))
        table.add_section()
        row("mean", self.tokens, *(self._mean(share) for share in shares))
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120)
        console.print(self)
        return console.file.getvalue()


def track_sparsity(model: nn.Module, enabled: bool = True) -> AbstractContextManager:
    """Count from now on how many neurons each patched MLP keeps (or stop counting).

    Use as a call, or as ``with track_sparsity(model): ...``, which puts the earlier setting back on exit. Counts stay
    until :func:`reset_sparsity`. All positions of a batch count, padding included. Off by default because counting
    costs time.

    Args:
        model: patched.
        enabled: False to stop counting.

    Returns:
        A context manager that restores the earlier setting.

    Raises:
        ValueError: the model is not patched.
    """
    before = {module: module.forward_settings.tracking for module in patched_mlps(model).values()}

    def put_back() -> None:
        for module, tracking in before.items():
            if isinstance(module, PatchedMLP):  # not removed meanwhile
                module.track(tracking)

    try:
        for module in before:
            module.track(enabled)
        on_exit = ExitStack()
        for _ in range(2):  # also if the first call is interrupted
            on_exit.callback(put_back)
        return on_exit
    except BaseException:
        put_back()
        raise


def _row_bytes(module: PatchedMLP) -> tuple[int, int, int]:
    """Bytes of a neuron's row of gate, up and down. Without a gate the up projection counts as one: it is all read."""
    down = module.cats.down_weight
    if down.dtype != torch.uint8:
        size = module.cats.target.hidden_size * down.element_size()
        return size, size if module.cats.matrices == 3 else 0, size
    gate, up = weight_of(module, "gate_proj"), weight_of(module, "up_proj")
    if gate is None:
        gate = up = weight_of(module, "gate_up_proj")
    return gate.shape[1], up.shape[1], down.shape[1]


def reset_sparsity(model: nn.Module) -> None:
    """Forget what has been counted in a patched ``model``.

    Raises:
        ValueError: the model is not patched.
    """
    for module in patched_mlps(model).values():
        module.counts.zero_()


def sparsity_report(model: nn.Module, *, tolerance: float | None = None) -> SparsityReport:
    """The sparsity reached on the tokens counted since the last reset. Waits for the device.

    Of a tensor-parallel model it is that of all ranks, all of which have to call it.

    Args:
        tolerance: if given, a :class:`SparsityDriftWarning` names the layers that are further than this from the
            sparsity they were calibrated to (0.05 is five points): text unlike the calibration's is the usual cause.

    Returns:
        Shares of neurons skipped and of bytes read, of each layer and of the model.

    Raises:
        ValueError: the model is not patched, nothing has been counted, or the tolerance is no share.
    """
    with raised_together(group_of(model)):
        if tolerance is not None and not 0 <= tolerance <= 1:
            raise ValueError(f"tolerance must be in [0, 1], got {tolerance}")
        patched = patched_mlps(model)
    layers = []
    for name, module in patched.items():
        shard = module.cats.shard
        counts = module.counts if shard is None else shard.sum(module.counts)
        evaluated, kept_up, kept_down, *kept_inputs = counts.tolist()
        if evaluated == 0:
            raise ValueError(
                f"no token has been counted in {name}: call track_sparsity(model), run the model, then sparsity_report"
            )
        state, target = module.cats, module.cats.target
        neurons = target.intermediate_size * state.experts_per_token
        up_sparsity, down_sparsity = 1 - kept_up / evaluated, 1 - kept_down / evaluated
        tokens, of_inputs = evaluated // neurons, {}
        if kept_inputs:
            reached = 1 - kept_inputs[0] / (tokens * target.hidden_size)
            of_inputs = {"input_sparsity": reached, "input_target": target.input_sparsity}
        if isinstance(state.config, ExactConfig):  # any sparsity is the model's own
            target = replace(target, up_sparsity=up_sparsity, down_sparsity=down_sparsity)
        layers.append(
            LayerSparsity(
                name=name,
                tokens=tokens,
                matrix_bytes=tuple(neurons * size for size in _row_bytes(module)),
                up_sparsity=up_sparsity,
                up_target=target.up_sparsity,
                down_sparsity=down_sparsity,
                down_target=target.down_sparsity,
                **of_inputs,
            )
        )
    report = SparsityReport(layers)
    drifted = [] if tolerance is None else report.drifted(tolerance)
    if drifted:
        worst = drifted[0]
        warnings.warn(
            f"sparsity is more than {tolerance:.1%} from its target in {len(drifted)} of {len(layers)} layers, "
            f"furthest in {worst.name}: "
            + ", ".join(f"{matrix} {reached:.1%} of {target:.1%}" for matrix, reached, target in worst.shares())
            + ". Calibrate on text like this",
            SparsityDriftWarning,
            stacklevel=2,
        )
    return report
