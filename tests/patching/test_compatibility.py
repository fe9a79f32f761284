"""Patched models with adapters, torch.compile, torch.export, wrappers, and in a multimodal model."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import HIDDEN, tiny_model
from support.patched import config_for, few, layers_of, logits, many
from torch import nn
from transformers import AutoModelForCausalLM

from cats_ext import apply_cats, masking_disabled, remove_cats, sparsity_report, track_sparsity


@pytest.mark.parametrize("targets", [["gate_proj"], ["up_proj", "down_proj"], ["q_proj"]])
def test_lora_unmerged_and_merged(targets, called):
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    config = config_for(model)
    dense = copy.deepcopy(model)
    expected = logits(apply_cats(model, config), few())
    called.clear()
    peft_model = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
    adapted = logits(peft_model, few())
    in_mlp = targets != ["q_proj"]
    assert set(called) == {"gated_threshold" if in_mlp else "sparse_mlp"}

    merged = copy.deepcopy(peft_model).merge_and_unload()
    in_place = copy.deepcopy(peft_model)
    in_place.merge_adapter()
    for other in (merged, in_place):
        called.clear()
        torch.testing.assert_close(logits(other, few()), adapted, rtol=1e-3, atol=1e-3)
        assert set(called) == {"sparse_mlp"}
    for other in (peft_model, in_place):  # disabled: the patched model without it
        called.clear()
        with other.disable_adapter():
            for _ in range(2):  # the first call may have to unmerge
                got = logits(other, few())
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        assert called[-1] == "sparse_mlp"

    remove_cats(peft_model)  # the adapter stays
    torch.manual_seed(0)
    assert all(m.weight.is_contiguous() for m in peft_model.modules() if type(m) is nn.Linear)
    twin = get_peft_model(dense, LoraConfig(target_modules=targets, init_lora_weights=False))
    twin.load_state_dict(peft_model.state_dict())
    assert torch.equal(logits(twin, few()), logits(peft_model, few()))


@pytest.mark.parametrize(
    ("family", "tracking", "ids"),
    [("llama", False, few()), ("llama", True, many()), ("phi3", True, few()), ("phi3", False, many())],
    ids=["kernel", "dense path, counted", "merged, kernel, counted", "merged, dense path"],
)
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
    compiled = torch.compile(model, backend="eager")
    dense = logits(compiled, few())
    apply_cats(model, config_for(model, sparsity=0.9))
    assert not torch.allclose(logits(compiled, few()), dense, atol=1e-2)
    remove_cats(model)
    torch.testing.assert_close(logits(compiled, few()), dense)


@pytest.mark.parametrize("tokens", [1, 40], ids=["kernel", "dense path"])
def test_guards_stop_at_unchanged_modules(tokens):
    """A compiled step looks at the layers of a patched model as little as at those of a dense one."""
    mlp = layers_of(apply_cats(tiny_model(), config_for(tiny_model())))[0]
    block, x = nn.Sequential(mlp), torch.randn(tokens, HIDDEN)

    def step(x):
        return block(x)

    torch._dynamo.reset()
    # What PyTorch does by itself in 2.9 to 2.11.
    with torch.no_grad(), torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True):
        compiled = torch.compile(step, backend="eager", fullgraph=True)
        expected = mlp(x)
        torch.testing.assert_close(compiled(x), expected)
        (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(step.__code__)
        module = [line for line in str(entry.guard_manager).splitlines() if "Sequential'>, tag_safe=" in line]
        assert len(module) == 1 and module[0].endswith("tag_safe=(True, True)")
        for _ in range(2):
            torch.testing.assert_close(compiled(x), expected)
            mlp.track(True)
            torch.testing.assert_close(compiled(x), expected)
            assert mlp.counts[0] > 0
            mlp.counts.zero_()
            mlp.track(False)
            with masking_disabled(block):
                torch.testing.assert_close(compiled(x), mlp(x))
                assert not torch.allclose(compiled(x), expected)
        assert not mlp.counts.any()


def test_inference_mode():
    model = tiny_model()
    apply_cats(model, config_for(model))
    for ids in (few(), many()):
        with torch.inference_mode():
            got = model(input_ids=ids).logits
        assert torch.equal(got, logits(model, ids))


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("ids", [few()[:, :1], many()], ids=["one", "many"])
def test_export(family, ids, tmp_path):
    model = tiny_model(family)
    apply_cats(model, config_for(model))
    expected = logits(model, ids)
    with torch.no_grad():
        program = torch.export.export(model, (), kwargs={"input_ids": ids, "use_cache": False}, strict=False)
    ops = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("cats.")}
    assert ops == {"cats.gated_threshold.default" if ids.numel() > few().numel() else "cats.sparse_mlp.default"}
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(input_ids=ids, use_cache=False).logits, expected)


def test_wrapped_models(tmp_path):
    from peft import LoraConfig, get_peft_model

    config = config_for(tiny_model())
    expected = logits(apply_cats(tiny_model(), config), few())
    wrappers = {
        "compiled": lambda model: torch.compile(model, backend="eager"),
        "parallel": nn.DataParallel,
        "adapted": lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])),  # B is zero
    }
    for name, wrap in wrappers.items():
        model = tiny_model()
        wrapped = wrap(model)
        assert all(torch.equal(config_for(wrapped).thresholds[name], t) for name, t in config.thresholds.items())
        assert apply_cats(wrapped, config) is wrapped
        torch.testing.assert_close(logits(model, few()), expected)
        with pytest.raises(ValueError, match="is patched already"):
            apply_cats(wrapped, config)
        if name != "adapted":  # whose weights have other names then
            model.save_pretrained(tmp_path / name)
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
            torch.testing.assert_close(logits(loaded, few()), expected)
        remove_cats(wrapped)
        torch.testing.assert_close(logits(model, few()), logits(tiny_model(), few()))
        assert "quantization_config" not in model.config.to_dict() and "save_pretrained" not in vars(model)


def test_the_language_model_of_a_multimodal_one(tmp_path):
    from transformers import AutoModelForImageTextToText, Mistral3Config

    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    text = tiny_model("mistral").config.to_dict()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(Mistral3Config(text_config=text, vision_config=vision)).eval()
    dense = logits(model, few())
    with pytest.raises(ValueError, match=r"reached model.vision_tower.* calibrate and patch the language model alone"):
        config_for(model)
    language_model = model.model.language_model
    config = config_for(language_model)
    apply_cats(language_model, config)
    assert not torch.allclose(logits(model, few()), dense, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)  # as a whole it is a dense checkpoint
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, few()), logits(remove_cats(model), few()))
    assert torch.equal(logits(model, few()), dense) and not hasattr(language_model, "hf_quantizer")
