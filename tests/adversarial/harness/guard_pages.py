"""Tensors in memory that ends, or starts, at a page that nobody may touch: one element too far is a crash."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_PAGE = mmap.PAGESIZE
_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Arena:
    """Some pages between two forbidden ones, for one tensor at a time."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // _PAGE) * _PAGE
        self._map = mmap.mmap(-1, self.size + 2 * _PAGE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + _PAGE
        for page in (self.start - _PAGE, self.start + self.size):
            if _libc.mprotect(page, _PAGE, _PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")

    def place(self, t: Tensor, at_end: bool) -> Tensor:
        """A copy of ``t`` with its shape and strides, whose last, or first, byte is next to a forbidden page."""
        span = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        size = span * t.element_size()
        if size > self.size:
            raise ValueError(f"a tensor of {size} bytes does not fit an arena of {self.size}")
        if size == 0:
            return t.clone()
        start = self.start + (self.size - size if at_end else 0)
        buffer = (ctypes.c_char * size).from_address(start)
        flat = torch.frombuffer(buffer, dtype=t.dtype)
        flat.view(torch.uint8).random_(0, 256)  # what lies between the rows
        once = [1 if stride == 0 else n for n, stride in zip(t.shape, t.stride(), strict=True)]
        flat.as_strided(once, t.stride()).copy_(t[tuple(slice(n) for n in once)])
        return flat.as_strided(t.shape, t.stride())


class Arenas:
    """One arena for each tensor of a call, used again by the next call."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._arenas: list[Arena] = []
        self._used = 0

    def place(self, t: Tensor, at_end: bool) -> Tensor:
        if self._used == len(self._arenas):
            self._arenas.append(Arena(self.size))
        self._used += 1
        return self._arenas[self._used - 1].place(t, at_end)

    def reset(self) -> None:
        self._used = 0
