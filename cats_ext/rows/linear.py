"""QuantizedLinear: the place of an ``nn.Linear`` whose weight is kept as packed rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cats_ext.rows.compensation import compensated_rows
from cats_ext.rows.formats import RowFormat
from cats_ext.rows.product import packed_product
from cats_ext.rows.rounding import quantize_rows


class QuantizedLinear(nn.Module):
    """A linear layer with its weight in packed rows: one an output, or with ``input_rows`` one an input.

    The down projection of an MLP has a row for each input, so that a neuron's row is read or skipped as a whole. The
    forward multiplies with the weight as it is (:func:`~cats_ext.rows.product.packed_product`), or unpacks it into the
    input's dtype first.

    Attributes:
        weight: uint8 ``[rows, bytes]``, a parameter without gradient.
        bias: ``[out_features]`` or None.
        row_format: of ``weight``.

    Args:
        in_features, out_features: as of ``nn.Linear``.
        row_format: how the rows are packed.
        input_rows: whether rows are those of the transposed weight.
        bias: whether there is a bias.
        dtype, device: of the bias; the device also of the weight.

    Raises:
        ValueError: rows have no whole number of groups.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        row_format: RowFormat,
        *,
        input_rows: bool = False,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.row_format, self.input_rows = row_format, input_rows
        row_format.groups(self.row_width)
        data = torch.empty(self.weight_shape, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(data, requires_grad=False)
        made = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", made)

    @classmethod
    def from_linear(
        cls, dense: nn.Linear, row_format: RowFormat, *, input_rows: bool = False, moment: Tensor | None = None
    ) -> QuantizedLinear:
        """``dense`` with its weight rounded, to the nearest values or by :func:`compensated_rows` with ``moment``."""
        made = cls(dense.in_features, dense.out_features, row_format, input_rows=input_rows, device="meta")
        weight = dense.weight.detach()
        if moment is None:
            packed = quantize_rows(weight.t() if input_rows else weight, row_format)
        else:
            packed = compensated_rows(weight, row_format, moment, input_rows=input_rows)
        made.weight = nn.Parameter(packed, requires_grad=False)
        made.bias = dense.bias
        return made.train(dense.training)

    @property
    def row_width(self) -> int:
        """Columns of a packed row."""
        return self.out_features if self.input_rows else self.in_features

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Rows, and the bytes of each."""
        rows = self.in_features if self.input_rows else self.out_features
        return rows, self.row_format.row_bytes(self.row_width)

    def with_rows(self, rows: Tensor) -> QuantizedLinear:
        """A layer of these rows alone, and of their part of the bias if rows are those of outputs."""
        sizes = (len(rows), self.out_features) if self.input_rows else (self.in_features, len(rows))
        made = QuantizedLinear(*sizes, self.row_format, input_rows=self.input_rows, device="meta")
        made.weight = nn.Parameter(self.weight[rows], requires_grad=False)
        if self.bias is not None:
            bias = self.bias.detach()
            made.bias = nn.Parameter(bias if self.input_rows else bias[rows], requires_grad=False)
        return made

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight that the layer computes with, ``[out_features, in_features]``."""
        rows = self.row_format.unpack(self.weight, self.row_width, dtype)
        return rows.t() if self.input_rows else rows

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} columns, got {list(x.shape)}")
        return packed_product(
            x, self.weight, self.row_format, self.row_width, input_rows=self.input_rows, bias=self.bias
        )

    def extra_repr(self) -> str:
        rows = "inputs" if self.input_rows else "outputs"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.row_format.name}, rows of {rows}"
        )
