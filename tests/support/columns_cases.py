"""Calls of sparse_mlp_columns, as ``op_cases`` has them of sparse_mlp."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from support.op_cases import Case, make_case, set_thresholds, to_device
from torch import Tensor

from cats_ext.ops import reference


@dataclass
class ColumnsCase(Case):
    """One call of ``sparse_mlp_columns``: the first of ``weights`` is w_gate_t, ``[H, I]``."""

    input_threshold: Tensor = field(default_factory=lambda: torch.tensor(0.0))

    def args(self, **changed: Any) -> tuple:
        args = super().args(**changed)
        threshold = changed.get("input_threshold", self.input_threshold)
        return *args[:4], to_device(threshold, args[0].device), *args[4:]

    def kept_inputs(self) -> Tensor:
        """Bool, of the shape of x, on the CPU."""
        return ~(self.x.cpu().float().abs() < self.input_threshold)

    def expected(self) -> Tensor:
        return self._reference()

    def counts(self) -> Tensor:
        """What a counted call adds, with the reference's mask of neurons."""
        counts = torch.zeros(4, dtype=torch.int64)
        self._reference(counts=counts)
        return counts

    def _reference(self, **rest: Any) -> Tensor:
        names = ("x", "w_gate_t", "w_up", "w_down_t", "threshold", "down_threshold", "activation")
        names += ("gate_bias", "up_bias", "down_bias")
        named = dict(zip(names, self.exact_args(), strict=True)) | rest
        return reference.sparse_mlp_columns_ref(
            **named, input_threshold=self.input_threshold, compute_dtype=torch.float64
        )

    def values(self) -> tuple[Tensor, Tensor]:
        x, w_gate_t, w_up, _, _, _, activation, gate_bias, up_bias, _ = self.exact_args()
        seen = torch.where(self.kept_inputs(), x, 0)
        v = reference.ACTIVATIONS[activation](F.linear(seen, w_gate_t.t(), gate_bias))
        h = v * F.linear(x, w_up, up_bias)
        return v.abs().reshape(-1, v.shape[-1]), h.abs().reshape(-1, v.shape[-1])


def make_columns_case(
    tokens: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rule: str = "scalar, vector",
    activation: str = "silu",
    bias: bool = False,
    input_sparsity: float = 0.5,
    sparsity: float = 0.5,
    seed: int = 0,
) -> ColumnsCase:
    """As ``make_case``; of all inputs about the share ``input_sparsity`` is dropped."""
    plain = make_case(tokens, hidden, intermediate, dtype, device, "all kept", activation, bias, seed=seed)
    weights = [plain.weights[0].t().contiguous(), *plain.weights[1:]]
    by_size = plain.x.float().abs().flatten().sort().values.cpu()
    input_threshold = by_size[int(input_sparsity * (len(by_size) - 1))]
    case = ColumnsCase(plain.x, weights, plain.biases, activation, input_threshold=input_threshold)
    set_thresholds(case, rule, sparsity, seed)
    return case
