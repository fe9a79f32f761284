"""What makes a right call of ``torch.ops.cats.*`` wrong: one argument, spoilt in one way."""

from __future__ import annotations

import random

import torch
from adversarial.harness import exact_calls, matmul_calls, packed_linear_calls, unpack_calls
from adversarial.harness.right_calls import Call
from support.op_cases import DTYPES
from torch import Tensor

_OTHER_DTYPES = [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16, torch.float64]
_ACTIVATIONS = ["", "SiLU", "silu ", "swish", "x" * 200, "gelu_new", "si\0lu", "relu\0", "\u0440elu", "%s%n"]


def _wrong_shape(r: random.Random, name: str, t: Tensor) -> Tensor:
    """Never a shape that the argument may have: a batch dimension more or less of x, gate or up is right."""
    if name == "y_sum":  # a longer one is right
        return r.choice([t[:-6] if len(t) > 6 else t[:0], t[None]])
    wrong = [t[..., None].expand(*t.shape, 2), torch.cat([t, t], -1) if t.dim() else t.expand(3, 2)]
    if t.dim() and t.shape[-1] > 1:
        wrong.append(t[..., :-1])
    if t.dim() == 2 and name.startswith("w_"):
        wrong += [t[None], t[:, 0], t[:0], torch.cat([t, t])]
    if t.dim() == 1 and name not in ("x", "gate", "up", "grad_h", "threshold", "down_threshold"):
        wrong.append(t[None])
    return r.choice(wrong)


def _wrong_strides(name: str, t: Tensor) -> Tensor | None:
    """The same values with a stride that the op does not take; None if it takes all that there are."""
    if name.startswith("w_") and t.shape[1] > 1:
        return t.mT.contiguous().mT if t.shape[0] > 1 else torch.stack([t, t], -1)[..., 0]
    if (name.endswith("bias") or name in ("norm_weight", "counts", "y_sum", "delta", "x_new")) and len(t) > 1:
        return torch.stack([t, t], 1)[:, 0]
    return None


def spoil(r: random.Random, call: Call) -> bool:
    """Make one argument wrong. Returns whether there was a way to."""
    tensors = {name: t for name, t in call.arguments.items() if isinstance(t, Tensor)}
    linear = call.op == "packed_linear_step"
    if linear and r.random() < 0.3:
        call.spoilt = packed_linear_calls.spoil(r, call.arguments)
        return True
    if call.op in ("unpack_rows", "packed_matmul"):
        calls = unpack_calls if call.op == "unpack_rows" else matmul_calls
        call.spoilt = calls.spoil(r, call.arguments)
        return True
    name, t = r.choice(sorted(tensors.items(), key=lambda item: item[0]))
    kinds = [
        "dtype",
        "dtype",
        "shape",
        "shape",
        "strides",
        "device",
        "missing",
        "activation",
        "kind",
        "layout",
        "memory",
    ]
    how = r.choice(kinds)
    if how == "dtype":
        dtype = r.choice([d for d in [*_OTHER_DTYPES, *DTYPES] if d != t.dtype])
        if len({u.dtype for n, u in tensors.items() if n in ("gate", "up", "grad_h")} | {dtype}) == 1:
            return False
        if linear and name == "delta" and dtype == torch.float32:
            return False
        wrong = t.to(dtype)
    elif how == "shape":
        wrong = _wrong_shape(r, name, t)
        if name == "x" and "packed" in call.op and -(-wrong.shape[-1] // 128) == -(-t.shape[-1] // 128):
            return False  # rows are padded: x alone says how many of their columns there are
        neurons = 0 if linear else tensors["gate"].shape[-1] if "gate" in tensors else len(tensors["w_down_t"])
        if call.op == "activated_mlp" and "x" not in tensors:  # then nothing says how many dimensions or columns
            if name == "v" and wrong.shape[-1] == neurons:
                return False
            if name == "w_down_t" and wrong.dim() == 2 and len(wrong) == neurons and "down_bias" not in tensors:
                return False
        if wrong.shape == t.shape or ("threshold" in name and wrong.shape == (neurons,)):
            return False
    elif how == "strides":
        wrong = _wrong_strides(name, t)
    elif how == "layout":
        wrong = t.to_sparse() if t.dim() else None
    elif how == "memory":  # freed, as FSDP frees what it has sharded
        if not t.numel() or call.op.endswith("_step"):  # on the CPU that is torch's own ops
            return False
        wrong = t.clone()
        wrong.untyped_storage().resize_(0)
    elif how == "device":
        wrong = t.to("meta")
    elif how == "missing":
        required = [n for n in tensors if "bias" not in n and n != "down_threshold"]
        if call.op == "exact_mlp":
            required = [n for n in tensors if n not in exact_calls.MAY_BE_MISSING]
        if linear:
            required = [n for n in tensors if n in packed_linear_calls.REQUIRED]
        name, wrong = r.choice(required), None
        if r.random() < 0.3:
            del call.arguments[name]
            call.spoilt = f"without {name}"
            return True
    elif how == "activation":
        if linear:
            return False
        name, wrong = "activation", r.choice(_ACTIVATIONS)
        if name not in call.arguments:
            return False
    else:
        wrong = r.choice([1, 0.5, "x", [], [t], object(), True])
    if how not in ("missing",) and wrong is None:
        return False
    call.arguments[name] = wrong
    call.spoilt = f"with a wrong {how} of {name}"
    return True
