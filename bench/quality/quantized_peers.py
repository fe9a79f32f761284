"""What other libraries' int4 makes of a weight, with groups along the inputs: for quality.quantized, on any device.

HQQ fits zero points to an l0.7 norm of the errors, with scales that cut nothing off; torchao searches nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def hqq(weight: Tensor, group_size: int) -> Tensor:
    from hqq.core.quantize import Quantizer

    options = {"nbits": 4, "axis": 1, "compute_dtype": torch.float16, "device": str(weight.device), "bitpack": False}
    return Quantizer.dequantize(*Quantizer.quantize(weight.contiguous(), group_size=group_size, **options)).float()


def torchao(weight: Tensor, group_size: int) -> Tensor:
    """As ``Int4WeightOnlyConfig()`` for tinygemm, whose kernel takes bfloat16 scales and zero points."""
    from torchao.quantization import quant_primitives as ao

    weight, block, limits = weight.bfloat16(), (1, group_size), (torch.int32, 0, 15)
    dtypes = {"scale_dtype": torch.bfloat16, "zero_point_dtype": torch.bfloat16}
    scales = ao._choose_qparams_affine_tinygemm(weight, ao.MappingType.ASYMMETRIC, block, *limits, **dtypes)
    q = ao._quantize_affine_tinygemm(weight, block, *scales, *limits)
    return ao._dequantize_affine_tinygemm(q, block, *scales, *limits, output_dtype=torch.float32)


PEERS: dict[str, Callable[[Tensor, int], Tensor]] = {"HQQ": hqq, "torchao": torchao}
