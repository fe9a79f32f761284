"""The sparsity knob: thresholds of a patched model re-derived in place, seen by whatever has captured them."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from support.models import LAYERS, tiny_model
from support.patched import InterruptAt, config_for, few, layers_of, logits, many
from transformers import AutoModelForCausalLM

from cats_ext import CatsMLP, apply_cats, remove_cats, set_sparsity, sparsity_report, track_sparsity
from cats_ext.thresholds.rules import Split

RULES = ["plain", "two_threshold", "three_threshold"]


@pytest.fixture(params=RULES)
def model(request):
    model = tiny_model()
    return apply_cats(model, config_for(model, rule=request.param, gate_power=float(request.param == "two_threshold")))


def at(sparsity, rule="two_threshold"):
    """A model patched at ``sparsity`` from the start."""
    model = tiny_model()
    return apply_cats(model, config_for(model, sparsity, rule, gate_power=float(rule == "two_threshold")))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6, 0.9])
def test_as_if_calibrated_so(rule, sparsity):
    model = at(0.5, rule)
    storages = [buffer.data_ptr() for module in layers_of(model) for buffer in module.buffers(recurse=False)]
    assert set_sparsity(model, sparsity) is model
    expected = at(sparsity, rule)
    assert torch.equal(logits(model, few()), logits(expected, few()))
    assert torch.equal(logits(model, many()), logits(expected, many()))
    assert [b.data_ptr() for module in layers_of(model) for b in module.buffers(recurse=False)] == storages
    assert repr(model) == repr(expected)
    with track_sparsity(model):
        logits(model, many())
    report = sparsity_report(model)
    assert report.bytes_share == pytest.approx(1 - 2 / 3 * sparsity, abs=0.05)
    targets = [share for key, share in report.to_dict().items() if key.endswith("_target")]
    assert sum(targets) == pytest.approx(2 * sparsity)


@pytest.mark.parametrize(("rule", "shares"), [("two_threshold", (0.2, 0.6)), ("three_threshold", (0.2, 0.6, 0.4))])
def test_targets_of_a_layer_are_plain_numbers(rule, shares):
    config = config_for(tiny_model(), 0.5, rule)
    split = Split(*shares)
    new = config.with_targets(dict.fromkeys(config.layers, shares), 0.4)
    assert {layer.split for layer in new.layers.values()} == {split}
    assert all(
        torch.equal(new.thresholds[name], config.statistics[name].thresholds(0.2, 0.6)[0]) for name in new.layers
    )
    of_inputs = {name: config.statistics[name].input_threshold(split.input) for name in new.layers}
    assert new.input_thresholds == {name: value for name, value in of_inputs.items() if value is not None}


def test_there_and_back_and_another_split(model):
    expected = logits(model, few())
    set_sparsity(model, 0.8)
    assert not torch.allclose(logits(model, few()), expected, atol=1e-3)
    assert torch.equal(logits(set_sparsity(model, 0.5), few()), expected)
    if layers_of(model)[0].cats.config.rule == "two_threshold":
        set_sparsity(model, 0.5, down_sparsity=0.7)
        assert layers_of(model)[0].cats.target.up_sparsity == pytest.approx(0.3)
        assert not torch.allclose(logits(model, few()), expected, atol=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_a_compiled_model_follows_without_compiling_again(rule):
    model, graphs = at(0.5, rule), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    logits(compiled, few())
    for sparsity in (0.7, 0.0):
        set_sparsity(model, sparsity)
        torch.testing.assert_close(logits(compiled, few()), logits(at(sparsity, rule), few()), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


@pytest.mark.gpu
def test_a_captured_graph_follows():
    model, ids = at(0.5).cuda(), few()[:, :1].cuda()
    with torch.no_grad():
        for _ in range(3):
            model(input_ids=ids, use_cache=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(input_ids=ids, use_cache=False).logits
    for sparsity in (0.7, 0.0, 0.5):
        set_sparsity(model, sparsity)
        graph.replay()
        torch.testing.assert_close(output, logits(model, ids), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.cpu(), logits(at(sparsity), ids.cpu()), rtol=1e-3, atol=1e-3)


def test_saved_copied_adapted_and_made_in_inference_mode(tmp_path):
    expected = logits(at(0.7), few())
    model = set_sparsity(at(0.5), 0.7)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, few()), expected)
    twin = set_sparsity(copy.deepcopy(loaded), 0.2)
    assert torch.equal(logits(loaded, few()), expected)
    assert torch.equal(logits(set_sparsity(twin, 0.7), few()), expected)
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(at(0.5), LoraConfig(target_modules=["q_proj"]))  # B is zero: the same function
    torch.testing.assert_close(logits(set_sparsity(adapted, 0.7), few()), expected)
    with torch.inference_mode():
        model, expected = at(0.5), logits(at(0.7), few())
    assert torch.equal(logits(set_sparsity(model, 0.7), few()), expected)


def test_errors_leave_the_thresholds(model):
    expected = logits(model, few())
    for sparsity, error, message in (
        (1.0, ValueError, r"sparsity must be in \[0, 1\), got 1.0"),
        (-0.1, ValueError, r"sparsity must be in \[0, 1\), got -0.1"),
        (float("nan"), ValueError, r"sparsity must be in \[0, 1\), got nan"),
        ("0.5", TypeError, r"sparsity must be a number in \[0, 1\), got '0.5'"),
    ):
        with pytest.raises(error, match=message):
            set_sparsity(model, sparsity)
    assert torch.equal(logits(model, few()), expected)
    remove_cats(model)
    with pytest.raises(ValueError, match="is not patched: call apply_cats first"):
        set_sparsity(model, 0.5)


def test_a_config_without_statistics():
    model = tiny_model()
    apply_cats(model, replace(config_for(model), statistics={}))
    with pytest.raises(ValueError, match=r"no calibration statistics for model.layers.0.mlp: calibrate"):
        set_sparsity(model, 0.6)


def test_interrupted_at_any_line(model):
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for line in itertools.count():
        try:
            with InterruptAt(line, [set_sparsity, CatsMLP.set_thresholds.__wrapped__], KeyboardInterrupt):
                set_sparsity(model, 0.9)
            break
        except KeyboardInterrupt:
            assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
            assert layers_of(model)[0].cats.config.sparsity == 0.5
    assert line > 3 * LAYERS
    assert layers_of(model)[0].cats.config.sparsity == 0.9
