"""The forward of a gated MLP under vLLM as one op that torch.compile does not look into. Without vLLM.

Whether the kernel runs depends on the number of tokens, which would be fixed while tracing. In a CUDA graph the choice
is made for each captured size. Prompts longer than the largest of these run outside of graphs, where vLLM may wait for
the host, and there an op in Python takes longer than what inductor makes of a dense MLP. So the ops of dense weights
are C++ on CUDA (``csrc/ops_cuda.cu``; ``bench/results/h200/first_token.log``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_ext.native.library import LIBRARIES
from cats_ext.ops import definitions, dispatch
from cats_ext.patching.projections import PackedOperands, PackedProjections
from cats_ext.rows import RowFormat
from cats_ext.rows.product import packed_product

Mask = tuple[Tensor, Tensor | None, str]  # threshold, down_threshold, activation
Counting = tuple[Tensor, bool]  # counts, and whether of the kernel's tokens only, which costs nothing


def gated_mlp(
    x: Tensor,
    gate_up: list[Tensor],
    w_down: Tensor,
    formats: list[str],
    mask: Mask,
    biases: list[Tensor],
    down_bias: Tensor | None,
    counting: Counting | None = None,
) -> Tensor:
    """``[..., H]`` to ``[..., H]``: by the sparse kernel for few tokens, by masked products of all weights for more.

    Args:
        gate_up: both weights in one ``[2 I, H]``, or one each.
        w_down: ``[H, I]`` with one contiguous row a neuron.
        formats: of gate, up and down, if all weights are packed rows: uint8 with one row a neuron each. Else empty.
        biases: as ``gate_up``, or none.
    """
    if formats:
        operands = x, gate_up, w_down, formats, *mask, biases, down_bias
        return _ops.packed_mlp(*operands) if counting is None else _ops.packed_mlp_counted(*operands, *counting)
    operands = x, gate_up, w_down, *mask, biases, down_bias, dispatch.served_tokens(x)
    return _ops.mlp(*operands) if counting is None else _ops.mlp_counted(*operands, *counting)


def halves(tensors: list[Tensor], dim: int = -1) -> tuple[Tensor, Tensor]:
    """Gate and up, from both or from one tensor with both."""
    gate, up = tensors if len(tensors) == 2 else tensors[0].chunk(2, dim)
    return gate, up


_library = torch.library.Library("cats_vllm", "DEF")
_ops = torch.ops.cats_vllm
_RULE = "Tensor threshold, Tensor? down_threshold, str activation, Tensor[] biases, Tensor? down_bias"
_DENSE = f"Tensor x, Tensor[] gate_up, Tensor w_down, {_RULE}, int kernel_tokens"
_PACKED = f"Tensor x, Tensor[] gate_up, Tensor w_down, str[] formats, {_RULE}"
# Counting has ops of its own, as sparse_mlp has: only they write to an argument.
_COUNTS = "Tensor(a!) counts, bool kernel_only"
_SCHEMAS = {
    "mlp": f"({_DENSE}) -> Tensor",
    "mlp_counted": f"({_DENSE}, {_COUNTS}) -> Tensor",
    "packed_mlp": f"({_PACKED}) -> Tensor",
    "packed_mlp_counted": f"({_PACKED}, {_COUNTS}) -> Tensor",
    "deterministic": "() -> bool",  # for the C++, when it runs
}
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def _mlp(
    x: Tensor,
    gate_up: list[Tensor],
    w_down: Tensor,
    threshold: Tensor,
    down_threshold: Tensor | None,
    activation: str,
    biases: list[Tensor],
    down_bias: Tensor | None,
    kernel_tokens: int,
    counts: Tensor | None = None,
    kernel_only: bool = False,
) -> Tensor:
    mask = threshold, down_threshold, activation
    if x.numel() <= kernel_tokens * x.shape[-1]:
        all_biases = *(halves(biases, 0) if biases else (None, None)), down_bias
        return dispatch.Projections.kernel(x, ((*halves(gate_up, 0), w_down.t()), all_biases), mask, counts)
    gate, up = halves([F.linear(x, w, biases[i] if biases else None) for i, w in enumerate(gate_up)])
    h = definitions.masked_product(gate, up, *mask, None if kernel_only else counts)
    return F.linear(h, w_down, down_bias)


def _packed_mlp(
    x: Tensor,
    gate_up: list[Tensor],
    w_down: Tensor,
    formats: list[str],
    threshold: Tensor,
    down_threshold: Tensor | None,
    activation: str,
    biases: list[Tensor],
    down_bias: Tensor | None,
    counts: Tensor | None = None,
    kernel_only: bool = False,
) -> Tensor:
    mask = threshold, down_threshold, activation
    hidden_size = x.shape[-1]
    if dispatch.packed_kernel_fits(x, hidden_size):
        all_biases = *(halves(biases, 0) if biases else (None, None)), down_bias
        operands = PackedOperands((*halves(gate_up, 0), w_down), all_biases, tuple(formats))
        return PackedProjections.kernel(x, operands, mask, counts)
    forms = [RowFormat.parse(name) for name in formats]
    gate, up = halves(
        [packed_product(x, w, forms[i], hidden_size, bias=biases[i] if biases else None) for i, w in enumerate(gate_up)]
    )
    h = definitions.masked_product(gate, up, *mask, None if kernel_only else counts)
    return packed_product(h, w_down, forms[-1], hidden_size, input_rows=True, bias=down_bias)


def _register() -> None:
    in_python = {"mlp": _mlp, "mlp_counted": _mlp, "packed_mlp": _packed_mlp, "packed_mlp_counted": _packed_mlp}
    compiled = {"mlp", "mlp_counted"} if LIBRARIES["_C_cuda"].loaded else set()
    for name, schema in _SCHEMAS.items():
        _library.define(name + schema, tags=_TAGS)
    for name, function in in_python.items():
        torch.library.register_fake(f"cats_vllm::{name}", lambda x, *_: x.new_empty(x.shape), lib=_library)
        for device in ("CPU", "CUDA"):
            if device == "CPU" or name not in compiled:
                _library.impl(name, function, device)
    _library.impl("deterministic", lambda: dispatch.deterministic(), "CompositeExplicitAutograd")


_register()
