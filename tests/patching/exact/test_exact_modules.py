"""The modules of apply_exact: what is found and refused, activations of other kinds, special values."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import EXACT, installed, tiny_model, tokens
from support.op_cases import DEVICES
from torch import nn

from cats_ext import (
    CatsMLP,
    apply_exact,
    calibrate,
    quantize,
    remove_cats,
    sparsity_report,
    track_sparsity,
)
from cats_ext.patching.apply import sparse_mlps
from cats_ext.patching.exact import modules
from cats_ext.patching.exact.detection import find_exact_layers, zeros_of
from cats_ext.patching.exact.modules import ExactDown, ExactMLP, gaussian_multipliers, gaussian_top_k


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids[None].to(model.device)).logits[0].float().cpu()


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_cutoff_is_that_of_transformers(dtype, device):
    mlp_class = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n").Gemma3nTextMLP
    gate = torch.randn(5, 3000, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for sparsity in (0.95, 0.5, 0.1):
        module = nn.Module()
        module.activation_sparsity = sparsity
        want = mlp_class._gaussian_topk(module, gate)
        have = gaussian_top_k(gate, gaussian_multipliers(sparsity, gate.device)[dtype])
        assert torch.equal(have, want)
        assert (have == 0).double().mean().item() == pytest.approx(sparsity, abs=0.03)


class MLP(nn.Module):
    """down(act(gate x) * up x), or with ``change`` something else."""

    def __init__(self, act: nn.Module, change=None, hidden: int = 64, intermediate: int = 96) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj = (nn.Linear(hidden, intermediate, bias=False) for _ in range(2))
        self.down_proj, self.act_fn, self.change = nn.Linear(intermediate, hidden), act, change

    def forward(self, x):
        u = self.up_proj(x)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.change(u) if self.change else u))


class Shifted(nn.Module):
    def forward(self, x):
        return torch.relu(x - 0.1)


class Thresholded(nn.Module):  # FATReLU
    def forward(self, x):
        return torch.where(x > 0.1, x, 0)


class Plain(nn.Module):
    """down(act(up x)), or with ``change`` something else."""

    def __init__(self, act: nn.Module, names=("up_proj", "down_proj"), change=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.names, self.act_fn, self.change = names, act, change
        for name, sizes in zip(names, ((64, 96), (96, 64)), strict=True):
            self.add_module(name, nn.Linear(*sizes))

    def forward(self, x):
        up, down = (getattr(self, name) for name in self.names)
        h = self.act_fn(up(x))
        return down(self.change(h) if self.change else h)


class Squared(nn.Module):
    def forward(self, x):
        return torch.relu(x).square()


@pytest.mark.parametrize(
    ("mlp", "kind"),
    [
        (MLP(nn.ReLU()), CatsMLP),
        (MLP(Shifted()), ExactMLP),
        (MLP(Thresholded()), ExactMLP),
        (MLP(Squared()), ExactMLP),
        (MLP(nn.ReLU(), torch.relu), ExactMLP),  # dReLU
        (MLP(nn.ReLU(), torch.tanh), ExactDown),
        (Plain(nn.ReLU()), ExactMLP),
        (Plain(Squared(), ("fc1", "fc2")), ExactMLP),
        (Plain(Shifted()), ExactDown),
        (Plain(nn.ReLU(), change=nn.functional.normalize), ExactDown),
        (Plain(nn.ReLU(), change=lambda h: h.clamp(max=4)), ExactDown),
        (Plain(nn.ReLU(), ("fc_in", "fc2")), ExactDown),
    ],
    ids="relu,shifted,thresholded,relu2,dReLU,unknown,plain,plain relu2,plain shifted,normed,clamped,names".split(","),
)
def test_activations_of_other_kinds(mlp, kind):
    x = torch.randn(3, 64)
    with torch.no_grad():
        want = mlp(x)
        apply_exact(mlp)
        assert isinstance(next(iter(sparse_mlps(mlp).values())), kind)
        torch.testing.assert_close(mlp(x), want, rtol=1e-5, atol=1e-5)
        with track_sparsity(mlp):
            torch.testing.assert_close(mlp(x), want, rtol=1e-5, atol=1e-5)
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    layer, gated = sparsity_report(mlp).layers[0], isinstance(mlp, MLP)
    assert layer.down_sparsity > 0.4 and (layer.up_sparsity > 0.4) == (gated and kind is not ExactDown)
    drops_twice = not gated or kind is ExactDown or mlp.change is torch.relu
    assert (layer.down_sparsity > layer.up_sparsity + 0.1) == drops_twice
    original = MLP if gated else Plain
    remove_cats(mlp)
    assert type(mlp) is original and {type(m) for n, m in mlp._modules.items() if n != "act_fn"} == {nn.Linear}


@pytest.fixture
def exact_calls(monkeypatch):
    """The activations of the calls of exact_mlp that patched modules make."""
    found, real = [], modules.exact_mlp
    monkeypatch.setattr(modules, "exact_mlp", lambda *arguments: (found.append(arguments[4]), real(*arguments))[1])
    return found


@torch.no_grad()
@pytest.mark.parametrize(
    ("mlp", "activation"),
    [
        (MLP(Squared()), "relu2"),
        (MLP(nn.ReLU(), torch.relu), "relu"),
        (Plain(nn.ReLU()), "relu"),
        (MLP(Shifted()), None),
    ],
    ids=["squared", "dReLU", "plain", "unknown"],
)
def test_a_known_formula_is_one_call(mlp, activation, exact_calls):
    """Not of many tokens, where an activation is replaced or seen by a hook, or neurons are counted."""
    mlp, x = copy.deepcopy(mlp), torch.randn(3, 64)
    apply_exact(mlp)
    mlp(x)
    assert exact_calls == ([activation] if activation else [])
    exact_calls.clear()
    mlp(torch.randn(40, 64))
    with track_sparsity(mlp):
        mlp(x)
    hook = mlp.act_fn.register_forward_hook(lambda *_: None)
    mlp(x)
    hook.remove()
    own, mlp.act_fn = mlp.act_fn, Thresholded()
    mlp(x)
    assert exact_calls == []
    mlp.act_fn = own
    mlp(x)
    assert exact_calls == ([activation] if activation else [])


@pytest.mark.parametrize("device", DEVICES)
def test_where_a_known_formula_is_one_call(device, exact_calls):
    """One constant says for how many tokens; on CUDA fewer than on CPUs."""
    from cats_ext.ops.dispatch import MAX_EXACT_TOKENS

    most = MAX_EXACT_TOKENS[device]
    mlp = apply_exact(copy.deepcopy(Plain(nn.ReLU())).to(device, torch.bfloat16))
    with torch.no_grad():
        for tokens in (1, most, most + 1):
            mlp(torch.randn(tokens, 64, device=device, dtype=torch.bfloat16))
    assert len(exact_calls) == 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cutoff", [True, False])
def test_a_cutoff_has_a_constant_of_its_own(cutoff, device, exact_calls, monkeypatch):
    from cats_ext.ops import dispatch

    for name, most in (("MAX_CUTOFF_TOKENS", 2), ("MAX_EXACT_TOKENS", 1)):
        monkeypatch.setattr(dispatch, name, {device: most})
    mlp = apply_exact(copy.deepcopy(Plain(nn.ReLU())).to(device, torch.bfloat16))
    if cutoff:
        mlp.cats.multipliers[torch.bfloat16] = 1.0
    with torch.no_grad():
        for tokens in (1, 2, 3):
            mlp(torch.randn(tokens, 64, device=device, dtype=torch.bfloat16))
    assert len(exact_calls) == (2 if cutoff else 1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [name for name, family in installed(EXACT).items() if family.kind is ExactMLP])
def test_the_kernel_reads_what_the_dense_model_needs(family, dtype, exact_calls):
    """Down rows of neurons that are zero in the dense model are NaN, and nothing of them is seen."""
    model = tiny_model(family, dtype)
    layers, _ = find_exact_layers(model)
    for layer in layers:
        seen = []
        hook = layer.down_owner.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        x = torch.randn(2, layer.down_owner.weight.shape[0], generator=torch.Generator().manual_seed(1)).to(dtype)
        want = layer.module(x)
        hook.remove()
        zero = (seen[0] == 0).all(0)
        assert 0.05 < zero.double().mean() < 1
        apply_exact(layer.module)
        layer.down_owner.weight[:, zero] = torch.nan
        tolerance = 2e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(layer.module(x), want, rtol=tolerance, atol=tolerance)
    assert len(exact_calls) == len(layers)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "mlp",
    [MLP(nn.ReLU()), MLP(Shifted()), MLP(nn.ReLU(), torch.relu), MLP(nn.ReLU(), torch.tanh), Plain(Squared())],
    ids=["gated", "activated", "dReLU", "down only", "plain"],
)
def test_nan_and_infinite_inputs(mlp, value):
    mlp = copy.deepcopy(mlp)
    x = torch.randn(3, 64)
    x[1, 5] = value
    with torch.no_grad():
        want = mlp(x)
        have = apply_exact(mlp)(x)
    torch.testing.assert_close(have[[0, 2]], want[[0, 2]], rtol=1e-5, atol=1e-5)
    assert not have[1].isfinite().any() and not want[1].isfinite().any()


def test_report_of_packed_rows():
    """Tokens, layers' sizes and shares are those of the dense model; the bytes are the rows'."""
    model = quantize(tiny_model("llama-relu", hidden_size=128, intermediate_size=192), "int8", progress=False)
    apply_exact(model)
    with track_sparsity(model):
        logits(model, tokens(3))
    mlp, layer = model.model.layers[0].mlp, sparsity_report(model).layers[0]
    assert (mlp.cats.target.hidden_size, mlp.cats.target.intermediate_size) == (128, 192)
    assert layer.tokens == 3 and layer.weight_bytes == sum(p.numel() for p in mlp.parameters())


def test_hooks_and_adapters_are_called():
    model = apply_exact(tiny_model("llama-relu2"))
    calls = []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: calls.append("act"))
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: calls.append("up"))
    model.model.layers[2].mlp.down_proj.register_forward_hook(lambda _, __, y: y * 0)
    logits(model, tokens(1))
    assert calls == ["act", "up"]


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_model_with_nothing_to_gain():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no MLP that is exactly zero .*: its act.* silu in 3"):
        apply_exact(tiny_model("llama"))
    with pytest.raises(ValueError, match="it has no MLP with a known activation"):
        apply_exact(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        apply_exact("model")


def test_a_patched_model_is_refused():
    model = apply_exact(tiny_model("nemotron"))
    with pytest.raises(ValueError, match="is patched already: call remove_cats first"):
        apply_exact(model)
    relu = apply_exact(tiny_model("llama-relu"))
    with pytest.raises(ValueError, match="is patched already"):
        calibrate(relu, tokens(20), progress=False)


def test_tied_weights_are_refused_by_name():
    mlp = MLP(nn.ReLU())
    mlp.other = nn.Linear(96, 64, bias=False)
    mlp.other.weight = mlp.down_proj.weight
    with pytest.raises(ValueError, match=r"has such an activation, but down_proj.weight shares memory"):
        apply_exact(nn.Sequential(mlp))


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch):
    from cats_ext.patching.exact import apply

    model = tiny_model("llama-relu2")
    want, make, made = logits(model, tokens(1)), apply._make_exact, []

    def interrupted(*arguments):
        if made:
            raise KeyboardInterrupt
        make(*arguments)
        made.append(arguments)

    monkeypatch.setattr(apply, "_make_exact", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_exact(model)
    assert not sparse_mlps(model) and torch.equal(logits(model, tokens(1)), want)


def test_zeros_of_activations():
    assert zeros_of(torch.relu) > 0.49 and zeros_of(nn.functional.silu) < 0.01
    assert zeros_of(nn.functional.gelu) < 0.01 and zeros_of(lambda x: x.reshape(-1, 3)) == 0


@pytest.mark.parametrize(("family", "name"), [("llama-relu2", "mlp.down_proj"), ("nemotron", "mlp.down_proj")])
def test_weights_that_cannot_be_laid_out_are_refused_by_name(family, name):
    model = tiny_model(family)
    model.share_memory()
    with pytest.raises(ValueError, match=rf"^model\.layers\.0\.{name} is in memory shared between processes"):
        apply_exact(model)
    assert not sparse_mlps(model)
