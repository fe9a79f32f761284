"""Products with a matrix of packed rows for many tokens."""

from __future__ import annotations

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.nn.functional import linear

from cats_ext.native.library import LIBRARIES
from cats_ext.rows.formats import RowFormat

# What packed_matmul takes, and where it pays: on an H200, 4096x14336, bf16, an MLP of int4 rows takes 638 us for 1,024
# tokens, and 684 where the rows are unpacked first; for 2,048 tokens 1,233 and 1,246, of int8 rows 1,337 and 1,300
# (h200/packed_tokens.csv).
PRODUCT_CAPABILITY, MAX_PRODUCT_TOKENS = 9, 1024


def packed_product(
    x: Tensor,
    rows: Tensor,
    row_format: RowFormat,
    columns: int,
    *,
    input_rows: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """``x W^T + bias``, or with ``input_rows`` ``x W + bias``, in the dtype of ``x``.

    Args:
        x: ``[..., columns]``, with ``input_rows`` ``[..., N]``.
        rows: uint8 ``[N, row_format.row_bytes(columns)]``, the rows of ``W`` ``[N, columns]``.
        bias: of the outputs, or None.

    Raises:
        ValueError: ``rows`` are not those of so many columns.
        RuntimeError: sizes, dtypes or devices do not fit each other.
    """
    if product_fits(x, rows.shape[0], columns, bias):
        return torch.ops.cats.packed_matmul(x, rows, row_format.name, columns, input_rows, bias)
    weight = row_format.unpack(rows, columns, x.dtype)
    return linear(x, weight.t() if input_rows else weight, bias)


def product_fits(x: Tensor, rows: int, columns: int, bias: Tensor | None = None) -> bool:
    """Whether ``packed_matmul`` serves ``x`` and a matrix of so many rows and columns, and is the quicker way.

    Not where ``x`` or ``bias`` needs a gradient: the op has none.
    """
    return (
        has_product(x)
        and rows % 8 == 0
        and columns % 8 == 0
        and x.numel() <= MAX_PRODUCT_TOKENS * x.shape[-1]
        and not torch.is_autocast_enabled("cuda")
        and not (is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and forward_ad._current_level < 0
    )


def has_product(x: Tensor) -> bool:
    """Whether there is a kernel for the dtype of ``x`` on its device."""
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and "9.0a" in (LIBRARIES["_C_cuda"].build_info or "")
        and torch.cuda.get_device_properties(x.device).major == PRODUCT_CAPABILITY
    )
