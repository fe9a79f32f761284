"""torch.ops.cats.exact_mlp against its formula: forms, shapes, layouts, rounding, special values, errors, graphs."""

from __future__ import annotations

import os
import random

import pytest
import torch
import torch.nn.functional as F
from support.exact_cases import FORMS, make
from support.op_cases import DEVICES, DTYPES, assert_close
from torch import Tensor

from cats_ext import ops
from cats_ext.ops import definitions

INF, NAN = float("inf"), float("nan")
SHAPES = [(1, 1, 1), (1, 64, 176), (2, 40, 17), (3, 8, 5), (4, 576, 1536), (5, 123, 170), (8, 256, 1032), (9, 64, 33)]
BIG_SHAPES = [(1, 2048, 8192), (2, 2048, 4096), (1, 4096, 3000), (2, 4096, 1032), (7, 2048, 1031), (2, 8192, 104)]
BIG_SHAPES += [(1, 768, 3072), (3, 5120, 264), (1, 16384, 64), (2, 16392, 24)]
CUTOFF_SHAPES = [(1, 64, 8), (1, 64, 1048), (4, 64, 1064), (1, 64, 40_000), (3, 64, 40_008), (1, 2048, 4096)]
CUTOFF_SHAPES += [(2, 2048, 1544), (1, 2056, 1600), (1, 4096, 1600), (1, 4104, 1600), (2, 4104, 520), (1, 8200, 520)]
CASES = {"cpu": 100, "cuda": int(os.environ.get("CATS_RANDOM_CASES", 400))}
SEED = int(os.environ.get("CATS_RANDOM_SEED", 0))


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(shape, dtype, form, device):
    call = make(form, *shape, dtype, device, bias=shape[0] % 2 == 0)
    y = call()
    assert y.shape == (shape[0], shape[1]) and y.dtype == dtype and y.device.type == device
    call.assert_close(y)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", BIG_SHAPES, ids=str)
def test_big_shapes_equal_the_formula(shape, dtype, form, device):
    call = make(form, *shape, dtype, device)
    call.assert_close(call())


@pytest.mark.parametrize("cut", [-100.0, -1.25, 0.5, 100.0], ids=["all zero", "most zero", "some zero", "none zero"])
@pytest.mark.parametrize("form", ["relu", "gated relu", "dReLU"])
def test_none_some_and_all_zero(form, cut, device):
    for tokens in (1, 2, 3):
        call = make(form, tokens, 64, 1504, torch.bfloat16, device, cut=cut)
        call.named["down_bias"] = torch.ones(64, dtype=torch.bfloat16, device=device)
        assert_close(call(), call.expected(), rtol=2**-8, atol=1e-3)
        if cut == -100:
            assert torch.equal(call().cpu(), torch.ones(tokens, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("deviations", [-4.0, 1.640625, 60.0], ids=["all kept", "some kept", "none kept"])
@pytest.mark.parametrize("shape", CUTOFF_SHAPES, ids=str)
def test_cutoff_of_any_number_of_neurons(shape, deviations, device):
    """On CUDA, of groups of 8: fewer than CTAs, one more for some CTAs, and more for a CTA than a warp has lanes."""
    call = make("cutoff", *shape, torch.bfloat16, device)
    call.named["deviations"] = deviations
    y = call()
    call.assert_close(y)
    assert y.any() == (deviations < 60)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cutoff_of_gates_far_from_zero(dtype, device):
    """Their squares are large, and hardly differ."""
    call = make("cutoff", 3, 64, 1504, dtype, device, cut=64.0)
    y = call()
    assert 0 < (call.hidden() != 0).sum() < 3 * 1504 // 4
    call.assert_close(y)


def test_all_gates_are_equal(device):
    """The deviation is zero, and no gate is above the mean."""
    call = make("cutoff", 2, 64, 1504, torch.bfloat16, device)
    call.named["w_gate"][:] = call.named["w_gate"][:1]
    assert not call.hidden().any() and not call().any()


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_a_zero_neuron_is_read(form, device):
    for tokens in (1, 2, 5):
        call = make(form, tokens, 64, 400, torch.bfloat16, device, cut=-1.25 if FORMS[form][1] is None else 0)
        expected, zero = call.expected(), (call.hidden() == 0).all(0)
        assert zero.any() and not zero.all()
        call.named["w_down_t"][zero] = NAN
        if not FORMS[form][3] and FORMS[form][2]:
            call.named["w_up"][zero] = NAN
        assert_close(call(), expected, rtol=2**-8, atol=1e-3)


def test_neither_is_a_negative_up(device):
    """An up row of a zero gate is not read, though a down row is skipped for the other reason, too."""
    call = make("dReLU", 1, 64, 400, torch.bfloat16, device)
    expected, gates = call.expected(), F.relu(F.linear(call.named["x"], call.named["w_gate"]))[0]
    assert (call.hidden()[0] == 0).sum() > (gates == 0).sum() + 50
    call.named["w_up"][gates == 0] = NAN
    assert_close(call(), expected, rtol=2**-8, atol=1e-3)


def test_a_token_does_not_see_the_infinities_of_others(device):
    for form in ("relu", "gated relu2", "cutoff"):
        call = make(form, 2, 64, 400, torch.bfloat16, device)
        expected, h = call.expected(), call.hidden()
        alone = ((h[1] != 0) & (h[0] == 0)).nonzero()[0]
        call.named["w_down_t"][alone] = INF
        y = call()
        assert not y[1].isfinite().any()
        assert_close(y[:1], expected[:1], rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("form", FORMS)
def test_nan_and_infinity_reach_the_output(form, value, device):
    for dtype in (torch.float32, torch.bfloat16):
        call = make(form, 2, 64, 40, dtype, device)
        call.named["x"][1, 3] = value
        y = call().cpu()
        assert y[0].isfinite().all() and not y[1].isfinite().any()
        assert torch.equal(y[1].isnan(), call.expected()[1].isnan())


def test_rounding_decides_what_is_zero(device):
    """A square that float16 rounds to zero is zero, and its rows are not read."""
    x, gate = torch.tensor([[2.0**-6, 0]]), torch.tensor([[2.0**-6, 0], [2.0**-7, 0], [1, 0]])
    down = torch.full((3, 2), NAN)
    down[0], down[2] = 1024, 2  # squares are 2**-24, the smallest number, 2**-26 and 2**-12
    y = ops.exact_mlp(x.half().to(device), gate.half().to(device), None, down.half().to(device), "relu2")
    assert y.tolist() == [[2.0**-14 + 2.0**-11] * 2]


def test_shapes_and_strides(device):
    for form in ("relu2", "cutoff"):
        call = make(form, 6, 64, 176, torch.bfloat16, device, padding=8)
        call.named["deterministic"] = True
        want, x = call(), call.named["x"]
        assert torch.equal(call(x=x.view(2, 3, 64)), want.view(2, 3, 64))
        assert torch.equal(call(x=x[0]), call(x=x[:1])[0])
        assert torch.equal(call(x=x.t().contiguous().t()), want)
        assert call(x=x[:0]).shape == (0, 64)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_in_every_run(form, device):
    call = make(form, 3, 256, 3000, torch.bfloat16, device)
    first = call(deterministic=True)
    assert all(torch.equal(call(deterministic=True), first) for _ in range(10))
    call.assert_close(first)


@pytest.mark.parametrize("n", range(25))
def test_random_cases(n, device):
    for i in range(-(-CASES[device] // 25)):
        r = random.Random((SEED * 1_000_003 + n) * 10_007 + i)
        hidden = r.choice([r.randint(1, 200), 8 * r.randint(1, 80), 8 * r.randint(1, 80), 4096, 2048])
        intermediate = r.randint(1, 150) if hidden > 1000 else r.choice([r.randint(1, 400), 8 * r.randint(100, 700)])
        case = dict(
            form=r.choice(list(FORMS)),
            tokens=r.choice([1, 1, 2, 2, 3, 4, r.randint(1, 16)]),
            hidden=hidden,
            intermediate=intermediate,
            dtype=r.choice([*DTYPES, torch.bfloat16]),
            bias=r.random() < 0.3,
            cut=r.choice([0, 0, -1.25, -0.5, 1]),
            padding=r.choice([0, 0, 8, 24, r.randint(0, 9)]),
            seed=r.randint(0, 10**6),
        )
        call = make(device=device, **case)
        y = call(deterministic=r.random() < 0.2)
        try:
            call.assert_close(y)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


# --- errors ---------------------------------------------------------------------------------------------------------

WHERE = ["cpu", "meta", "reference", pytest.param("cuda", marks=pytest.mark.gpu)]
ERRORS = [
    (dict(x=lambda t: t.double()), "x must be float32, float16 or bfloat16, got torch.float64"),
    (dict(x=lambda t: t[0, 0]), r"x must have at least one dimension, got shape \[\]"),
    (dict(x=lambda t: t[:, 1:]), r"x must have last dimension H = 6, got shape \[3, 5\]"),
    (dict(w_gate=lambda t: t[0]), r"w_gate must have shape \[I, H\] with I > 0 and H > 0, got \[6\]"),
    (dict(w_gate=lambda t: t[:0]), r"w_gate must have shape \[I, H\] with I > 0 and H > 0, got \[0, 6\]"),
    (dict(w_gate=lambda t: t.half()), "w_gate must have x's dtype torch.float32, got torch.float16"),
    (dict(w_gate=lambda t: t.t().contiguous().t()), "w_gate must have unit stride in its last dimension, .*"),
    (dict(w_up=lambda t: t[1:]), r"w_up must have shape \[4, 6\], got \[3, 6\]"),
    (dict(w_up=lambda _: None), "up_bias needs w_up, got None"),
    (dict(w_up=lambda _: None, up_bias=lambda _: None), "relu_up needs w_up, got None"),
    (dict(w_down_t=lambda t: t[1:]), r"w_down_t must have shape \[4, 6\], got \[3, 6\]"),
    (dict(w_down_t=lambda t: t.t().contiguous().t()), "w_down_t must have unit stride in its last dimension, .*"),
    (dict(activation=lambda _: "tanh"), "activation must be one of silu, gelu, gelu_tanh, relu, relu2, got 'tanh'"),
    (dict(deviations=lambda _: 1.5), "deviations must be finite, and None with relu_up, got 1.5"),
    (dict(deviations=lambda _: INF, relu_up=lambda _: False), "deviations must be finite, got inf"),
    (dict(gate_bias=lambda t: t[1:]), r"gate_bias must have shape \[4\], got \[3\]"),
    (dict(up_bias=lambda t: t[1:]), r"up_bias must have shape \[4\], got \[3\]"),
    (dict(down_bias=lambda t: t[1:]), r"down_bias must have shape \[6\], got \[5\]"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
@pytest.mark.parametrize("where", WHERE)
def test_errors(changes, message, where):
    named = make("dReLU", 3, 6, 4, bias=True, device="cpu" if where == "reference" else where).named
    named |= {name: change(named[name]) for name, change in changes.items()}
    call = definitions._formula("exact_mlp") if where == "reference" else ops.exact_mlp
    with pytest.raises(RuntimeError, match=f"^exact_mlp: {message}"):
        call(**named)


# --- tracing and graphs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["relu2", "dReLU", "cutoff"])
def test_opcheck(form, device):
    torch.library.opcheck(ops.exact_mlp.default, (), make(form, 2, 64, 48, device=device, bias=True).named)


@pytest.mark.parametrize("form", ["relu2", "cutoff"])
def test_it_compiles_for_any_number_of_tokens(form, device):
    call = make(form, 1, 64, 48, device=device)
    compiled = torch.compile(lambda x: call(x=x), fullgraph=True, dynamic=True)
    for tokens in (1, 3, 4):
        x = make(form, tokens, 64, 48, device=device, seed=tokens).named["x"]
        call.assert_close(compiled(x), x=x)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_it_runs_in_a_captured_graph(form, tokens):
    """With two launches of it after each other, whose workspaces have to be left as they were."""
    calls = [make(form, tokens, 2048, 1032, torch.bfloat16, "cuda", seed=seed) for seed in (0, 50)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]
    for seed in range(5):
        for call in calls:
            call.named["x"].copy_(make(form, tokens, 2048, 8, torch.bfloat16, "cuda", seed=100 + seed).named["x"])
        for _ in range(20):
            graph.replay()
        for y, call in zip(outputs, calls, strict=True):
            call.assert_close(y)


@pytest.mark.gpu
def test_two_streams_at_once():
    """Each stream has its own workspace."""
    calls = [make("cutoff", 1, 2048, 8192, torch.bfloat16, "cuda", seed=seed) for seed in (0, 50)]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    outputs: list[list[Tensor]] = [[], []]
    for _ in range(100):
        for stream, call, found in zip(streams, calls, outputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(call())
    torch.cuda.synchronize()
    for call, found in zip(calls, outputs, strict=True):
        expected, tolerance = call.expected(), call.tolerance(torch.bfloat16)
        for y in found:
            assert_close(y, expected, **tolerance)
