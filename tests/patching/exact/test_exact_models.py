"""apply_exact: models that are sparse by themselves compute what they did, in every form and for every family."""

from __future__ import annotations

import json

import pytest
import torch
from support.models import EXACT, VOCABULARY, installed, tiny_model, tokens
from support.op_cases import DEVICES
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig

import cats_ext
from cats_ext import (
    CatsMLP,
    apply_cats,
    apply_exact,
    calibrate,
    remove_cats,
    sparsity_report,
    track_sparsity,
)
from cats_ext.patching.apply import masking_disabled, set_sparsity, sparse_mlps
from cats_ext.patching.exact.detection import find_exact_layers
from cats_ext.patching.exact.modules import ExactDown

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


@pytest.mark.parametrize("family", [family for family in FAMILIES if EXACT[family].kind is CatsMLP])
def test_many_tokens_and_training_run_the_models_own_forward(family, called):
    model = apply_exact(tiny_model(family))
    logits(model, tokens(40))
    model(input_ids=tokens(2)[None])  # with gradients
    assert called == []


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found(family):
    expected = EXACT[family]
    layers, refused = find_exact_layers(tiny_model(family))
    assert {layer.kind for layer in layers} == {expected.kind} and not refused
    assert len(layers) == expected.layers and {layer.matrices for layer in layers} == {expected.matrices}
    only_down = expected.matrices == 2 or expected.kind is ExactDown
    assert {layer.skipped for layer in layers} == {"down rows" if only_down else "up and down rows"}


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


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_are_one_graph(family):
    """As the dense ones are; what the graph becomes is tested below."""
    model = tiny_model(family)
    want = logits(model, tokens(2))
    compiled = torch.compile(apply_exact(model), fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, tokens(2)), want, rtol=0, atol=2e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llama-relu", "llama-relu2", "opt"])
def test_compiled(family, device):
    model = tiny_model(family, num_hidden_layers=1).to(device)
    want = logits(model, tokens(1))
    compiled = torch.compile(apply_exact(model), fullgraph=True, dynamic=False)
    torch.testing.assert_close(logits(compiled, tokens(1)), want, rtol=0, atol=2e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("form", ["eager", "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family, form, device):
    if form == "compiled" and (device == "cpu" and family not in ("llama-relu", "gemma3n", "nemotron")):
        pytest.skip("all families are compiled on a GPU")
    model, ids = tiny_model(family).to(device), tokens(5)[None].to(device)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=VOCABULARY)
    want = model.generate(ids, **options)
    if form == "compiled":
        options |= {"cache_implementation": "static", "compile_config": CompileConfig(backend="aot_eager", mode=None)}
        options["compile_config"]._compile_all_devices = True
    assert torch.equal(apply_exact(model).generate(ids, **options), want)
    torch._dynamo.reset()


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


@pytest.mark.parametrize("bias", [-100.0, 100.0], ids=["all zero", "none zero"])
@pytest.mark.parametrize("family", ["llama-relu", "llama-relu2", "nemotron"])
def test_all_and_none_zero(family, bias):
    act = {"llama-relu": nn.ReLU, "llama-relu2": Squared, "nemotron": Squared}[family]()
    dense, exact = tiny_model(family), apply_exact(tiny_model(family))
    for model in (dense, exact):
        for layer in model.model.layers:
            layer.mlp.act_fn = Biased(act, bias)
    torch.testing.assert_close(logits(exact, tokens(2)), logits(dense, tokens(2)), rtol=1e-3, atol=1e-3)


class Biased(nn.Module):
    def __init__(self, act, bias):
        super().__init__()
        self.act, self.bias = act, bias

    def forward(self, x):
        return self.act(x + self.bias)


class Squared(nn.Module):
    def forward(self, x):
        return torch.relu(x).square()


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
