"""The sums and histograms that calibration keeps of one MLP, pass by pass, and the statistics made from them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cats_ext.ops.reference import ACTIVATIONS
from cats_ext.patching.detection import GatedMLP
from cats_ext.thresholds.histogram import Histogram
from cats_ext.thresholds.statistics import JointHistogram, LayerStatistics

_UNREACHED = "no token of the data reached {}; of a multimodal model, calibrate and patch the language model alone"
# Activations at a time: the temporaries stay in a CPU's cache, which is several times faster, and take 60 MB elsewhere.
_CPU_CHUNK, _CHUNK = 1 << 18, 1 << 20
# Tensors of an accumulator that a checkpoint keeps under their own names; None where there are none.
_KEPT = ("tokens", "loss_tokens", "up_squares", "row_squares", "down_weight", "gate_weight", "losses")


class LayerAccumulator:
    """Sums and histograms over the tokens seen; their size does not depend on the number of tokens.

    The weight of neuron j in the gate's score is ``c_j ** gate_power``, and ``n_j`` weighs its contribution:

    - importance "norm": ``n_j = norm(Wd_j)``, ``c_j = rms(u_j) n_j``.
    - importance "gradient": with the gradient g of log p(y) at the MLP's output, ``n_j = rms(Wd_j . g)`` and
      ``c_j = rms(u_j Wd_j . g)``: to second order, how much dropping the neuron changes the model's predictions.

    Experts of a mixture are counted together, over the tokens routed to each, and without weights. Of a tensor-parallel
    model, each rank counts its own neurons, and what concerns all of them is added up between the passes.

    Args:
        mlp: of a dense model.
        gate_power: exponent of the gate's weights in this layer.
        importance: "norm" or "gradient".
        inputs: whether the MLP's inputs are counted too.
    """

    def __init__(self, mlp: GatedMLP, gate_power: float, importance: str, inputs: bool = False) -> None:
        self.mlp, self.gate_power = mlp, gate_power
        self.act = ACTIVATIONS[mlp.activation]
        weight = mlp.dense_down_weight().detach()
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        if mlp.experts is None:
            self.down_weight = torch.linalg.vector_norm(weight, dim=0, dtype=self.wide).float()
        else:
            self.down_weight = torch.ones((), device=weight.device)
        self.gate_weight: Tensor | None = None
        self.tokens = torch.zeros((), dtype=torch.int64)
        self.up_squares = torch.zeros(mlp.neurons, dtype=torch.float64, device=weight.device)
        self.row_squares = torch.zeros_like(self.up_squares) if importance == "gradient" else None
        self.gate = Histogram(device=weight.device)
        self.joint: JointHistogram | None = None
        self.inputs = Histogram(device=weight.device) if inputs else None
        self.losses: Tensor | None = None  # float64 [P], sums over the tokens of loss_tokens
        self.loss_tokens = torch.zeros((), dtype=torch.int64)

    # --- observers, one for each pass: gate and up are [rows, I], gradient and x, the input, are [rows, H] ------------

    def add_up(self, gate: Tensor, up: Tensor) -> None:
        self.tokens += len(up)
        for (part,) in _pieces(up):
            self.up_squares += part.double().square().sum(0)

    def add_gradient(self, gate: Tensor, up: Tensor, gradient: Tensor) -> None:
        self.tokens += len(up)
        for row, part in _pieces(self._row_gradient(gradient), up):
            self.row_squares += row.double().square().sum(0)
            self.up_squares += (row * part.float()).double().square().sum(0)

    def add_activations(self, gate: Tensor, up: Tensor) -> None:
        for gate_part, up_part in _pieces(gate, up):
            v = self.act(gate_part.float())
            score = self._score(v)
            self.gate.add(score)
            if self.joint is not None:
                self.joint.add(score, v * up_part.float() * self.down_weight)

    def add_inputs_and_activations(self, gate: Tensor, up: Tensor, x: Tensor) -> None:
        for (part,) in _pieces(x):
            self.inputs.add(part)
        self.add_activations(gate, up)

    def add_losses(self, gate: Tensor, up: Tensor, gradient: Tensor, cuts: list[tuple[float, float]]) -> None:
        """Add the loss of every option: half the square of ``g`` times the part of the output that is dropped.

        Each product ``h_j Wd_j . g`` is added to a cell, which is numbered by how many of the gate's and of the
        contribution's cuts the neuron reaches. What an option keeps is the sum of the cells beyond its two cuts.

        Args:
            cuts: of the gate score and of the contribution, by option.
        """
        for part in _pieces(gate, up, self._row_gradient(gradient)):
            sums = self._losses(*part, cuts)
            self.losses = sums if self.losses is None else self.losses + sums
        self.loss_tokens += len(gate)

    def _losses(self, gate: Tensor, up: Tensor, row: Tensor, cuts: list[tuple[float, float]]) -> Tensor:
        v = self.act(gate.float())
        h = v * up.float()
        product = h * row
        (gate_cuts, gate_places), (down_cuts, down_places) = (
            column.unique(return_inverse=True) for column in torch.tensor(cuts, device=v.device).unbind(1)
        )
        columns = len(down_cuts) + 1
        cell = torch.bucketize(self._score(v).abs(), gate_cuts, right=True) * columns
        cell += torch.bucketize((h * self.down_weight).abs(), down_cuts, right=True)
        table = torch.zeros(len(h), (len(gate_cuts) + 1) * columns, dtype=torch.float32, device=v.device)
        table = table.scatter_add_(1, cell, product).view(len(h), -1, columns)
        kept = table.flip(1, 2).cumsum(1).cumsum(2).flip(1, 2)  # [T, reached i gate cuts or more, j down cuts or more]
        dropped = self._summed(product.sum(1, keepdim=True) - kept[:, gate_places + 1, down_places + 1])
        return dropped.double().square().sum(0) / 2

    def _score(self, v: Tensor) -> Tensor:
        return v if self.gate_weight is None else v * self.gate_weight

    def _summed(self, values: Tensor) -> Tensor:
        """Over the ranks of a tensor-parallel model."""
        return values if self.mlp.shard is None else self.mlp.shard.sum(values)

    def _row_gradient(self, gradient: Tensor) -> Tensor:
        """``Wd_j . g`` of every neuron, ``[T, I]``."""
        return gradient.to(self.wide) @ self.mlp.dense_down_weight().detach().to(self.wide)

    # --- between the passes ------------------------------------------------------------------------------------------

    def finish_weights(self) -> None:
        if int(self.tokens) == 0:
            raise ValueError(_UNREACHED.format(self.mlp.name))
        squares = self.up_squares / int(self.tokens)
        if self.row_squares is not None:
            self.down_weight = (self.row_squares / int(self.tokens)).sqrt().float()
            importance = squares.sqrt().float()
        else:
            importance = squares.sqrt().float() * self.down_weight
        if int(self._summed((~importance.isfinite()).sum())):
            raise ValueError(f"activations of {self.mlp.name}: the mean square of up is NaN or infinite")
        if self.gate_power:
            self.gate_weight = importance**self.gate_power

    def finish_sample(self) -> None:
        """From what was counted of a part of the text, the bins in which all of it is counted."""
        self.gate.counts = self._summed(self.gate.counts)
        self.joint = JointHistogram.over(self.gate)
        self.gate = Histogram(device=self.gate.counts.device)

    def finish_activations(self) -> None:
        self.gate.counts = self._summed(self.gate.counts)
        if self.joint is not None:
            self.joint.counts = self._summed(self.joint.counts)
        if self.gate.total == 0:
            raise ValueError(_UNREACHED.format(self.mlp.name))
        if self.inputs is not None and self.inputs.zeros == self.inputs.total:
            raise ValueError(f"all inputs of {self.mlp.name} are zero: no threshold can be set")
        if self.gate.zeros == self.gate.total:
            raise ValueError(f"all gate activations of {self.mlp.name} are zero: no threshold can be set")

    def mean_losses(self) -> Tensor:
        return self.losses.cpu() / int(self.loss_tokens)

    def statistics(self) -> LayerStatistics:
        gate, inputs = self.gate.cpu(), None if self.inputs is None else self.inputs.cpu()
        weights = None if self.gate_weight is None else self._whole(self.gate_weight).cpu()
        if self.joint is None:
            return LayerStatistics(gate, None, weights)
        down_weight = None if self.mlp.experts else self._whole(self.down_weight).cpu()
        return LayerStatistics(gate, self.joint.trimmed(), weights, down_weight, inputs)

    def _whole(self, values: Tensor) -> Tensor:
        return values if self.mlp.shard is None else self.mlp.shard.whole(values)

    # --- checkpoints: what an interrupted calibration continues from --------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        tensors = {key: getattr(self, key) for key in _KEPT} | {"gate_counts": self.gate.counts}
        if self.joint is not None:
            tensors |= {"joint_edges": self.joint.edges, "joint_counts": self.joint.counts}
        if self.inputs is not None:
            tensors["input_counts"] = self.inputs.counts
        return {key: tensor for key, tensor in tensors.items() if tensor is not None}

    def load(self, tensors: dict[str, Tensor]) -> None:
        device = self.down_weight.device
        moved = {key: tensor if key.endswith("tokens") else tensor.to(device) for key, tensor in tensors.items()}
        for key in _KEPT:
            setattr(self, key, moved.get(key))
        self.gate.counts = moved["gate_counts"]
        if "joint_edges" in moved:
            self.joint = JointHistogram(moved["joint_edges"], moved["joint_counts"])
        if self.inputs is not None:
            self.inputs.counts = moved["input_counts"]


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each ``[rows, I]`` at a time."""
    values = _CPU_CHUNK if tensors[0].device.type == "cpu" else _CHUNK
    rows = max(1, values // tensors[0].shape[1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
