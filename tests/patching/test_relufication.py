"""The ReLUfied model is the model with ReLU for its activation; it can be undone, and saved as what it computes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from support.models import LAYERS, tiny_model, tokens
from transformers import AutoModelForCausalLM

from cats_ext import CatsMLP, apply_cats, apply_relufication, calibrate, remove_cats, sparsity_report, track_sparsity
from cats_ext.patching.detection import find_gated_mlps


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids[None]).logits[0]


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
@pytest.mark.parametrize("count", [1, 40], ids=["kernel", "dense path"])
def test_it_is_the_model_with_relu(family, count):
    model, ids = tiny_model(family), tokens(count)
    want = tiny_model(family)
    for mlp in find_gated_mlps(want):
        name = "act_fn" if hasattr(mlp.module, "act_fn") else "activation_fn"
        setattr(mlp.module, name, torch.nn.ReLU())
    before = logits(model, ids)
    assert apply_relufication(model) is model
    torch.testing.assert_close(logits(model, ids), logits(want, ids), rtol=1e-4, atol=1e-4)
    assert (logits(model, ids) - before).abs().max() > 0.01
    remove_cats(model)
    assert torch.equal(logits(model, ids), before)


def test_neurons_below_zero_are_skipped():
    model = apply_relufication(tiny_model())
    with track_sparsity(model), torch.no_grad():
        x = torch.randn(1, 1, model.config.hidden_size)
        for layer in model.model.layers:
            layer.mlp(x)
    for layer, module in zip(sparsity_report(model).layers, model.model.layers, strict=True):
        expected = (module.mlp.gate_proj(x) <= 0).double().mean().item()
        assert layer.up_sparsity == layer.down_sparsity == pytest.approx(expected, abs=1e-6)
        assert 0.2 < expected < 0.8
    assert len(sparsity_report(model).layers) == LAYERS


def test_errors():
    with pytest.raises(ValueError, match="has no gated MLP"):
        apply_relufication(torch.nn.Linear(2, 2))
    model = apply_cats(tiny_model(), calibrate(tiny_model(), tokens(200), progress=False))
    with pytest.raises(ValueError, match="is patched already"):
        apply_relufication(model)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def relufied(family, directory):
    """The logits of a ReLUfied model for few and many tokens, and the SiLU model's; it is saved in ``directory``."""
    model, inputs = tiny_model(family), (tokens(4), tokens(40))
    dense = [logits(model, ids) for ids in inputs]
    activation = model.config.to_dict().get("hidden_act")
    apply_relufication(model).save_pretrained(directory)
    after = model.config.to_dict()  # a dense model may share the config
    assert after.get("hidden_act") == activation and "quantization_config" not in after
    return inputs, [logits(model, ids) for ids in inputs], dense


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma", "gemma2", "mixtral"])
def test_a_saved_model_is_the_same_when_it_is_loaded(family, tmp_path):
    inputs, expected, dense = relufied(family, tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    for model in (loaded, again):
        assert any(isinstance(module, CatsMLP) for module in model.modules())
        for ids, want, other in zip(inputs, expected, dense, strict=True):
            assert torch.equal(logits(model, ids), want)
            assert not torch.allclose(want, other, atol=1e-2)
    assert json.loads((tmp_path / "first" / "config.json").read_text())["quantization_config"]["activation"] == "relu"


def test_without_the_package_it_is_the_relufied_model_too(tmp_path):
    inputs, expected, _ = relufied("llama", tmp_path)
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "assert 'cats_ext' not in sys.modules\n"
        f"torch.save(model(torch.tensor([{inputs[0].tolist()}])).logits[0], {str(tmp_path / 'logits')!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected[0], rtol=1e-4, atol=1e-4)


def test_a_config_that_names_no_activation(tmp_path, monkeypatch):
    """Then only the checkpoint's CATS entry knows, and saving says so."""
    monkeypatch.setattr("cats_ext.integrations.saving.ACTIVATION_ENTRIES", ("activation_of_others",))
    with pytest.warns(UserWarning, match="LlamaForCausalLM has none of activation_of_others: without cats_ext this"):
        inputs, expected, _ = relufied("llama", tmp_path / "first")
    assert json.loads((tmp_path / "first" / "config.json").read_text())["hidden_act"] == "silu"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert torch.equal(logits(loaded, inputs[1]), expected[1])
    with pytest.warns(UserWarning, match="without cats_ext"):
        loaded.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert torch.equal(logits(again, inputs[1]), expected[1])
    assert torch.equal(logits(remove_cats(again), inputs[1]), logits(tiny_model(), inputs[1]))


def test_an_unknown_activation_in_a_checkpoint(tmp_path):
    relufied("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"activation": "relu"', '"activation": "swish"'))
    with pytest.raises(ValueError, match="activation in quantization_config must be relu or missing, got 'swish'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_undone_it_saves_the_dense_model(tmp_path):
    model, ids = tiny_model(), tokens(5)
    expected = logits(model, ids)
    remove_cats(apply_relufication(model)).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), expected) and not any(isinstance(m, CatsMLP) for m in loaded.modules())
