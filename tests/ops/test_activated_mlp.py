"""torch.ops.cats.activated_mlp against its formula in fp64: shapes, layouts, sparsities, special values, errors."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import pytest
import torch
from support.op_cases import DEVICES, DTYPES, assert_close, normal, to_device
from torch import Tensor

from cats_ext import ops
from cats_ext.ops import definitions, reference

INF, NAN = float("inf"), float("nan")
SHAPES = [(1, 1, 1), (1, 64, 176), (2, 42, 17), (3, 8, 5), (4, 576, 1536), (5, 123, 170), (8, 256, 1030), (9, 64, 33)]
BIG_SHAPES = [(1, 2048, 8192), (1, 4096, 3000), (7, 2048, 1031), (5, 8192, 100), (3, 16384, 64), (2, 16392, 24)]
CASES = {"cpu": 100, "cuda": int(os.environ.get("CATS_RANDOM_CASES", 400))}
SEED = int(os.environ.get("CATS_RANDOM_SEED", 0))


@dataclass
class Arguments:
    """One call: by the names of the op."""

    named: dict[str, Tensor | None]

    def __call__(self, **changed: object) -> Tensor:
        return ops.activated_mlp(**(self.named | changed))

    def expected(self, **changed: object) -> Tensor:
        exact = {n: None if t is None else t.cpu().double() for n, t in (self.named | changed).items()}
        return reference.activated_mlp_ref(**exact, compute_dtype=torch.float64)


def make(
    tokens: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    gated: bool = True,
    bias: bool = False,
    sparsity: float = 0.8,
    padding: int = 0,
    seed: int = 0,
) -> Arguments:
    def weight(scale: float, s: int) -> Tensor:
        rows = normal(intermediate, hidden + padding, seed=seed + s, scale=scale).to(dtype)
        return to_device(rows[:, :hidden], device)

    v = normal(tokens, intermediate, seed=seed)
    v = torch.where(torch.rand(v.shape, generator=torch.Generator().manual_seed(seed + 1)) < sparsity, 0, v)
    vector = lambda n, s: normal(n, seed=seed + s, scale=0.3).to(dtype).to(device)  # noqa: E731
    named = {"v": v.to(dtype).to(device), "w_down_t": weight(intermediate**-0.5, 2)}
    if bias:
        named["down_bias"] = vector(hidden, 3)
    if gated:
        named |= {"x": normal(tokens, hidden, seed=seed + 4).to(dtype).to(device), "w_up": weight(hidden**-0.5, 5)}
        if bias:
            named["up_bias"] = vector(intermediate, 6)
    return Arguments(named)


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "not gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(shape, dtype, gated, device):
    call = make(*shape, dtype, device, gated, bias=shape[0] % 2 == 0)
    y = call()
    assert y.shape == (shape[0], shape[1]) and y.dtype == dtype and y.device.type == device
    assert_close(y, call.expected())


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "not gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BIG_SHAPES, ids=str)
def test_big_shapes_equal_the_formula(shape, dtype, gated, device):
    call = make(*shape, dtype, device, gated)
    assert_close(call(), call.expected())


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "not gated"])
def test_none_some_and_all_zero(gated, sparsity, device):
    call = make(3, 64, 1500, device=device, gated=gated, bias=True, sparsity=sparsity)
    assert_close(call(), call.expected())
    if sparsity == 1:
        assert torch.equal(call(), call.named["down_bias"].expand(3, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smallest_numbers_are_not_zero(dtype, device):
    """A subnormal v counts; -0 does not."""
    tiny = torch.finfo(dtype).smallest_normal / 2
    v = torch.tensor([[tiny, 0.0, -0.0, -tiny]], dtype=dtype, device=device)
    w = torch.full((4, 8), NAN, dtype=dtype, device=device)
    w[0], w[3] = 192, 64  # products are normal numbers: CUDA adds subnormal ones as zeros
    assert ops.activated_mlp(v, w).tolist() == [[128 * tiny] * 8]


def test_nothing_of_a_zero_neuron_is_read(device):
    call = make(4, 64, 40, torch.bfloat16, device, sparsity=0.5)
    expected = call.expected()
    zero = (call.named["v"] == 0).all(0)
    assert zero.any()
    for name in ("w_up", "w_down_t"):
        call.named[name][zero] = NAN
    assert_close(call(), expected)


def test_a_token_does_not_see_the_infinities_of_others(device):
    call = make(4, 64, 40, torch.float32, device, sparsity=0.5)
    call.named["v"][:, 7] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    expected = call.expected()
    call.named["w_down_t"][7] = INF
    y = call()
    assert not y[1].isfinite().any()
    assert_close(y[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_infinity_reach_the_output(value, device):
    for gated in (True, False):
        call = make(2, 64, 40, device=device, gated=gated)
        call.named["v"][1, 3] = value
        y = call()
        assert y[0].isfinite().all() and not y[1].isfinite().any()
        assert torch.equal(y[1].cpu().isnan(), call.expected()[1].isnan())


def test_shapes_and_strides(device):
    call = make(6, 64, 176, device=device)
    want = call()
    x, v = call.named["x"], call.named["v"]
    assert torch.equal(call(x=x.view(2, 3, 64), v=v.view(2, 3, 176)), want.view(2, 3, 64))
    assert torch.equal(call(x=x[0], v=v[0]), call(x=x[:1], v=v[:1])[0])
    assert torch.equal(call(x=x.t().contiguous().t(), v=v.t().contiguous().t()), want)
    assert call(x=x[:0], v=v[:0]).shape == (0, 64)


def test_the_same_bits_in_every_run(device):
    call = make(5, 256, 3000, torch.bfloat16, device, sparsity=0.3)
    first = call(deterministic=True)
    assert all(torch.equal(call(deterministic=True), first) for _ in range(10))
    assert_close(first, call.expected())


@pytest.mark.parametrize("n", range(25))
def test_random_cases(n, device):
    per_test = -(-CASES[device] // 25)
    for i in range(per_test):
        r = random.Random((SEED * 1_000_003 + n) * 10_007 + i)
        hidden = r.choice([r.randint(1, 200), 8 * r.randint(1, 80), 8 * r.randint(1, 80), 4096, 2048])
        intermediate = r.randint(1, 150) if hidden > 1000 else r.choice([r.randint(1, 400), r.randint(1000, 6000)])
        case = dict(
            tokens=r.choice([1, 1, 2, 3, 4, r.randint(1, 16), r.randint(5, 16)]),
            hidden=hidden,
            intermediate=intermediate,
            dtype=r.choice(DTYPES),
            gated=r.random() < 0.6,
            bias=r.random() < 0.3,
            sparsity=r.choice([0.05, 0.5, 0.9, 0.95, r.random()]),
            padding=r.choice([0, 0, 8, 24, r.randint(0, 9)]),
            seed=r.randint(0, 10**6),
        )
        call = make(device=device, **case)
        y = call(deterministic=r.random() < 0.2)
        try:
            assert_close(y, call.expected())
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


# --- errors ---------------------------------------------------------------------------------------------------------

WHERE = ["cpu", "meta", "reference", pytest.param("cuda", marks=pytest.mark.gpu)]
ERRORS = [
    (dict(v=lambda t: t.double()), "v must be float32, float16 or bfloat16, got torch.float64"),
    (dict(v=lambda t: t[0, 0]), r"v must have at least one dimension, got shape \[\]"),
    (dict(v=lambda t: t[:, 1:]), r"v must have last dimension I = 4, got shape \[3, 3\]"),
    (dict(v=lambda _: None), "v must be a tensor, got None"),
    (dict(w_down_t=lambda t: t[0]), r"w_down_t must have shape \[I, H\] with I > 0 and H > 0, got \[6\]"),
    (dict(w_down_t=lambda t: t[:, :0]), r"w_down_t must have shape \[I, H\] with I > 0 and H > 0, got \[4, 0\]"),
    (dict(w_down_t=lambda t: t.half()), "w_down_t must have v's dtype torch.float32, got torch.float16"),
    (dict(w_down_t=lambda t: t.t().contiguous().t()), "w_down_t must have unit stride in its last dimension, .*"),
    (dict(x=lambda _: None), "x and w_up must be given together, got w_up only"),
    (dict(w_up=lambda _: None), "x and w_up must be given together, got x only"),
    (dict(x=lambda _: None, w_up=lambda _: None), "up_bias needs x and w_up, got neither"),
    (dict(x=lambda t: t[1:]), r"x must have v's shape \[3, 4\] with last dimension H = 6, got \[2, 6\]"),
    (dict(x=lambda t: t[:, 1:]), r"x must have v's shape \[3, 4\] with last dimension H = 6, got \[3, 5\]"),
    (dict(x=lambda t: t.half()), "x must have v's dtype torch.float32, got torch.float16"),
    (dict(w_up=lambda t: t[1:]), r"w_up must have shape \[4, 6\], got \[3, 6\]"),
    (dict(up_bias=lambda t: t[1:]), r"up_bias must have shape \[4\], got \[3\]"),
    (dict(down_bias=lambda t: t[1:]), r"down_bias must have shape \[6\], got \[5\]"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
@pytest.mark.parametrize("where", WHERE)
def test_errors(changes, message, where):
    device = "cpu" if where == "reference" else where
    named = make(3, 6, 4, bias=True).named
    named = {name: t.to(device) for name, t in named.items()}
    named |= {name: change(named[name]) for name, change in changes.items()}
    call = definitions._formula("activated_mlp") if where == "reference" else ops.activated_mlp
    if where == "meta" and named["v"] is None:
        pytest.skip("torch looks at the first tensor's device")
    with pytest.raises(RuntimeError, match=f"^activated_mlp: {message}"):
        call(**named)


@pytest.mark.parametrize("gated", [True, False])
def test_opcheck(gated, device):
    call = make(2, 64, 48, device=device, gated=gated, bias=True)
    torch.library.opcheck(ops.activated_mlp.default, (), call.named)


def test_it_compiles_for_any_number_of_tokens(device):
    compiled = torch.compile(lambda **named: ops.activated_mlp(**named), fullgraph=True, dynamic=True)
    for tokens in (1, 3, 4):
        call = make(tokens, 64, 48, device=device)
        assert_close(compiled(**call.named), call.expected())


@pytest.mark.gpu
def test_it_runs_in_a_captured_graph():
    call = make(1, 256, 512, torch.bfloat16, "cuda", sparsity=0.9)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for seed in range(5):
        call.named["v"].copy_(make(1, 256, 512, torch.bfloat16, "cuda", sparsity=0.2 * seed, seed=seed).named["v"])
        graph.replay()
        assert_close(y, call.expected())
