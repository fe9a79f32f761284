"""The statistics of a layer that calibration keeps: its thresholds for any sparsity follow from them without the model.

The first threshold needs the distribution of the gate score. The second is tested on the neurons that passed the first,
so it needs the joint distribution of gate score and contribution: a table of counts. That of the inputs needs their own
distribution; the other two are counted without it, of the dense model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from cats_ext.thresholds.histogram import MANTISSA_BITS, Histogram, bucket_edge, buckets_of, check_counts
from cats_ext.thresholds.rules import (
    Split,
    check_count,
    check_tensor,
    check_usable,
    has_down_threshold,
    has_input_threshold,
)

# This threshold drops zeros, and of other numbers the subnormal ones. One of these would not do: histograms count them
# as zeros, and where they are flushed to zero it would keep everything.
SMALLEST = torch.finfo(torch.float32).tiny
LARGEST = torch.finfo(torch.float32).max  # this one drops every finite number
GATE_BINS = 64  # of equal share; the contribution is assumed to be distributed alike within one
CONTRIBUTION_BITS = 4  # mantissa bits of the contribution's buckets, 6 % wide and interpolated inside
_COUNTS = (torch.int32, torch.int64)
_OF_HISTOGRAM = ("mantissa_bits", "first", "zeros", "total")
_NUMBERS = {*_OF_HISTOGRAM, *(f"input_{name}" for name in _OF_HISTOGRAM), "joint_first"}


@dataclass(eq=False)
class JointHistogram:
    """Counts over bins of the gate score and log-spaced buckets of the contribution.

    Attributes:
        edges: float32 ``[G]``, lower edges of the gate score's bins, ascending from 0, each one of a Histogram's.
        counts: int64 ``[G, B]``; the buckets are those of ``Histogram(CONTRIBUTION_BITS)``, from bucket ``first`` on.
        first: bucket of the first column.
    """

    edges: Tensor
    counts: Tensor
    first: int = 0

    @classmethod
    def over(cls, gate: Histogram) -> JointHistogram:
        """Empty, with bins of about equal share of what ``gate`` has counted, which may be a part of the text."""
        quantiles = [gate.quantile(i / GATE_BINS) for i in range(1, GATE_BINS)] if gate.total else []
        edges = torch.tensor(sorted({0.0, SMALLEST, *quantiles}), device=gate.counts.device)
        buckets = 256 << CONTRIBUTION_BITS
        return cls(edges, torch.zeros(len(edges), buckets, dtype=torch.int64, device=edges.device))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, JointHistogram)
            and torch.equal(self.edges.cpu(), other.edges.cpu())
            and self.trimmed().first == other.trimmed().first
            and torch.equal(self.trimmed().counts, other.trimmed().counts)
        )

    def add(self, gate: Tensor, contribution: Tensor) -> None:
        """Count pairs of ``|gate|`` and ``|contribution|``, float32 of one shape.

        Raises:
            ValueError: a contribution is NaN or infinite.
        """
        cells = self._first_cells.index_select(0, buckets_of(gate, MANTISSA_BITS))
        cells += buckets_of(contribution, CONTRIBUTION_BITS)
        counts = torch.bincount(cells, minlength=self.counts.numel()).view_as(self.counts)
        not_finite = int(counts[:, 255 << CONTRIBUTION_BITS :].sum())
        if not_finite:
            raise ValueError(f"{not_finite} of {cells.numel()} contributions are NaN or infinite")
        self.counts += counts

    @cached_property
    def _first_cells(self) -> Tensor:
        """The first cell of a gate score's bin, by the score's bucket: looked up, which is far faster than searched."""
        buckets = torch.arange(256 << MANTISSA_BITS, dtype=torch.int32, device=self.edges.device)
        bins = torch.bucketize(buckets, buckets_of(self.edges, MANTISSA_BITS), right=True, out_int32=True) - 1
        return bins * self.counts.shape[1]

    def quantile(self, threshold: float, below: float, q: float) -> float:
        """The contribution under which the share ``q`` of all pairs lies, with all under the gate's ``threshold``.

        Args:
            threshold: of the gate score.
            below: share of the gate scores below ``threshold``, in [0, q].
            q: in [0, 1).
        """
        bin_totals = self.counts.sum(1).double()
        total = float(bin_totals.sum())
        # Bins above the threshold count fully. The bin that it cuts counts in part, so that the share is right.
        above = self.edges > threshold
        passed = self.counts[above].sum(0).double()
        missing = (1 - below) * total - float(passed.sum())
        cut = int((~above).sum()) - 1
        if missing > 0 and bin_totals[cut] > 0:
            passed += self.counts[cut].double() * min(1.0, missing / float(bin_totals[cut]))
        to_drop = (q - below) * total
        reached = passed.cumsum(0)
        if to_drop <= 0 or float(reached[-1]) <= 0:
            return 0.0
        bucket = min(int(torch.searchsorted(reached, to_drop, right=True)), len(reached) - 1)
        inside = to_drop - (float(reached[bucket - 1]) if bucket else 0.0)
        low, high = (bucket_edge(self.first + bucket + i, CONTRIBUTION_BITS) for i in (0, 1))
        return low + (high - low) * min(1.0, inside / max(float(passed[bucket]), 1e-300))

    def trimmed(self) -> JointHistogram:
        """The same counts without the empty buckets at either end, on the CPU."""
        occupied = self.counts.sum(0).nonzero().flatten()
        low, high = (int(occupied[0]), int(occupied[-1]) + 1) if len(occupied) else (0, 1)
        return JointHistogram(self.edges.cpu(), self.counts[:, low:high].cpu().contiguous(), self.first + low)

    def validate(self) -> None:
        """Raise TypeError or ValueError unless edges and counts are those of a histogram, and fit each other."""
        columns = 256 << CONTRIBUTION_BITS
        check_tensor("joint_edges", self.edges, (torch.float32,), [(-1,)])
        check_tensor("joint_counts", self.counts, (torch.int64,), [(len(self.edges), -1)])
        check_count("joint_first", self.first, 0, columns - self.counts.shape[1])
        check_usable("joint_edges", self.edges)
        if not len(self.edges) or self.edges[0] != 0 or not bool((self.edges[1:] > self.edges[:-1]).all()):
            raise ValueError(f"joint_edges must ascend from 0, got {self.edges[:4].tolist()} and so on")
        check_counts("joint_counts", self.counts)


@dataclass
class LayerStatistics:
    """Distributions of one layer's activations on the calibration text; thresholds follow from them.

    With v = act(x Wg), u = x Wu, h = v u: the gate score of neuron j is ``|v_j| gate_weight_j``, its contribution
    ``|h_j| down_weight_j``; without weights the factors are 1.

    Attributes:
        gate: distribution of the gate score.
        joint: of gate score and contribution together; None if only the gate was calibrated.
        gate_weight, down_weight: float32 ``[I]``, or None.
        inputs: distribution of the MLP's inputs; None if they are not tested.
    """

    gate: Histogram
    joint: JointHistogram | None = None
    gate_weight: Tensor | None = field(default=None, compare=False)
    down_weight: Tensor | None = field(default=None, compare=False)
    inputs: Histogram | None = None

    def thresholds(self, up_sparsity: float, down_sparsity: float) -> tuple[Tensor, Tensor | None]:
        """``threshold`` (``[]``, or ``[I]`` with a gate weight) and ``down_threshold`` (likewise; None without joint).

        Args:
            up_sparsity: share of neurons to drop by the gate, in [0, 1).
            down_sparsity: share dropped by either test; at ``up_sparsity`` or below the second threshold is 0.
        """
        cut, down_cut = self.cuts(up_sparsity, down_sparsity)
        down_threshold = None if self.joint is None else _per_neuron(down_cut, self.down_weight)
        return _per_neuron(cut, self.gate_weight), down_threshold

    def cuts(self, up_sparsity: float, down_sparsity: float) -> tuple[float, float]:
        """The thresholds of gate score and contribution, before they are divided by the weights."""
        cut = _cut(self.gate, up_sparsity)
        if self.joint is None or down_sparsity <= up_sparsity:
            return cut, 0.0
        return cut, max(self.joint.quantile(cut, self.gate.share_below(cut), down_sparsity), SMALLEST)

    def input_threshold(self, input_sparsity: float) -> Tensor | None:
        """``[]``; None if inputs are not tested.

        Args:
            input_sparsity: share of inputs that count as zero for the gate, in [0, 1).
        """
        return None if self.inputs is None else torch.tensor(_cut(self.inputs, input_sparsity))

    def check_rule(self, name: str, rule: str, gate_weight: bool, down_weight: bool) -> None:
        """Raise ValueError unless there is what ``rule`` takes, with or without weights of the gate and of down."""
        two = has_down_threshold(rule)
        wanted = {"joint": two, "gate_weight": gate_weight, "down_weight": two and down_weight}
        for part, want in (wanted | {"inputs": has_input_threshold(rule)}).items():
            if (getattr(self, part) is not None) != want:
                which = "have" if want else "not have"
                raise ValueError(f"statistics[{name!r}] must {which} {part} with rule {rule!r} and the config's powers")

    def check_shapes(self, name: str, threshold: Tensor, down_threshold: Tensor | None) -> None:
        """Raise ValueError unless other thresholds, which these statistics give, could be written over these."""
        pairs = (("thresholds", threshold, self.gate_weight), ("down_thresholds", down_threshold, self.down_weight))
        for field_name, value, weight in pairs:
            want = () if weight is None else weight.shape
            if value is not None and value.shape != want:
                raise ValueError(
                    f"{field_name}[{name!r}] must have shape {list(want)}, as its statistics give it, got "
                    f"{list(value.shape)}: to set it by hand, leave them out (statistics={{}})"
                )

    # --- files: tensors for safetensors, and the numbers for JSON that describe them ----------------------------

    def pack(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors, and the numbers that :meth:`unpack` needs beside them."""
        counts, numbers = _pack_histogram(self.gate)
        tensors = {"gate_histogram": counts}
        if self.inputs is not None:
            tensors["input_histogram"], of_inputs = _pack_histogram(self.inputs)
            numbers |= {f"input_{name}": number for name, number in of_inputs.items()}
        if self.joint is not None:
            joint = self.joint.trimmed()
            tensors |= {"joint_edges": joint.edges, "joint_counts": _narrow(joint.counts)}
            numbers["joint_first"] = joint.first
        weights = {"gate_weight": self.gate_weight, "down_weight": self.down_weight}
        return tensors | {key: weight.cpu() for key, weight in weights.items() if weight is not None}, numbers

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], numbers: dict[str, int], intermediate_size: int) -> LayerStatistics:
        """Inverse of :meth:`pack`; removes what it uses from ``tensors``.

        Raises:
            KeyError, TypeError, ValueError: something is missing, out of its range, or does not fit.
        """
        if not isinstance(numbers, dict) or not numbers.keys() <= _NUMBERS:
            raise TypeError(f"statistics must be an object with {', '.join(sorted(_NUMBERS))}, got {numbers!r:.80}")
        gate = _unpack_histogram("gate_histogram", tensors, numbers)
        of_inputs = {key.removeprefix("input_"): n for key, n in numbers.items() if key.startswith("input_")}
        inputs = _unpack_histogram("input_histogram", tensors, of_inputs) if of_inputs else None
        joint = None
        if "joint_first" in numbers:
            edges, counts = tensors.pop("joint_edges"), tensors.pop("joint_counts")
            check_tensor("joint_counts", counts, _COUNTS, [(-1, -1)])
            joint = JointHistogram(edges, counts.long(), numbers["joint_first"])
            joint.validate()
        weights = {key: tensors.pop(key, None) for key in ("gate_weight", "down_weight")}
        for key, weight in weights.items():
            if weight is not None:
                check_tensor(key, weight, (torch.float32,), [(intermediate_size,)])
                check_usable(key, weight)
        return cls(gate, joint, inputs=inputs, **weights)


def thresholds_of(statistics: dict[str, LayerStatistics], targets: dict[str, Split]) -> dict[str, dict[str, Tensor]]:
    """Of a :class:`CatsConfig`, the fields with thresholds by layer, for ``targets`` by layer."""
    both = {name: statistics[name].thresholds(target.up, target.down) for name, target in targets.items()}
    inputs = {name: statistics[name].input_threshold(target.input) for name, target in targets.items()}
    return {
        "thresholds": {name: threshold for name, (threshold, _) in both.items()},
        "down_thresholds": {name: down for name, (_, down) in both.items() if down is not None},
        "input_thresholds": {name: threshold for name, threshold in inputs.items() if threshold is not None},
    }


def _cut(histogram: Histogram, share: float) -> float:
    """The value under which this share lies; one that drops nothing for a share of 0."""
    return max(histogram.quantile(share), SMALLEST) if share > 0 else 0.0


def _pack_histogram(histogram: Histogram) -> tuple[Tensor, dict[str, int]]:
    first, counts = histogram.trimmed(start=1)  # apart from the zeros, what is occupied is narrow
    numbers = (histogram.mantissa_bits, first, histogram.zeros, histogram.total)
    return _narrow(counts), dict(zip(_OF_HISTOGRAM, numbers, strict=True))


def _unpack_histogram(name: str, tensors: dict[str, Tensor], numbers: dict[str, int]) -> Histogram:
    bits, first, zeros = (numbers[key] for key in ("mantissa_bits", "first", "zeros"))
    counts = tensors.pop(name)
    check_tensor(name, counts, _COUNTS, [(-1,)])
    check_count("zeros", zeros)
    histogram = Histogram.from_trimmed(first, counts, bits, zeros)
    check_counts(name, histogram.counts)
    if histogram.total != numbers.get("total", histogram.total):  # not in files of version 2
        raise ValueError(f"{name} must count {numbers['total']!r:.50} values, got {histogram.total}")
    return histogram


def _per_neuron(cut: float, weight: Tensor | None) -> Tensor:
    """The threshold on ``|value|`` for a cut of ``|value| * weight``: the largest at weight 0: nothing is lost."""
    if weight is None:
        return torch.tensor(cut)
    return torch.zeros_like(weight) if cut == 0 else (cut / weight).clamp(max=LARGEST)


def _narrow(counts: Tensor) -> Tensor:
    return counts.to(torch.int32) if counts.numel() == 0 or int(counts.max()) < 2**31 else counts
