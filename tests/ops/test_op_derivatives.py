"""torch.func's transforms and forward-mode derivatives: those of the formula, never silently zero."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from cats_ext import ops
from cats_ext.functional import sparse_mlp
from cats_ext.ops.reference import gated_threshold_ref, sparse_mlp_ref

H, I = 12, 40  # noqa: E741
MASK = torch.tensor(0.2), torch.rand(I, generator=torch.Generator().manual_seed(4)) * 0.3

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("tokens", [1, 40])]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(function):
    weights = [normal(I, H, seed=1) / 3, normal(I, H, seed=2) / 3, normal(I, H, seed=3) / 6]
    return lambda x: function(x, *weights, *MASK)


TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](x.cos()),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).square().sum())(x),
    "vmap": lambda f, x: torch.vmap(f)(x),
    "gradient of a vmap": lambda f, x: torch.func.grad(lambda x: torch.vmap(f)(x).square().sum())(x),
    "vmap of a gradient": lambda f, x: torch.vmap(torch.func.grad(lambda x: f(x).square().sum()))(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("function", [sparse_mlp, ops.sparse_mlp], ids=["functional", "op"])
def test_sparse_mlp(function, name, tokens):
    x = normal(tokens, H)
    got, want = (TRANSFORMS[name](mlp(f), x) for f in (function, sparse_mlp_ref))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_sparse_mlp_columns(name, tokens):
    """Inputs below the threshold have no part in the gate's derivative."""
    x, w_gate_t = normal(tokens, H), normal(H, I, seed=1) / 3
    weights = normal(I, H, seed=2) / 3, normal(I, H, seed=3) / 6

    def formula(x):
        seen = torch.where(x.abs() >= 0.6, x, 0)
        v = torch.nn.functional.silu(seen @ w_gate_t)
        v = torch.where(v.abs() >= MASK[0], v, 0)
        h = v * (x @ weights[0].t())
        return torch.where(h.abs() >= MASK[1], h, 0) @ weights[1]

    def op(x):
        return ops.sparse_mlp_columns(x, w_gate_t, *weights, torch.tensor(0.6), *MASK)

    got, want = (TRANSFORMS[name](f, x) for f in (op, formula))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_linearize(tokens):
    x = normal(tokens, H)
    got, want = (torch.func.linearize(mlp(f), x)[1](x.cos()) for f in (sparse_mlp, sparse_mlp_ref))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", [ops.gated_threshold, ops.gated_threshold_forward])
def test_gated_threshold(op, tokens):
    inputs, tangents = (normal(tokens, I, seed=5), normal(tokens, I, seed=6)), (normal(tokens, I, seed=7),) * 2
    got, want = (
        torch.func.jvp(lambda gate, up, f=f: f(gate, up, *MASK), inputs, tangents) for f in (op, gated_threshold_ref)
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("grad_enabled", [False, True])
def test_dual_tensors(grad_enabled, tokens):
    x, tangent = normal(tokens, H), normal(tokens, H, seed=8)
    gate = normal(tokens, I, seed=9)
    with forward_ad.dual_level(), torch.set_grad_enabled(grad_enabled):
        for f, reference, primal, t in (
            (mlp(sparse_mlp), mlp(sparse_mlp_ref), x, tangent),
            (lambda g: ops.gated_threshold(g, gate, *MASK), lambda g: gated_threshold_ref(g, gate, *MASK), gate, gate),
        ):
            got, want = (forward_ad.unpack_dual(g(forward_ad.make_dual(primal, t))) for g in (f, reference))
            torch.testing.assert_close(got.primal, want.primal, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(got.tangent, want.tangent, rtol=1e-4, atol=1e-4)
            assert got.tangent.any()


def test_compiled(tokens):
    x = normal(tokens, H)
    torch._dynamo.reset()
    f = torch.compile(mlp(sparse_mlp), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(f(x), mlp(sparse_mlp_ref)(x), rtol=1e-4, atol=1e-4)
    for name in ("jvp", "grad"):
        transformed = torch.compile(lambda x: TRANSFORMS[name](mlp(sparse_mlp), x), backend="aot_eager")  # noqa: B023
        want = TRANSFORMS[name](mlp(sparse_mlp_ref), x)
        torch.testing.assert_close(transformed(x), want, rtol=1e-4, atol=1e-4)
    with forward_ad.dual_level():  # what was compiled without tangents does not serve
        got = forward_ad.unpack_dual(mlp(sparse_mlp)(forward_ad.make_dual(x, x.cos()))).tangent
        compiled = forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent
        torch.testing.assert_close(compiled, got)


def test_experts_are_refused(tokens):
    x, routing = normal(tokens, H), torch.ones(tokens, 1)
    experts = torch.zeros(tokens, 1, dtype=torch.int64)

    def f(x):
        return ops.experts.sparse_experts(x, experts, routing, normal(2, 2 * I, H), normal(2, I, H), MASK[0])

    with pytest.raises(RuntimeError, match=r"^sparse_experts: .* no derivatives .*call the patched module"):
        torch.func.jvp(f, (x,), (x,))
