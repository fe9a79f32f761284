"""apply_cats and remove_cats on tiny models of every family: the same numbers, and nothing half done."""

from __future__ import annotations

import copy
import io
import itertools
import sys
import types
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models import CONFIGS, HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, tiny_model, tokens
from torch import nn

from cats_ext import CatsConfig, CatsMLP, apply_cats, calibrate, remove_cats, sparsity_report, track_sparsity
from cats_ext.functional import MAX_KERNEL_TOKENS
from cats_ext.modules import make_dense, make_sparse
from cats_ext.reference import ACTIVATIONS, gated_threshold_ref

FAMILIES = list(CONFIGS)
ACTIVATION = {"gemma2": "gelu_tanh", "gemma3": "gelu_tanh", "llama-relu": "relu"}


def config_for(model, sparsity=0.5, rule="two_threshold", **arguments) -> CatsConfig:
    return calibrate(model, tokens(300), sparsity=sparsity, rule=rule, sequence_length=150, progress=False, **arguments)


def layers_of(model) -> list[nn.Module]:
    return [layer.mlp for layer in model.model.layers]


def few(seed=5):
    """As many tokens as the kernel takes."""
    return tokens(MAX_KERNEL_TOKENS["cpu"], seed)[None]


def many(seed=6):
    return tokens(40, seed)[None]


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@pytest.fixture
def called(monkeypatch):
    """Which of the two ways the patched MLPs took."""
    from cats_ext import ops

    ways = []

    def spy(name):
        real = getattr(ops, name)
        return lambda *arguments: (ways.append(name), real(*arguments))[1]

    for name in ("sparse_mlp", "sparse_mlp_counted", "gated_threshold"):
        monkeypatch.setattr(ops, name, spy(name))
    return ways


# --- the same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ids", [few(), many()], ids=["kernel", "dense path"])
def test_threshold_zero_is_the_dense_model(family, ids):
    model = tiny_model(family)
    expected = logits(model, ids)
    apply_cats(model, config_for(model, sparsity=0.0))
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["plain", "two_threshold"])
def test_mlp_computes_the_formula(family, rule):
    model = tiny_model(family)
    originals = copy.deepcopy(layers_of(model))
    config = config_for(model, rule=rule)
    apply_cats(model, config)
    for (name, threshold), module, dense in zip(config.thresholds.items(), layers_of(model), originals, strict=True):
        for x in (torch.randn(3, HIDDEN), torch.randn(2, 9, HIDDEN)):
            if hasattr(dense, "gate_up_proj"):
                gate, up = dense.gate_up_proj(x).chunk(2, -1)
            else:
                gate, up = dense.gate_proj(x), dense.up_proj(x)
            v = ACTIVATIONS[ACTIVATION.get(family, "silu")](gate)
            h = torch.where(v.abs() >= threshold, v * up, 0)
            if rule == "two_threshold":
                h = torch.where(h.abs() >= config.down_thresholds[name], h, 0)
            assert (h == 0).float().mean() > 0.3
            with torch.no_grad():
                torch.testing.assert_close(module(x), dense.down_proj(h), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_kernel_equals_the_dense_masked_path(family, called, monkeypatch):
    model = tiny_model(family)
    apply_cats(model, config_for(model))
    kernel = logits(model, few())
    assert called == ["sparse_mlp"] * LAYERS
    called.clear()
    ids = few()
    monkeypatch.setitem(MAX_KERNEL_TOKENS, "cpu", 0)
    dense = logits(model, ids)
    assert called == ["gated_threshold"] * LAYERS
    torch.testing.assert_close(kernel, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_other_dtypes(dtype, family, called):
    model = tiny_model(family)
    config = config_for(model)
    reference = logits(apply_cats(copy.deepcopy(model), config), few())
    called.clear()
    model = apply_cats(model.to(dtype), config)
    got = logits(model, few())
    assert got.dtype == dtype
    assert set(called) == {"gated_threshold" if dtype == torch.float64 else "sparse_mlp"}
    # rounding moves neurons across their thresholds, hence only close
    similarity = F.cosine_similarity(got.float(), reference, dim=-1)
    assert similarity.min() > 0.95 and similarity.mean() > 0.99


# --- around the numbers ---------------------------------------------------------------------------------------------


def snapshot(model) -> dict:
    return {
        "state": {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()},
        "parameters": [(name, id(p)) for name, p in model.named_parameters()],
        "buffers": [name for name, _ in model.named_buffers()],
        "modules": [(name, id(m), type(m)) for name, m in model.named_modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "non-persistent": [sorted(m._non_persistent_buffers_set) for m in model.modules()],
    }


def assert_unchanged(model, before) -> None:
    after = snapshot(model)
    state, state_before = after.pop("state"), before["state"]
    assert after == {name: value for name, value in before.items() if name != "state"}
    assert list(state) == list(state_before)
    for name, (value, stride) in state.items():
        assert stride == state_before[name][1], name
        assert torch.equal(value, state_before[name][0]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_remove_restores_bit_for_bit(family):
    model = tiny_model(family)
    before, expected = snapshot(model), logits(model, many())
    config = config_for(model)
    assert apply_cats(model, config) is model
    assert remove_cats(model) is model
    assert_unchanged(model, before)
    assert torch.equal(logits(model, many()), expected)
    remove_cats(apply_cats(model, config))  # and again
    assert_unchanged(model, before)


def test_unusual_strides_come_back():
    model = tiny_model()
    down = layers_of(model)[0].down_proj
    padded = torch.zeros(HIDDEN, INTERMEDIATE + 24)[:, :INTERMEDIATE].copy_(down.weight.detach())
    down.weight.data = padded
    before = snapshot(model)
    remove_cats(apply_cats(model, config_for(model)))
    assert down.weight.stride() == (INTERMEDIATE + 24, 1)
    assert_unchanged(model, before)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_patching_keeps_modules_parameters_and_state_dict(family):
    model = tiny_model(family)
    before = snapshot(model)
    apply_cats(model, config_for(model))
    after = snapshot(model)
    assert after["parameters"] == before["parameters"]
    assert [(name, identity) for name, identity, _ in after["modules"]] == [
        (name, identity) for name, identity, _ in before["modules"]
    ]
    assert list(after["state"]) == list(before["state"])
    assert all(torch.equal(after["state"][n][0], before["state"][n][0]) for n in before["state"])
    for module in layers_of(model):
        assert isinstance(module, CatsMLP)
        assert module.down_proj.weight.shape == (HIDDEN, INTERMEDIATE)
        assert module.down_proj.weight.t().is_contiguous()
        assert type(module.down_proj) is nn.Linear
    assert "two thresholds, target sparsity up 0.400, down 0.600" in repr(model)


def test_memory_at_rest():
    model = tiny_model()

    def size():
        return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))

    before = size()
    apply_cats(model, config_for(model, weighted_gate=True))
    per_layer = 2 * 4 * INTERMEDIATE + 3 * 8
    assert size() - before == LAYERS * per_layer


def test_weights_load_into_a_patched_model_and_back(tmp_path):
    model, other = tiny_model(), tiny_model(seed=1)
    apply_cats(model, config_for(model))
    model.load_state_dict(other.state_dict())
    assert layers_of(model)[0].down_proj.weight.t().is_contiguous()
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, many()), logits(other, many()))


def test_a_weight_in_another_layout_takes_the_dense_path(called):
    model = tiny_model()
    apply_cats(model, config_for(model))
    expected = logits(model, few())
    model.load_state_dict({k: v.clone().contiguous() for k, v in model.state_dict().items()}, assign=True)
    called.clear()
    torch.testing.assert_close(logits(model, few()), expected, rtol=1e-4, atol=1e-4)
    assert set(called) == {"gated_threshold"}


# --- casting, moving, copying ---------------------------------------------------------------------------------------


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "device": lambda m: m.to("cpu"),
    "device and dtype": lambda m: m.to("cpu", torch.bfloat16),
    "deepcopy": copy.deepcopy,
    "eval": lambda m: m.train().eval(),
    "there and back": lambda m: m.to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("how", CASTS)
def test_thresholds_stay_float32_with_their_exact_values(how):
    model = tiny_model()
    config = config_for(model, weighted_gate=True)
    apply_cats(model, config)
    track_sparsity(model)
    cast = CASTS[how](model)
    for name, module in zip(config.layers, layers_of(cast), strict=True):
        for attribute, expected in (("threshold", config.thresholds), ("down_threshold", config.down_thresholds)):
            threshold = getattr(module, attribute)
            assert threshold.dtype == torch.float32
            assert torch.equal(threshold, expected[name])
        assert module.counts.dtype == torch.int64
        assert module.down_proj.weight.t().is_contiguous()
    logits(cast, few())
    logits(cast, many())
    assert sparsity_report(cast).tokens == few().numel() + many().numel()
    remove_cats(cast)
    assert all(m.down_proj.weight.is_contiguous() for m in layers_of(cast))


def test_thresholds_follow_to_another_device():
    model = tiny_model()
    apply_cats(model, config_for(model))
    model.to("meta")
    for module in layers_of(model):
        assert module.threshold.device.type == module.counts.device.type == "meta"
        assert module.threshold.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(family):
    model = tiny_model(family)
    config = config_for(model)
    expected = {
        n: logits(apply_cats(copy.deepcopy(model), config), ids) for n, ids in (("few", few()), ("many", many()))
    }
    there = apply_cats(copy.deepcopy(model), config).cuda()  # moved after patching, and patched after moving
    patched_there = apply_cats(model.cuda(), config_for(model))
    for m in (there, patched_there):
        assert layers_of(m)[0].threshold.is_cuda
        for n, ids in (("few", few()), ("many", many())):
            assert F.cosine_similarity(logits(m, ids.cuda()).cpu(), expected[n], dim=-1).min() > 0.999


def test_deepcopy_is_independent():
    model = tiny_model()
    apply_cats(model, config_for(model))
    twin = copy.deepcopy(model)
    remove_cats(twin)
    assert all(isinstance(m, CatsMLP) for m in layers_of(model))
    assert all(m.down_proj.weight.t().is_contiguous() for m in layers_of(model))
    with pytest.raises(ValueError, match="not patched"):
        remove_cats(twin)


def test_pickle_of_the_whole_model():
    model = tiny_model("phi3")
    apply_cats(model, config_for(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(logits(loaded, few()), logits(model, few()))
    assert layers_of(loaded)[0].threshold.dtype == torch.float32
    remove_cats(loaded)
    assert type(layers_of(loaded)[0]).__name__ == "Phi3MLP"
    assert layers_of(loaded)[0].down_proj.weight.is_contiguous()


def test_thresholds_changed_in_place_act_at_once():
    model = tiny_model()
    expected = logits(model, few())
    apply_cats(model, config_for(model))
    assert not torch.allclose(logits(model, few()), expected)
    for module in layers_of(model):
        module.threshold.zero_()
        module.down_threshold.zero_()
    torch.testing.assert_close(logits(model, few()), expected, rtol=1e-5, atol=1e-5)


# --- which way is taken ---------------------------------------------------------------------------------------------


def test_gradients_take_the_dense_path_and_are_right(called):
    model = tiny_model().double()
    config = config_for(model)
    reference = copy.deepcopy(layers_of(model)[0])
    apply_cats(model, config)
    module = layers_of(model)[0]
    x = torch.randn(2, HIDDEN, dtype=torch.float64, requires_grad=True)
    called.clear()
    module(x).square().sum().backward()
    assert called == ["gated_threshold"]
    y = x.detach().clone().requires_grad_()
    rule = (module.threshold, module.down_threshold, "silu")
    h = gated_threshold_ref(reference.gate_proj(y), reference.up_proj(y), *rule)
    reference.down_proj(h).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for got, want in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


@pytest.mark.parametrize("needs", ["input", "gate weight", "down bias", "nothing"])
def test_the_kernel_never_swallows_a_gradient(needs, called):
    model = tiny_model("llama-bias").requires_grad_(False)
    apply_cats(model, config_for(model))
    module = layers_of(model)[0]
    called.clear()
    x = torch.randn(1, HIDDEN, requires_grad=needs == "input")
    module.gate_proj.weight.requires_grad_(needs == "gate weight")
    module.down_proj.bias.requires_grad_(needs == "down bias")
    y = module(x)
    assert y.requires_grad == (needs != "nothing")
    assert called == ["sparse_mlp" if needs == "nothing" else "gated_threshold"]


def test_training_with_gradient_checkpointing():
    model = tiny_model().train()
    apply_cats(model, config_for(model))
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable()
    ids = many()
    losses = [m(input_ids=ids, labels=ids).loss for m in (model, twin)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    optimizer.step()
    assert model(input_ids=ids, labels=ids).loss < losses[0]
    assert layers_of(model)[0].down_proj.weight.t().is_contiguous()


def test_hooks_on_a_projection_fire_and_count(called):
    model = tiny_model()
    apply_cats(model, config_for(model))
    expected = logits(model, few())
    seen = []
    handle = layers_of(model)[1].up_proj.register_forward_hook(lambda m, a, output: seen.append(output) or output * 2)
    called.clear()
    assert not torch.allclose(logits(model, few()), expected)
    assert len(seen) == 1 and called.count("gated_threshold") == 1
    handle.remove()
    assert torch.equal(logits(model, few()), expected)
    handle = layers_of(model)[1].down_proj.register_forward_pre_hook(lambda m, a: seen.append(a))
    logits(model, few())
    assert len(seen) == 2
    handle.remove()


def test_hooks_on_the_mlp_survive_patching_and_removal():
    model, seen = tiny_model(), []
    handle = layers_of(model)[0].register_forward_hook(lambda *a: seen.append(1))
    config = config_for(model)
    seen.clear()
    apply_cats(model, config)
    logits(model, few())
    remove_cats(model)
    logits(model, few())
    assert len(seen) == 2
    handle.remove()
    logits(model, few())
    assert len(seen) == 2


@pytest.mark.parametrize("targets", [["gate_proj"], ["up_proj", "down_proj"], ["q_proj"]])
def test_lora_unmerged_and_merged(targets, called):
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    config = config_for(model)
    dense = copy.deepcopy(model)
    apply_cats(model, config)
    called.clear()
    peft_model = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
    adapted = logits(peft_model, few())
    in_mlp = targets != ["q_proj"]
    assert set(called) == {"gated_threshold" if in_mlp else "sparse_mlp"}

    merged = copy.deepcopy(peft_model).merge_and_unload()
    called.clear()
    torch.testing.assert_close(logits(merged, few()), adapted, rtol=1e-3, atol=1e-3)
    assert set(called) == {"sparse_mlp"}

    remove_cats(peft_model)  # the adapter stays
    torch.manual_seed(0)
    assert all(m.weight.is_contiguous() for m in peft_model.modules() if type(m) is nn.Linear)
    twin = get_peft_model(dense, LoraConfig(target_modules=targets, init_lora_weights=False))
    twin.load_state_dict(peft_model.state_dict())
    assert torch.equal(logits(twin, few()), logits(peft_model, few()))


def test_dtype_mismatch_is_as_clear_as_with_a_linear():
    model = tiny_model(dtype=torch.bfloat16)
    apply_cats(model, config_for(model))
    for count in (1, 30):
        with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
            layers_of(model)[0](torch.randn(count, HIDDEN))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_autocast(family, called):
    model = tiny_model(family)
    config = config_for(model)
    apply_cats(model, config)
    module = layers_of(model)[0]
    x = torch.randn(2, HIDDEN)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        called.clear()
        y = module(x)
    assert y.dtype == torch.bfloat16 and called == ["gated_threshold"]
    with torch.no_grad():
        torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.3)


# --- in company -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation(family, called):
    model = tiny_model(family)
    arguments = dict(max_new_tokens=12, do_sample=False)
    prompt = tokens(17)[None]
    dense = model.generate(prompt, **arguments)
    apply_cats(model, config_for(model, sparsity=0.0))
    called.clear()
    assert torch.equal(model.generate(prompt, **arguments), dense)
    assert set(called) == {"sparse_mlp", "gated_threshold"}  # the prompt is long, a step is not
    remove_cats(model)
    apply_cats(model, config_for(model, sparsity=0.9))
    assert not torch.equal(model.generate(prompt, **arguments), dense)


def test_generation_with_beams_padding_and_sampling():
    model = tiny_model()
    prompts = torch.stack([tokens(10), tokens(10, seed=1)])
    mask = torch.ones_like(prompts)
    prompts[0, :4], mask[0, :4] = 0, 0
    arguments = dict(attention_mask=mask, max_new_tokens=8)
    torch.manual_seed(0)
    ways = (dict(num_beams=3, do_sample=False), dict(do_sample=False), dict(do_sample=True))
    dense = []
    for way in ways:
        torch.manual_seed(0)
        dense.append(model.generate(prompts, **arguments, **way))
    config = config_for(model)
    apply_cats(model, config_for_zero := replace_thresholds(config, 0.0))
    assert config_for_zero.rule == "two_threshold"
    for way, expected in zip(ways, dense, strict=True):
        torch.manual_seed(0)
        assert torch.equal(model.generate(prompts, **arguments, **way), expected)


def replace_thresholds(config: CatsConfig, value: float) -> CatsConfig:
    return replace(
        config,
        thresholds={name: torch.tensor(value) for name in config.thresholds},
        down_thresholds={name: torch.tensor(value) for name in config.down_thresholds},
    )


def test_static_cache_generation():
    model = tiny_model()
    apply_cats(model, config_for(model))
    arguments = dict(max_new_tokens=8, do_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        static = model.generate(tokens(9)[None], cache_implementation="static", disable_compile=True, **arguments)
    assert torch.equal(static, model.generate(tokens(9)[None], **arguments))


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("tracking", [False, True])
@pytest.mark.parametrize("ids", [few(), many()], ids=["kernel", "dense path"])
def test_compile_fullgraph(family, tracking, ids):
    model = tiny_model(family)
    apply_cats(model, config_for(model))
    expected = logits(model, ids)
    track_sparsity(model, tracking)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-4, atol=1e-4)
    for module in layers_of(model):
        module.threshold.zero_()  # not baked in
    assert not torch.allclose(logits(compiled, ids), expected)
    if tracking:
        assert sparsity_report(model).tokens == 2 * ids.numel()


@pytest.mark.slow
def test_compile_fullgraph_with_inductor(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = tiny_model()
    apply_cats(model, config_for(model))
    torch._dynamo.reset()
    compiled = torch.compile(layers_of(model)[0], fullgraph=True)
    for count in (1, 3, 40):
        x = torch.randn(count, HIDDEN)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layers_of(model)[0](x), rtol=1e-4, atol=1e-4)


def test_a_model_compiled_before_patching_notices(called):
    model = tiny_model()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    dense = logits(compiled, few())
    apply_cats(model, config_for(model, sparsity=0.9))
    assert not torch.allclose(logits(compiled, few()), dense, atol=1e-2)
    remove_cats(model)
    torch.testing.assert_close(logits(compiled, few()), dense)


def test_inference_mode():
    model = tiny_model()
    apply_cats(model, config_for(model))
    for ids in (few(), many()):
        with torch.inference_mode():
            got = model(input_ids=ids).logits
        assert torch.equal(got, logits(model, ids))


# --- refused, and left alone ----------------------------------------------------------------------------------------


def refuse(model, config, match, error=ValueError):
    before = snapshot(model)
    with pytest.raises(error, match=match):
        apply_cats(model, config)
    assert_unchanged(model, before)


def test_patched_twice_and_removed_twice():
    model = tiny_model()
    config = config_for(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched: there is nothing to remove"):
        remove_cats(model)
    apply_cats(model, config)
    refuse(model, config, "LlamaForCausalLM is patched already: call remove_cats first")
    remove_cats(model)
    with pytest.raises(ValueError, match="not patched"):
        remove_cats(model)


def test_models_without_a_gated_mlp():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = config_for(tiny_model())
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    refuse(gpt2, config, "GPT2LMHeadModel has no gated MLP")
    refuse(nn.Linear(2, 2), config, "Linear has no gated MLP")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        apply_cats("model", config)
    refuse(tiny_model(), {"threshold": 1}, "config must be a CatsConfig, got dict", TypeError)


def test_config_for_another_model():
    config = config_for(tiny_model())
    refuse(tiny_model("mistral"), config, "config is for a model of type 'llama', got one of type 'mistral'")
    shorter = tiny_model()
    shorter.model.layers = shorter.model.layers[:2]
    refuse(shorter, config, "config has 3 MLPs and the model 2: only in the config: model.layers.2.mlp")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=VOCABULARY, num_hidden_layers=3, num_attention_heads=4)
    narrow = LlamaForCausalLM(LlamaConfig(hidden_size=HIDDEN, intermediate_size=96, **sizes))
    refuse(narrow, config, "config has intermediate_size 176 for model.layers.0.mlp, the model has 96")
    thin = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=INTERMEDIATE, **sizes))
    refuse(thin, config, "config has hidden_size 64 for model.layers.0.mlp, the model has 32")
    relu = tiny_model("llama-relu")
    refuse(relu, config, "config has activation 'silu' for model.layers.0.mlp, the model has 'relu'")


def middle(change):
    model = tiny_model()
    change(model.model.layers[1].mlp, model)
    return model


class Scaled(nn.Linear):
    pass


def clamp_gate(mlp, model):
    class ClampedMLP(type(mlp)):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))

    mlp.__class__ = ClampedMLP


def scale_output(mlp, model):
    class ScaledMLP(type(mlp)):
        def forward(self, x):
            return super().forward(x) * 0.9

    mlp.__class__ = ScaledMLP


def drop_out(mlp, model):
    class DropoutMLP(type(mlp)):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.1, self.training)

    mlp.__class__ = DropoutMLP


def replace_forward(mlp, model):
    mlp.forward = types.MethodType(type(mlp).forward, mlp)


UNSUPPORTED = {
    "quantised": (
        lambda mlp, model: setattr(mlp, "up_proj", Scaled(HIDDEN, INTERMEDIATE)),
        r"up_proj is a test_patching.Scaled, not a torch.nn.Linear",
    ),
    "activation": (lambda mlp, model: setattr(mlp, "act_fn", nn.Tanh()), "its activation Tanh is none of silu, gelu"),
    "no activation": (lambda mlp, model: delattr(mlp, "act_fn"), "none of the attributes act_fn, activation_fn"),
    "another child": (lambda mlp, model: mlp.add_module("norm", nn.LayerNorm(2)), "it has further children: norm"),
    "tied": (
        lambda mlp, model: setattr(mlp.gate_proj, "weight", model.model.layers[0].mlp.gate_proj.weight),
        "gate_proj.weight is shared with another module",
    ),
    "same memory": (
        lambda mlp, model: setattr(mlp.gate_proj.weight, "data", model.model.layers[2].mlp.up_proj.weight.data),
        "gate_proj.weight is shared with another module",
    ),
    "shared": (lambda mlp, model: setattr(model.model.layers[2], "mlp", mlp), "used in more than one place"),
    "dtype": (lambda mlp, model: mlp.up_proj.half(), "up_proj.weight is torch.float16 on cpu, but gate_proj.weight is"),
    "complex": (
        lambda mlp, model: setattr(
            mlp.gate_proj, "weight", nn.Parameter(mlp.gate_proj.weight.data.to(torch.complex64))
        ),
        "gate_proj.weight must be float32, float16, bfloat16 or float64, got torch.complex64",
    ),
    "shape": (
        lambda mlp, model: setattr(mlp, "up_proj", nn.Linear(HIDDEN, 99, bias=False)),
        r"up_proj.weight must have shape \[176, 64\] to fit down_proj.weight \[64, 176\], got \[99, 64\]",
    ),
    "empty": (
        lambda mlp, model: setattr(mlp.up_proj, "weight", nn.Parameter(torch.empty(0, HIDDEN))),
        r"up_proj.weight must not be empty, got shape \[0, 64\]",
    ),
    "clamped": (clamp_gate, r"its forward is not down\(act\(gate\) \* up\)"),
    "scaled": (scale_output, r"its forward is not down\(act\(gate\) \* up\)"),
    "dropout": (drop_out, r"its forward is not down\(act\(gate\) \* up\).* or has dropout"),
    "patched by others": (replace_forward, "its forward has been replaced on the instance"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_mlps_are_refused_by_name(name):
    change, message = UNSUPPORTED[name]
    config = config_for(tiny_model())
    refuse(middle(change), config, rf"model.layers.\d.mlp \(\w+\) cannot run sparsely: .*{message}")


def test_meta_tensors_are_refused():
    model, config = tiny_model(), config_for(tiny_model())
    model.model.layers[1].mlp.down_proj.to("meta")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp .*: down_proj.weight is on the meta device"):
        apply_cats(model, config)
    assert not any(isinstance(module, CatsMLP) for module in layers_of(model))
    with pytest.raises(ValueError, match="meta device"):
        apply_cats(tiny_model().to("meta"), config)


def test_offloaded_weights_are_refused():
    from accelerate import cpu_offload

    model, config = tiny_model(), config_for(tiny_model())
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"gate_proj.weight is on the meta device: load the weights .* without offloading"
    ):
        apply_cats(model, config)


def test_fused_experts_are_refused():
    from transformers import MixtralConfig, MixtralForCausalLM

    mixtral = MixtralForCausalLM(
        MixtralConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    refuse(mixtral, config_for(tiny_model()), r"MixtralExperts\) cannot run sparsely: fused mixture-of-experts")


def test_adapters_first_are_refused():
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    config = config_for(model)
    get_peft_model(model, LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"up_proj is a peft\.tuners\.lora.* adapters are added after patching"):
        apply_cats(model, config)


class InterruptAt:
    """Raises ``error`` when the n-th line of one of ``functions`` is about to run."""

    def __init__(self, line: int, functions: list, error: type[BaseException]) -> None:
        self.left, self.codes, self.error = line, {function.__code__ for function in functions}, error

    def trace(self, frame, event, argument):
        if frame.f_code not in self.codes:
            return None
        if event == "line":
            self.left -= 1
            if self.left < 0:
                sys.settrace(None)  # once only: what cleans up is not interrupted
                raise self.error
        return self.trace

    def __enter__(self):
        sys.settrace(self.trace)

    def __exit__(self, *exception):
        sys.settrace(None)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_patching_interrupted_at_any_line_leaves_nothing(error):
    model = tiny_model()
    config, before = config_for(model), snapshot(model)
    for line in itertools.count():
        try:
            with InterruptAt(line, [apply_cats, make_sparse], error):
                apply_cats(model, config)
            break
        except error:
            assert_unchanged(model, before)
    assert line > 8 * LAYERS
    assert len([m for m in layers_of(model) if isinstance(m, CatsMLP)]) == LAYERS


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_removal_interrupted_at_any_line_is_completed(error):
    model = tiny_model()
    config, before = config_for(model), snapshot(model)
    for line in itertools.count():
        apply_cats(model, config)
        try:
            with InterruptAt(line, [make_dense], error):
                remove_cats(model)
            break
        except error:
            assert_unchanged(model, before)
    assert line > 8 * LAYERS
    assert_unchanged(model, before)
