"""How fast the machine reads memory: what every rate is compared with."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from bench.lib.graphs import Captured
from bench.lib.timing import replay_seconds


def gpu_read_limit() -> float:
    """GB/s: the fastest of 20 sums over 2 GiB of float32."""
    data = torch.ones(1 << 29, device="cuda")
    replay = Captured(data.sum)
    return data.nbytes / min(replay_seconds([replay], 1)[0] for _ in range(20)) / 1e9


class CpuReader:
    """Compiles read_limit.cpp for this processor; a call reads a tensor once, in GB/s."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            library = f"{directory}/read_limit.so"
            flags = ["-O3", "-march=native", "-fPIC", "-shared", "-pthread"]
            source = str(Path(__file__).with_suffix(".cpp"))
            subprocess.check_call([os.environ.get("CXX", "c++"), *flags, source, "-o", library])
            self._seconds = ctypes.CDLL(library).read_seconds
        self._seconds.restype = ctypes.c_double

    def __call__(self, data: Tensor, streams: int) -> float:
        """``streams``: places of its part that each thread reads side by side."""
        size, result = data.nbytes // 4, ctypes.c_float()
        address, threads = ctypes.c_void_p(data.data_ptr()), torch.get_num_threads()
        seconds = self._seconds(address, ctypes.c_size_t(size), threads, streams, ctypes.byref(result))
        return 4 * size / seconds / 1e9
