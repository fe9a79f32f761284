"""The implementation is chosen in one place, and a module with other projections is one more kind of them."""

from __future__ import annotations

import pytest
import torch
from support.models import HIDDEN, tiny_model
from support.patched import config_for, layers_of
from torch import nn

from cats_ext import apply_cats
from cats_ext.ops import dispatch
from cats_ext.ops.dispatch import DENSE, KERNEL, MASKED, choose, choose_experts
from cats_ext.patching.projections import KINDS, SeparateProjections, call_linear, readable_linears


@pytest.fixture
def mlp():
    model = tiny_model().requires_grad_(False)
    return layers_of(apply_cats(model, config_for(model)))[0]


def chosen(mlp, x, **arguments):
    return choose(x, HIDDEN, SeparateProjections, mlp._modules, **arguments)[0]


def test_choice(mlp):
    x = torch.randn(1, 2, HIDDEN)
    many = torch.randn(1, 40, HIDDEN)
    assert chosen(mlp, x) == KERNEL and chosen(mlp, many) == MASKED
    assert chosen(mlp, x, dense_prefill=True) == DENSE and chosen(mlp, many, dense_prefill=True) == DENSE
    assert chosen(mlp, x[:, :1], dense_prefill=True) == KERNEL  # a token of generation
    assert chosen(mlp, x.double()) == MASKED
    assert chosen(mlp, x.requires_grad_()) == MASKED
    with torch.no_grad():
        assert chosen(mlp, x) == KERNEL
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen(mlp, x.detach()) == MASKED
    handle = mlp.up_proj.register_forward_hook(lambda *_: None)
    assert chosen(mlp, x.detach()) == MASKED
    handle.remove()
    mlp.down_proj.weight.data = mlp.down_proj.weight.data.contiguous()
    assert chosen(mlp, x.detach()) == MASKED


def test_choice_of_experts():
    x, routing = torch.randn(3, 8), torch.rand(3, 2)
    weights = torch.randn(4, 12, 8), torch.randn(4, 6, 8)

    def choice(x=x, operands=weights, counted=False, dense_prefill=False):
        return choose_experts(x, routing, operands, counted=counted, dense_prefill=dense_prefill)

    assert choice() == KERNEL
    assert choice(torch.randn(40, 8)) == choice(operands=None) == choice(counted=True) == MASKED
    assert choice(operands=(weights[0], torch.randn(4, 8, 6).mT)) == MASKED
    assert choice(torch.randn(3, 8, requires_grad=True)) == MASKED
    assert choice(dense_prefill=True) == DENSE and choice(x[:1], dense_prefill=True) == KERNEL


def test_calling_a_linear_fires_whatever_is_on_it():
    x, seen = torch.randn(2, 3, requires_grad=True), []
    plain = nn.Linear(3, 4)
    assert torch.equal(call_linear(plain, x), plain(x))
    for register in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):
        linear = nn.Linear(3, 4)
        getattr(linear, register)(lambda *_, name=register: seen.append(name))
        call_linear(linear, x).sum().backward()
        assert seen.pop() == register and not seen
    replaced = nn.Linear(3, 4)
    replaced.forward = lambda x: x
    assert call_linear(replaced, x) is x
    assert readable_linears(replaced) is None and readable_linears(plain) == [plain]


class HalvedWeights(SeparateProjections):
    """As a quantising library has them: half the gate's weight is stored, and its kernel doubles it."""

    @staticmethod
    def operands(source):
        operands = SeparateProjections.operands(source)
        return None if operands is None else ((operands[0][0] * 2, *operands[0][1:]), operands[1])

    @staticmethod
    def gate_up(source, x):
        gate, up = SeparateProjections.gate_up(source, x)
        return gate * 2, up


@pytest.mark.parametrize("tokens", [1, 40])
def test_another_kind_needs_no_change_of_forward(mlp, tokens, monkeypatch):
    x = torch.randn(1, tokens, HIDDEN)
    expected = mlp(x)
    monkeypatch.setitem(KINDS, "halved", HalvedWeights)
    mlp.gate_proj.weight.mul_(0.5)
    assert not torch.allclose(mlp(x), expected, atol=1e-3)
    mlp.forward_settings = mlp.forward_settings._replace(projections="halved")
    torch.testing.assert_close(mlp(x), expected)


def test_prompts_are_computed_without_calling_plain_modules(mlp, monkeypatch):
    """The host's time for three calls of a module is what small prompts wait for."""
    calls = []
    monkeypatch.setattr(nn.Linear, "__call__", lambda self, x: calls.append(self) or nn.Module.__call__(self, x))
    mlp(torch.randn(1, 40, HIDDEN))
    assert not calls


def test_limits_are_looked_up_at_each_call(mlp, monkeypatch):
    """Benchmarks change them through ``cats_ext.functional``."""
    from cats_ext import functional

    assert functional.MAX_KERNEL_TOKENS is dispatch.MAX_KERNEL_TOKENS
    assert functional.MAX_EXPERT_TOKENS is dispatch.MAX_EXPERT_TOKENS
    monkeypatch.setitem(functional.MAX_KERNEL_TOKENS, "cpu", 0)
    assert chosen(mlp, torch.randn(1, HIDDEN)) == MASKED
