"""The variants of the benchmark of packed rows."""

from __future__ import annotations

import functools

import torch

from bench.kernels import packed
from bench.lib.packed_rows import random_packed


def test_two_thresholds_read_the_bytes_of_one(monkeypatch):
    monkeypatch.setattr(packed, "Captured", lambda run: run)
    monkeypatch.setattr(packed, "random_packed", functools.partial(random_packed, device="cpu"))
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    dense, one, two = packed.packed_variants("int4_g64", x, 500, [0.0, 0.5], 2)
    assert [v.name for v in (dense, one, two)] == ["int4_g64 0%", "int4_g64 50%", "int4_g64 40% / 60%"]
    assert one.layer_bytes == two.layer_bytes == dense.layer_bytes * 2 / 3
    outputs = [torch.stack(v.replay()) for v in (dense, one, two)]
    errors = [((y - outputs[0]).norm() / outputs[0].norm()).item() for y in outputs[1:]]
    assert 0 < errors[1] < errors[0]  # the second test sees what the first does not
