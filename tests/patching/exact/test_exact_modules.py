"""The modules of apply_exact: what is found and refused, activations of other kinds, special values."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import tiny_model, tokens
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
from cats_ext.patching.exact.detection import zeros_of
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


@pytest.mark.parametrize(
    ("mlp", "kind"),
    [
        (MLP(nn.ReLU()), CatsMLP),
        (MLP(Shifted()), ExactMLP),
        (MLP(Thresholded()), ExactMLP),
        (MLP(nn.ReLU(), torch.relu), ExactDown),  # dReLU
        (MLP(nn.ReLU(), torch.tanh), ExactDown),
    ],
    ids=["relu", "shifted", "thresholded", "dReLU", "unknown"],
)
def test_activations_of_other_kinds(mlp, kind):
    x = torch.randn(3, 64)
    with torch.no_grad():
        want = mlp(x)
        apply_exact(mlp)
        assert isinstance(next(iter(sparse_mlps(mlp).values())), kind)
        with track_sparsity(mlp):
            torch.testing.assert_close(mlp(x), want, rtol=1e-5, atol=1e-5)
    layer = sparsity_report(mlp).layers[0]
    assert layer.down_sparsity > 0.4 and (layer.up_sparsity > 0.4) == (kind is not ExactDown)
    remove_cats(mlp)
    assert type(mlp) is MLP and type(mlp.down_proj) is nn.Linear


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "mlp", [MLP(nn.ReLU()), MLP(Shifted()), MLP(nn.ReLU(), torch.tanh)], ids=["gated", "activated", "down only"]
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
