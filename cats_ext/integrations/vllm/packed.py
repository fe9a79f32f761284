"""Linear layers of vLLM whose weights are packed rows in the checkpoint.

Those of the MLPs stay packed, since the sparse kernel reads them, and are divided among ranks by neuron. All others
(``scope="all"``) are unpacked when they are loaded: vLLM's own products run at every batch size then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import RowParallelLinear, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import BasevLLMParameter, ModelWeightParameter

from cats_ext.integrations.vllm.linear import Adoption, DenseLinearMethod, MLPLinearMethod
from cats_ext.quantization.layout import Rows, pattern_of
from cats_ext.rows import RowFormat
from cats_ext.rows.product import packed_product


def entry_of(rows: Rows, prefix: str, fused: dict[str, list[str]]) -> dict[str, Any] | None:
    """What ``rows`` says about vLLM's layer ``prefix``, which may be several layers of the checkpoint in one.

    Args:
        fused: their names by that of the layer: ``{"gate_up_proj": ["gate_proj", "up_proj"]}``.

    Raises:
        ValueError: they are packed differently.
    """
    owner, _, child = prefix.rpartition(".")

    def of(name: str) -> dict[str, Any] | None:
        full = f"{owner}.{name}" if owner else name
        return rows.get(full, rows.get(pattern_of(full)))

    found = of(child)
    if found is not None or child not in fused:
        return found
    first, *others = (of(name) for name in fused[child])
    if any(other != first for other in others):
        formats = ", ".join(f"{n} {(of(n) or {}).get('format', 'dense')}" for n in fused[child])
        raise ValueError(f"{prefix} must have rows of one format under vLLM, where it is one matrix, got {formats}")
    return first


@register_weight_loader_v2_supported_method
class PackedMLPLinearMethod(MLPLinearMethod):
    """Of one projection of an MLP, of which each packed row is a neuron's."""

    def __init__(self, *arguments: Any, row_format: RowFormat, input_rows: bool) -> None:
        super().__init__(*arguments)
        self.row_format, self.input_rows = row_format, input_rows
        if input_rows != (self.projection == "down_proj"):
            raise ValueError(f"{self.name}.{self.projection} must have a packed row for each neuron")

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        if self.input_rows:
            rows, columns = columns, rows
        weight = ModelWeightParameter(
            data=_empty(rows, columns, self.row_format),
            input_dim=0 if self.input_rows else 1,
            output_dim=1 if self.input_rows else 0,
            weight_loader=attributes["weight_loader"],
        )
        layer.register_parameter("weight", weight)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        columns = layer.output_size_per_partition if self.input_rows else layer.input_size_per_partition
        return packed_product(x, layer.weight, self.row_format, columns, input_rows=self.input_rows, bias=bias)


@register_weight_loader_v2_supported_method
class UnpackedLinearMethod(DenseLinearMethod):
    """Of a layer beside the MLPs, with a packed row for each output: dense from when it is loaded."""

    def __init__(self, adoption: Adoption, row_format: RowFormat) -> None:
        super().__init__(adoption)
        self.row_format = row_format

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        self.own = input_size_per_partition
        self.columns, self.dtype = input_size, params_dtype
        data, loader = _empty(sum(output_partition_sizes), input_size, self.row_format), attributes["weight_loader"]
        if isinstance(layer, RowParallelLinear):  # whole rows: they cannot be divided before they are unpacked
            weight = BasevLLMParameter(data=data, weight_loader=loader)
        else:
            weight = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
        layer.register_parameter("weight", weight)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if layer.weight.dtype == torch.uint8:  # else weights have been processed before
            first = layer.tp_rank * self.own if isinstance(layer, RowParallelLinear) else 0
            weight = self.row_format.unpack(layer.weight.data, self.columns, self.dtype)[:, first : first + self.own]
            layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        super().process_weights_after_loading(layer)


def _empty(rows: int, columns: int, row_format: RowFormat) -> Tensor:
    row_format.groups(columns)
    return torch.empty(rows, row_format.row_bytes(columns), dtype=torch.uint8)
