"""What a GPU's memory decides about the path, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cats_ext.ops.dispatch import kernel_fits, memory_gb_per_s

H100 = dict(major=9, memory_clock_rate=2_619_000, memory_bus_width=5120)
H200 = dict(major=9, memory_clock_rate=3_201_000, memory_bus_width=6016)  # as torch 2.11 gives them
A100 = dict(major=8, memory_clock_rate=1_593_000, memory_bus_width=5120)
UNKNOWN = dict(major=9)  # torch versions without these properties


def test_memory_rates():
    assert memory_gb_per_s(SimpleNamespace(**H100)) == pytest.approx(3352, abs=1)
    assert memory_gb_per_s(SimpleNamespace(**H200)) == pytest.approx(4814, abs=1)
    assert memory_gb_per_s(SimpleNamespace(**UNKNOWN)) == 0


@pytest.mark.parametrize(("card", "most"), [(H100, 4), (H200, 2), (A100, 2), (UNKNOWN, 4)])
def test_the_kernel_takes_as_many_tokens_as_pay(card, most, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**card))
    for tokens in range(1, 7):
        x = SimpleNamespace(
            is_cuda=True, device=SimpleNamespace(type="cuda"), dtype=torch.bfloat16, numel=lambda n=tokens: n * 4096
        )
        assert kernel_fits(x, 4096) == (tokens <= most), tokens
