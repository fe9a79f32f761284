"""The ops' argument checks (``csrc/checks.h``) for torch.compile's tracing and the reference: the kernels' sentences.

The compiled CPU library holds them; in a source tree that is not built nothing is checked.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cats_ext.native.library import LIBRARIES


class _NamedTensor(ctypes.Structure):  # NamedTensor of csrc/checks.cpp
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("dim", ctypes.c_int64),
        ("numbers", ctypes.c_int32 * 2),  # of the dtype and the type of the device: found by their names
        ("device_index", ctypes.c_int32),
        ("freed", ctypes.c_int32),
        ("dtype", ctypes.c_char_p),
        ("device_type", ctypes.c_char_p),
    ]


_FORMATS = ("gate_format", "up_format", "down_format")


@functools.cache
def _cats_check() -> Callable[..., bytes | None]:
    function = ctypes.CDLL(LIBRARIES["_C"].path).cats_check
    text = ctypes.c_char_p
    tensors, number = ctypes.POINTER(_NamedTensor), ctypes.POINTER(ctypes.c_double)
    whole = ctypes.c_int64
    function.argtypes = [text, tensors, whole, text, whole, text * 3, number, ctypes.c_bool, whole, text]
    function.restype = ctypes.c_char_p
    return function


def _numbers(sizes: Sequence[int | torch.SymInt]) -> ctypes.Array:
    """Symbolic sizes by their example, which adds no guard to the graph: the kernels check every call's own sizes."""
    known = [size if isinstance(size, int) else getattr(size.node, "hint", None) for size in sizes]
    return (ctypes.c_int64 * len(known))(*(1 if size is None else int(size) for size in known))


def _named_tensor(name: str, t: Tensor) -> _NamedTensor:
    return _NamedTensor(
        name=name.encode(),
        sizes=_numbers(t.shape),
        strides=_numbers(t.stride()),
        dim=t.dim(),
        device_index=-1 if t.device.index is None else t.device.index,
        dtype=str(t.dtype).removeprefix("torch.").encode(),
        device_type=t.device.type.encode(),
    )


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def check(op: str, arguments: dict[str, Any]) -> None:
    """Raise ``RuntimeError`` if a call of ``op`` with these arguments, all by name, is wrong."""
    if not LIBRARIES["_C"].loaded:
        return
    lists = {f"{name}[{i}]": v for name, value in arguments.items() if _is_list(value) for i, v in enumerate(value)}
    tensors = [_named_tensor(name, t) for name, t in (arguments | lists).items() if isinstance(t, Tensor)]
    array = (_NamedTensor * len(tensors))(*tensors)
    activation = arguments.get("activation", "").encode()
    names = ("row_format",) if "row_format" in arguments else _FORMATS
    texts = (arguments[n].encode().replace(b"\0", b"\\0") if n in arguments else None for n in names)
    formats = (ctypes.c_char_p * 3)(*texts)
    deviations = arguments.get("deviations")
    number = None if deviations is None else ctypes.byref(ctypes.c_double(deviations))
    call = op.encode(), array, len(tensors), activation, len(activation), formats, number
    columns, dtype = arguments.get("columns", 0), str(arguments.get("dtype", "")).removeprefix("torch.")
    flag = arguments.get("relu_up", arguments.get("input_rows", False))
    sentence = _cats_check()(*call, flag, *_numbers([columns]), dtype.encode())
    if sentence is not None:
        raise RuntimeError(sentence.decode())
