"""What calibrate refuses: arguments out of range, and models whose activations set no threshold."""

from __future__ import annotations

import pytest
import torch
from support.models import LAYERS, tiny_model, tokens
from support.patched import GATES_NOT_BY_COLUMNS

from cats_ext import (
    SparsityDriftWarning,
    apply_cats,
    calibrate,
    quantize,
    remove_cats,
    sparsity_report,
    track_sparsity,
)
from cats_ext.calibration.accumulator import LayerAccumulator
from cats_ext.patching.detection import find_gated_mlps


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(sparsity=1.0), ValueError, r"sparsity must be in \[0, 1\), got 1.0"),
        (dict(sparsity=-0.1), ValueError, r"sparsity must be in \[0, 1\), got -0.1"),
        (dict(sparsity=float("nan")), ValueError, r"sparsity must be in \[0, 1\), got nan"),
        (dict(sparsity="0.5"), TypeError, r"sparsity must be a number in \[0, 1\), got '0.5'"),
        (
            dict(rule="best"),
            ValueError,
            "rule must be one of plain, weighted, two_threshold, three_threshold, got 'best'",
        ),
        (
            dict(rule="plain", down_sparsity=0.6),
            ValueError,
            "down_sparsity is for the rule 'two_threshold', got 0.6 with 'plain'",
        ),
        (dict(rule="two_threshold", down_sparsity=1.2), ValueError, r"down_sparsity must be in \[0, 1\), got 1.2"),
        (dict(max_tokens=0), ValueError, "max_tokens must be a positive integer, got 0"),
        (dict(max_tokens=100), ValueError, r"at least 128 tokens.* got 100 \(max_tokens is 100\)"),
        (dict(sequence_length=-1), ValueError, "sequence_length must be a positive integer, got -1"),
        (dict(batch_size=1.5), ValueError, "batch_size must be a positive integer, got 1.5"),
    ],
)
def test_argument_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        calibrate(tiny_model(), tokens(300), **{"sequence_length": 100, **arguments}, progress=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(budget=0.3), ValueError, r"budget must be in \(1/3, 1\], as a sparsity of 1 leaves 1/3 .* got 0.3"),
        (dict(budget=1.1), ValueError, r"budget must be in .* got 1.1"),
        (dict(budget="half"), TypeError, r"budget must be a number in \(1/3, 1\], got 'half'"),
        (dict(budget=0.6, sparsity=0.5), ValueError, "give sparsity or budget, not both, got 0.5 and 0.6"),
        (dict(allocation="best"), ValueError, "allocation must be one of uniform, search, got 'best'"),
        (dict(allocation="search", down_sparsity=0.7), ValueError, "down_sparsity is for uniform allocation, got 0.7"),
        (dict(rule="plain", gate_power=0.5), ValueError, "gate_power must be 0 for the rule 'plain', .* got 0.5"),
        (dict(last_gate_power=2), ValueError, r"last_gate_power must be in \[0, 1\], got 2"),
        (dict(rule="plain", last_gate_power=1), ValueError, "last_gate_power must be 0 for the rule 'plain'"),
        (dict(gate_power=2, rule="weighted"), ValueError, r"gate_power must be in \[0, 1\], got 2"),
        (dict(gate_power="1", rule="weighted"), TypeError, r"gate_power must be a number in \[0, 1\], got '1'"),
        (dict(budget=0.6, spread=0), ValueError, r"spread must be a number in \(0, 1\], got 0"),
        (
            dict(allocation="search", spread=0.01),
            ValueError,
            r"no sparsity that was tried is within 0.01 of \(0.375, 0.625\)",
        ),
        (dict(allocation="search", budget=0.335), ValueError, r"budget must be at least 0.34 for a search, got 0.335"),
        (
            dict(rule="three_threshold", allocation="search"),
            ValueError,
            "allocation must be 'uniform' for the rule 'three_threshold', got 'search'",
        ),
        (dict(importance="luck"), ValueError, "importance must be one of norm, gradient, got 'luck'"),
    ],
)
def test_errors_of_weights_and_budgets(arguments, error, message):
    with pytest.raises(error, match=message):
        calibrate(tiny_model(), tokens(200), **arguments, progress=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", ["plain", "two_threshold"])
def test_not_finite_activations_name_the_layer(bad, rule):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.gate_proj.weight[3] = bad
    with pytest.raises(ValueError, match=r"activations of model.layers.2.mlp: \d+ of \d+ values are NaN or infinite"):
        calibrate(model, tokens(200), rule=rule, progress=False)
    assert all(not module._forward_hooks for module in model.modules())


def test_all_zero_layer_is_named():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.zero_()
    with pytest.raises(ValueError, match=r"all gate activations of model.layers.1.mlp are zero"):
        calibrate(model, tokens(200), progress=False)


def test_not_finite_inputs_are_counted_nowhere():
    (mlp, *_) = find_gated_mlps(tiny_model())
    layer = LayerAccumulator(mlp, 0.0, "norm", inputs=True)
    gate = torch.ones(2, mlp.intermediate_size)
    for bad in (float("nan"), float("-inf")):
        x = torch.ones(2, mlp.hidden_size)
        x[1, 3] = bad
        with pytest.raises(ValueError, match=f"1 of {2 * mlp.hidden_size} values are NaN or infinite"):
            layer.add_inputs_and_activations(gate, gate, x)
    assert layer.inputs.total == layer.gate.total == 0


def test_a_layer_whose_inputs_are_zero_is_named():
    model = tiny_model("llama-bias")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.zero_()
        model.model.layers[1].mlp.gate_proj.bias.normal_()
    with pytest.raises(ValueError, match=r"all inputs of model\.layers\.1\.mlp are zero: no threshold"):
        calibrate(model, tokens(200), rule="three_threshold", progress=False)


@pytest.mark.parametrize(("family", "found"), GATES_NOT_BY_COLUMNS.items())
def test_a_gate_that_is_not_read_by_columns(family, found):
    model = quantize(tiny_model(), progress=False) if family == "quantised" else tiny_model(family)
    message = f"rule 'three_threshold' needs a whole gate_proj of dense weights, got {found} in model.layers.0.mlp"
    with pytest.raises(ValueError, match=message):
        calibrate(model, tokens(200), rule="three_threshold", progress=False)
    assert all(not module._forward_hooks for module in model.modules())


def test_a_layer_that_no_token_reaches_is_named():
    model = tiny_model()
    model.model.layers = model.model.layers[:2]
    model.unused = torch.nn.ModuleDict({"mlp": tiny_model(seed=1).model.layers[0].mlp})
    for rule, importance in (("plain", "norm"), ("weighted", "norm"), ("two_threshold", "gradient")):
        with pytest.raises(ValueError, match=r"no token of the data reached unused.mlp"):
            calibrate(model, tokens(200), rule=rule, importance=importance, progress=False)


def test_patched_model_is_refused():
    model = tiny_model()
    apply_cats(model, calibrate(model, tokens(200), progress=False))
    with pytest.raises(ValueError, match="LlamaForCausalLM is patched already: call remove_cats first"):
        calibrate(model, tokens(200), progress=False)
    remove_cats(model)
    assert len(calibrate(model, tokens(200), progress=False).thresholds) == LAYERS


def test_all_equal_layer_is_kept_whole_and_warned_of():
    model = tiny_model("llama-bias")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.zero_()
        model.model.layers[1].mlp.gate_proj.bias.fill_(1.5)
    message = r"gate activations of model\.layers\.1\.mlp are equal that its threshold drops 0\.0% of them, not 50\.0%"
    with pytest.warns(SparsityDriftWarning, match=message):
        config = calibrate(model, tokens(200), rule="plain", progress=False)
    apply_cats(model, config)
    with track_sparsity(model), torch.no_grad():
        model(input_ids=tokens(50)[None])
    assert sparsity_report(model).layers[1].up_sparsity == 0


def test_equal_inputs_are_kept_whole_and_warned_of():
    model = tiny_model()
    for layer in model.model.layers:
        layer.post_attention_layernorm.forward = lambda hidden: torch.ones_like(hidden)
    with pytest.warns(
        SparsityDriftWarning, match=r"so many inputs of model\.layers\.0\.mlp .* drops 0\.0% of them, not 30"
    ):
        config = calibrate(model, tokens(200), rule="three_threshold", progress=False)
    assert all(threshold == 1 for threshold in config.input_thresholds.values())


def test_without_gradients_norms_are_the_weights():
    whole = tiny_model()
    assert calibrate(whole, tokens(300), progress=False).importance == "gradient"
    without = calibrate(whole.model, tokens(300), progress=False)
    assert without.importance == "norm" and without.sparsity == 0.5
    with pytest.raises(ValueError, match=r"without an output layer .* got 'gradient' and 'uniform'"):
        calibrate(whole.model, tokens(300), importance="gradient", progress=False)
    with pytest.raises(ValueError, match=r"without an output layer .* got 'norm' and 'search'"):
        calibrate(whole.model, tokens(300), allocation="search", progress=False)
    with torch.inference_mode():
        inside = calibrate(whole, tokens(300), progress=False)
        assert inside.importance == "gradient"
        assert calibrate(tiny_model(), tokens(300), progress=False).importance == "norm"
