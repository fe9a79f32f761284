"""apply_exact: models that are sparse by themselves compute what they did, in every form and for every family."""

from __future__ import annotations

import json

import pytest
import torch
from support.models import EXACT, VOCABULARY, installed, tiny_model, tokens
from support.op_cases import DEVICES
from torch import nn
from transformers import AutoModelForCausalLM

import cats_ext
from cats_ext import (
    CatsMLP,
    apply_cats,
    apply_exact,
    calibrate,
    quantize,
    remove_cats,
    sparsity_report,
    track_sparsity,
)
from cats_ext.patching.apply import masking_disabled, set_sparsity, sparse_mlps
from cats_ext.patching.exact.detection import GATED, find_exact_layers, zeros_of
from cats_ext.patching.exact.modules import ExactDown, ExactMLP, gaussian_multipliers, gaussian_top_k

FAMILIES = [*installed(EXACT)]
COUNTS = [1, 3, 40]  # few tokens take the kernel, many the model's own forward
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of logits of order one


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids[None].to(model.device)).logits[0].float().cpu()


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_the_same(family, dtype, device):
    model = tiny_model(family, dtype).to(device)
    before, keys = [logits(model, tokens(n)) for n in COUNTS], copy_of(model)
    assert apply_exact(model) is model
    for want, count in zip(before, COUNTS, strict=True):
        torch.testing.assert_close(logits(model, tokens(count)), want, rtol=0, atol=TOLERANCE[dtype])
    after = model.state_dict()
    assert after.keys() == keys.keys() and all(torch.equal(after[name], t) for name, t in keys.items())
    remove_cats(model)
    assert not sparse_mlps(model)
    assert all(torch.equal(logits(model, tokens(n)), want) for n, want in zip(COUNTS, before, strict=True))


@pytest.mark.parametrize("family", [family for family in FAMILIES if EXACT[family].form == GATED])
def test_many_tokens_and_training_run_the_models_own_forward(family, called):
    model = apply_exact(tiny_model(family))
    logits(model, tokens(40))
    model(input_ids=tokens(2)[None])  # with gradients
    assert called == []


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found(family):
    expected = EXACT[family]
    layers, refused = find_exact_layers(tiny_model(family))
    assert {layer.form for layer in layers} == {expected.form} and not refused
    assert len(layers) == expected.layers and {layer.matrices for layer in layers} == {expected.matrices}


@pytest.mark.parametrize("count", [1, 40], ids=["kernel", "dense path"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_equal_neuron_by_neuron(family, count):
    """What is counted as kept is what the dense model's down projections see that is not zero."""
    model = tiny_model(family)
    layers, _ = find_exact_layers(model)
    seen = {}
    owners = {layer.name: layer.down_owner for layer in layers if not (layer.mlp and layer.mlp.experts)}
    hooks = [
        owner.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, (args[0] != 0).sum().item()))
        for name, owner in owners.items()
    ]
    want = logits(model, tokens(count))
    for hook in hooks:
        hook.remove()
    apply_exact(model)
    with track_sparsity(model):
        torch.testing.assert_close(logits(model, tokens(count)), want, rtol=0, atol=2e-5)
    for name, kept in seen.items():
        module = sparse_mlps(model)[name]
        evaluated, _, down = module.counts.tolist()
        assert evaluated == count * module.cats.target.intermediate_size and down == kept
    report = sparsity_report(model)
    assert 0.2 < report.down_sparsity < 0.99 and report.bytes_share < 0.95


@pytest.mark.parametrize("family", [f for f in FAMILIES if f in ("llama-relu", "gemma3n", "nemotron", "opt")])
def test_compiled(family, device):
    model = tiny_model(family).to(device)
    want = logits(model, tokens(1))
    apply_exact(model)
    for module in list(sparse_mlps(model).values())[:1]:
        width = module.weight.shape[1] if isinstance(module, ExactDown) else module.cats.target.hidden_size
        x = torch.relu(torch.randn(1, 1, width, generator=torch.Generator().manual_seed(0))).to(device)
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    torch.testing.assert_close(logits(model, tokens(1)), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_model(family):
    model = tiny_model(family)

    def gradients():
        model.zero_grad()
        model(input_ids=tokens(7)[None]).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    apply_exact(model)
    after = gradients()
    assert before.keys() == after.keys()
    for name, grad in before.items():
        torch.testing.assert_close(after[name], grad, rtol=1e-4, atol=1e-6)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_patched_when_it_is_loaded(family, tmp_path):
    model = apply_exact(tiny_model(family))
    names = list(sparse_mlps(model))
    model.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry == {"quant_method": "cats", "rule": "exact"}
    assert not list(tmp_path.glob("cats_*"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(sparse_mlps(loaded)) == names
    torch.testing.assert_close(logits(loaded, tokens(2)), logits(model, tokens(2)), rtol=0, atol=1e-6)
    remove_cats(loaded).save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_a_dense_checkpoint_is_patched_on_request(tmp_path):
    tiny_model("llama-relu").save_pretrained(tmp_path)
    exact = {"quant_method": "cats", "rule": "exact"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=exact)
    assert len(sparse_mlps(loaded)) == 3 and all(m.forward_settings.exact for m in sparse_mlps(loaded).values())


def test_saving_over_a_calibrated_checkpoint(tmp_path):
    model = tiny_model("llama-relu")
    apply_cats(model, calibrate(model, tokens(200), progress=False)).save_pretrained(tmp_path)
    want = logits(remove_cats(model), tokens(2))
    apply_exact(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, tokens(2)), want, rtol=0, atol=2e-5)


# --- modules --------------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("act", [nn.ReLU(), Shifted()], ids=["gated", "activated"])
def test_nan_and_infinite_inputs(act, value):
    mlp = MLP(act)
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


@pytest.mark.parametrize("bias", [-100.0, 100.0], ids=["all zero", "none zero"])
@pytest.mark.parametrize("family", ["llama-relu", "llama-relu2", "nemotron"])
def test_all_and_none_zero(family, bias):
    act = {"llama-relu": nn.ReLU, "llama-relu2": Squared, "nemotron": Squared}[family]()
    dense, exact = tiny_model(family), apply_exact(tiny_model(family))
    for model in (dense, exact):
        for layer in model.model.layers:
            layer.mlp.act_fn = Biased(act, bias)
    torch.testing.assert_close(logits(exact, tokens(2)), logits(dense, tokens(2)), rtol=1e-3, atol=1e-3)


class Squared(nn.Module):
    def forward(self, x):
        return torch.relu(x).square()


class Biased(nn.Module):
    def __init__(self, act, bias):
        super().__init__()
        self.act, self.bias = act, bias

    def forward(self, x):
        return self.act(x + self.bias)


def test_hooks_and_adapters_are_called():
    model = apply_exact(tiny_model("llama-relu2"))
    calls = []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: calls.append("act"))
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: calls.append("up"))
    model.model.layers[2].mlp.down_proj.register_forward_hook(lambda _, __, y: y * 0)
    logits(model, tokens(1))
    assert calls == ["act", "up"]


def test_peft_trains_a_patched_model():
    peft = pytest.importorskip("peft")
    model = apply_exact(tiny_model("nemotron"))
    want = logits(model, tokens(2))
    config = peft.LoraConfig(r=2, target_modules=["up_proj", "down_proj"])
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(logits(adapted, tokens(2)), want, rtol=0, atol=2e-5)
    adapted(input_ids=tokens(4)[None]).logits.mean().backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_B" in n)


def test_masking_can_be_disabled_and_sparsity_not_set():
    model = tiny_model("nemotron")
    want = logits(model, tokens(1))
    apply_exact(model)
    with masking_disabled(model):
        torch.testing.assert_close(logits(model, tokens(1)), want, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"sparsity of a model that is sparse by itself cannot be set, got 0\.\d"):
        set_sparsity(model, 0.5)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f in ("llama-relu", "llama-relu2", "gemma3n", "nemotron", "opt")]
)
def test_the_engine_decodes_the_same(family, device):
    """On a GPU it captures the model; the step of a ReLUfied Llama is the fused one."""
    model, ids = tiny_model(family).to(device), tokens(5)[None].to(device)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=VOCABULARY)
    want = model.generate(ids, **options)
    assert torch.equal(cats_ext.DecodeEngine(apply_exact(model)).generate(ids, **options), want)


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
