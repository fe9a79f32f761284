"""The torch ops ``torch.ops.cats.*`` and what stands behind them: schemas, references, compiled libraries, Triton."""

from cats_ext.ops.definitions import (
    ELEMENTWISE_DTYPES,
    SCHEMAS,
    SPARSE_DTYPES,
    activated_mlp,
    exact_mlp,
    gated_threshold,
    gated_threshold_backward,
    gated_threshold_counted,
    gated_threshold_forward,
    packed_linear_step,
    sparse_mlp,
    sparse_mlp_counted,
    sparse_mlp_packed,
    sparse_mlp_packed_counted,
    sparse_mlp_packed_step,
    sparse_mlp_step,
)

__all__ = [
    "ELEMENTWISE_DTYPES",
    "SCHEMAS",
    "SPARSE_DTYPES",
    "activated_mlp",
    "exact_mlp",
    "gated_threshold",
    "gated_threshold_backward",
    "gated_threshold_counted",
    "gated_threshold_forward",
    "packed_linear_step",
    "sparse_mlp",
    "sparse_mlp_counted",
    "sparse_mlp_packed",
    "sparse_mlp_packed_counted",
    "sparse_mlp_packed_step",
    "sparse_mlp_step",
]
