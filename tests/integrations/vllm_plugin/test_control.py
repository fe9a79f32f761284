"""A running engine takes another sparsity, and tells the sparsity that it reaches."""

from __future__ import annotations

import asyncio

import pytest
from support.served import NEW, PROMPTS, engine, served, skip_without_vllm

from cats_ext.integrations.vllm import reset_sparsity, set_sparsity, sparsity_report
from cats_ext.ops import dispatch

skip_without_vllm()


def test_set_sparsity_in_place_with_the_prefix_cache_forgotten(llama):
    directory, expected = llama
    with engine(directory, enable_prefix_caching=True, block_size=32) as llm:
        assert served(llm) == expected["sparse"]
        set_sparsity(llm, 0.0)
        assert served(llm) == expected["dense"]  # not from blocks that were computed sparsely
        set_sparsity(llm, 0.5)
        assert served(llm) == expected["sparse"]


def test_set_sparsity_that_is_refused_changes_nothing(llama):
    directory, expected = llama
    with engine(directory) as llm:
        with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got 1.5"):
            set_sparsity(llm, 1.5)
        with pytest.raises(ValueError, match=r"down_sparsity must be in \[sparsity, 2 \* sparsity\]"):
            set_sparsity(llm, 0.5, down_sparsity=0.1)
        assert served(llm) == expected["sparse"]


def test_sparsity_report(llama):
    directory, expected = llama
    with engine(directory, additional_config={"cats": {"count": True}}) as llm:
        reset_sparsity(llm)
        with pytest.raises(ValueError, match="no token has been counted"):
            sparsity_report(llm)
        assert served(llm) == expected["sparse"]
        report = sparsity_report(llm)
        assert report.tokens == sum(map(len, PROMPTS)) + len(PROMPTS) * (NEW - 1)
        assert report.drifted(0.05) == []
        set_sparsity(llm, 0.0)
        reset_sparsity(llm)
        served(llm)
        assert sparsity_report(llm).up_sparsity == 0


def test_counting_where_the_kernel_runs(llama, monkeypatch):
    directory, expected = llama
    with engine(directory, additional_config={"cats": {"count": "kernel"}}) as llm:
        reset_sparsity(llm)
        monkeypatch.setitem(dispatch.MAX_KERNEL_TOKENS, "cpu", 0)
        assert served(llm) == expected["sparse"]
        with pytest.raises(ValueError, match="no token has been counted"):
            sparsity_report(llm)
        monkeypatch.setitem(dispatch.MAX_KERNEL_TOKENS, "cpu", 1)
        assert served(llm, PROMPTS[:1]) == expected["sparse"][:1]
        assert sparsity_report(llm).tokens == NEW - 1


def test_nothing_is_counted_by_default(llama):
    with engine(llama[0]) as llm, pytest.raises(ValueError, match="additional_config"):
        served(llm)
        sparsity_report(llm)


class AsyncEngine:
    """The part of ``AsyncLLM`` that is used."""

    def __init__(self) -> None:
        self.calls = []

    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        self.calls.append((method, args))
        layer = {"intermediate_size": 4, "matrix_bytes": [8, 8, 8], "up_target": 0.5, "down_target": 0.5}
        return [{"mlp": layer | {"counts": [10, 4, 4]}}, {"mlp": layer | {"counts": [10, 6, 4]}}]  # two ranks

    async def reset_prefix_cache(self, reset_running_requests=False):
        self.calls.append(("reset_prefix_cache", reset_running_requests))


def test_async_engine():
    async def use(engine):
        await set_sparsity(engine, 0.7)
        await reset_sparsity(engine)
        return await sparsity_report(engine)

    engine = AsyncEngine()
    report = asyncio.run(use(engine))
    assert engine.calls == [
        ("cats_set_sparsity", (0.7, None)),
        ("reset_prefix_cache", True),
        ("cats_reset_sparsity", ()),
        ("cats_sparsity", ()),
    ]
    assert (report.tokens, report.up_sparsity, report.down_sparsity) == (5, 0.5, 0.6)
    assert report.layers[0].weight_bytes == 24


# --- the page of metrics, without a server ---------------------------------------------------------------------------

SIZES = {"intermediate_size": 4, "matrix_bytes": [8, 8, 8], "up_target": 0.5, "down_target": 0.5}


class CountedEngine:
    def __init__(self, *workers: dict) -> None:
        self.workers = list(workers)

    async def collective_rpc(self, method: str) -> list[dict]:
        assert method == "cats_sparsity"
        return self.workers


def page(*workers: dict) -> list[str]:
    """The lines about CATS of the page that is read where the workers answer so."""
    from prometheus_client import generate_latest

    from cats_ext.integrations.vllm import metrics

    asyncio.run(metrics.update(CountedEngine(*workers)))
    return [line for line in generate_latest().decode().splitlines() if "cats_" in line]


def test_an_engine_that_does_not_count_is_told_apart_from_one_that_has_counted_nothing():
    nothing = page({}, {})
    assert "cats_counting 0.0" in nothing
    assert any(line.startswith("# HELP cats_counting ") and "additional-config" in line for line in nothing)
    assert "cats_counting 1.0" in page({"a": {"counts": [0, 0, 0]} | SIZES})
    lines = page({"a": {"counts": [8, 4, 2]} | SIZES}, {"a": {"counts": [8, 4, 2]} | SIZES})
    assert 'cats_up_sparsity{layer="a"} 0.5' in lines and 'cats_counted_tokens{layer="a"} 4.0' in lines
