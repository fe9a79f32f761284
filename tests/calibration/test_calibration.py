"""calibrate: thresholds against exact quantiles of the activations."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from support.models import HIDDEN, INTERMEDIATE, CharacterTokenizer, tiny_model, tokens

from cats_ext import CatsConfig, apply_cats, calibrate, sparsity_report, track_sparsity
from cats_ext.ops.reference import ACTIVATIONS
from cats_ext.patching.detection import find_gated_mlps
from cats_ext.thresholds.rules import RULES

BUCKET = 2**-9


def gate_and_up(model, ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Exact |act(gate)| and up of every MLP, [tokens, I], found by running the model's own MLP inputs again."""
    inputs, result = {}, {}
    mlps = find_gated_mlps(model)
    with contextlib.ExitStack() as stack:
        for mlp in mlps:
            keep = lambda module, args, name=mlp.name: inputs.__setitem__(name, args[0])  # noqa: E731
            stack.callback(mlp.module.register_forward_pre_hook(keep).remove)
        with torch.no_grad():
            model(input_ids=ids)
            for mlp in mlps:
                x = inputs[mlp.name].reshape(-1, HIDDEN)
                module = mlp.module
                outputs = {
                    n: getattr(module, n)(x) for n in ("gate_proj", "up_proj", "gate_up_proj") if hasattr(module, n)
                }
                gate, up = mlp.gate_and_up(outputs)
                result[mlp.name] = (ACTIVATIONS[mlp.activation](gate.float()).abs(), up.float())
    return result


def exact_quantile(values: torch.Tensor, q: float) -> float:
    return float(values.detach().flatten().sort().values[int(q * values.numel())])


def assert_in_bucket(got: float, exact: float) -> None:
    """Up to the rounding of a batch of another size, which may cross a bucket's edge."""
    assert got == pytest.approx(exact, rel=BUCKET + 1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "llama-bias"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
def test_plain_threshold_is_the_quantile_of_the_gate(family, sparsity):
    model, ids = tiny_model(family), tokens(600)
    config = calibrate(model, ids, rule="plain", sparsity=sparsity, sequence_length=200, batch_size=2, progress=False)
    exact = gate_and_up(model, ids.view(3, 200))
    assert list(config.thresholds) == list(exact)
    for name, (v, _) in exact.items():
        assert config.thresholds[name].shape == ()
        assert_in_bucket(float(config.thresholds[name]), exact_quantile(v, sparsity))
        assert config.statistics[name].gate.total == 600 * INTERMEDIATE
    assert config.down_thresholds == {}
    assert config.bytes_share == pytest.approx(1 - 2 * sparsity / 3)
    assert config.calibration["tokens"] == 600 and config.calibration["windows"] == 3


@pytest.mark.parametrize("weighted", [False, True])
def test_two_thresholds(weighted):
    model, ids = tiny_model(), tokens(600)
    powers = dict(gate_power=int(weighted), last_gate_power=int(weighted), importance="norm")
    config = calibrate(model, ids, rule="two_threshold", **powers, sequence_length=200, batch_size=3, progress=False)
    modules = dict(model.named_modules())
    for name, (v, u) in gate_and_up(model, ids.view(3, 200)).items():
        norm = modules[name].down_proj.weight.detach().norm(dim=0)
        weight = u.square().mean(0).sqrt() * norm if weighted else torch.ones(INTERMEDIATE)
        gate_cut = exact_quantile(v * weight, 0.375)
        for j in (0, 7, INTERMEDIATE - 1):
            threshold = config.thresholds[name][j] if weighted else config.thresholds[name]
            assert_in_bucket(float(threshold), gate_cut / float(weight[j]))
        contribution = torch.where(v >= config.thresholds[name], v * u.abs() * norm, 0)
        down_cut = exact_quantile(contribution, 0.625)
        assert config.down_thresholds[name].shape == (INTERMEDIATE,)
        for j in (0, 7, INTERMEDIATE - 1):
            assert_in_bucket(float(config.down_thresholds[name][j]), down_cut / float(norm[j]))
        assert (config.layers[name].up_sparsity, config.layers[name].down_sparsity) == (0.375, 0.625)
    assert config.bytes_share == pytest.approx(2 / 3)


@pytest.mark.parametrize("importance", ["norm", "gradient"])
def test_three_thresholds(importance):
    model, ids, inputs = tiny_model(), tokens(600), {}
    arguments = dict(importance=importance, sequence_length=200, batch_size=2, progress=False)
    config = calibrate(model, ids, rule="three_threshold", **arguments)
    for mlp in find_gated_mlps(model):
        keep = lambda module, args, name=mlp.name: inputs.__setitem__(name, args[0])  # noqa: E731
        mlp.module.gate_proj.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(input_ids=ids.view(3, 200))
    for name, x in inputs.items():
        assert config.input_thresholds[name].shape == () and config.layers[name].input_sparsity == 0.3
        assert_in_bucket(float(config.input_thresholds[name]), exact_quantile(x.abs(), 0.3))
        assert config.statistics[name].inputs.total == 600 * HIDDEN
    assert config.bytes_share == pytest.approx(2 / 3)
    two = calibrate(tiny_model(), ids, **arguments)  # all else is counted of the dense model, as there
    for name, statistics in two.statistics.items():
        assert replace(config.statistics[name], inputs=None) == statistics
        assert torch.equal(config.statistics[name].gate_weight, statistics.gate_weight)
        assert torch.equal(config.statistics[name].down_weight, statistics.down_weight)


def test_inputs_of_any_call_are_counted():
    """A model may pass them by name."""

    class ByName(type(tiny_model().model.layers[0].mlp)):
        def forward(self, x):
            return self.down_proj(input=self.act_fn(self.gate_proj(input=x)) * self.up_proj(input=x))

    model, arguments = tiny_model(), dict(rule="three_threshold", progress=False)
    expected = calibrate(model, tokens(200), **arguments)
    for layer in model.model.layers:
        layer.mlp.__class__ = ByName
    assert calibrate(model, tokens(200), **arguments).statistics == expected.statistics
    assert all(not module._forward_hooks_with_kwargs for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
@pytest.mark.parametrize(
    ("rule", "power", "importance"),
    [
        ("plain", 0, "norm"),
        ("weighted", 1, "norm"),
        ("two_threshold", 0, "norm"),
        ("two_threshold", 0.5, "norm"),
        ("two_threshold", 0.5, "gradient"),
    ],
)
def test_first_layer_reaches_its_target_on_the_same_text(family, rule, power, importance):
    # Later layers see inputs changed by the earlier masks; on a random network that moves their sparsity.
    model, ids = tiny_model(family), tokens(900)
    arguments = dict(rule=rule, gate_power=power, importance=importance, sequence_length=300, progress=False)
    config = calibrate(model, ids, sparsity=0.6, **arguments)
    apply_cats(model, config)
    with track_sparsity(model), torch.no_grad():
        model(input_ids=ids.view(3, 300))
    layer = sparsity_report(model).layers[0]
    # A bucket holds up to 2 % of the values where |silu| turns back (see test_histogram.py), else less than 0.5 %.
    assert layer.up_sparsity == pytest.approx(layer.up_target, abs=0.01)
    assert layer.down_sparsity == pytest.approx(layer.down_target, abs=0.01)
    assert layer.up_target + layer.down_target == pytest.approx(1.2)


def test_sparsity_zero_sets_thresholds_of_zero():
    for rule in RULES:
        config = calibrate(tiny_model(), tokens(200), sparsity=0, rule=rule, progress=False)
        every = (config.thresholds, config.down_thresholds, config.input_thresholds)
        assert all((t == 0).all() for thresholds in every for t in thresholds.values())


def test_exact_zeros_of_relu_are_skipped():
    model = tiny_model("llama-relu")
    config = calibrate(model, tokens(400), sparsity=0.2, sequence_length=200, progress=False)
    zeros = gate_and_up(model, tokens(400).view(2, 200))
    for name, threshold in config.thresholds.items():
        assert (zeros[name][0] == 0).float().mean() > 0.3  # more than asked for, and dropping them changes nothing
        assert ((threshold > 0) & (threshold < 1e-30)).all()


def test_a_neuron_without_a_down_row_is_dropped():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 5] = 0
    config = calibrate(model, tokens(300), rule="two_threshold", gate_power=1, progress=False)
    name = "model.layers.1.mlp"
    largest = torch.finfo(torch.float32).max
    assert config.thresholds[name][5] == config.down_thresholds[name][5] == largest
    assert (config.thresholds[name] < largest).sum() == INTERMEDIATE - 1
    apply_cats(model, config)
    with torch.no_grad():
        assert model(input_ids=tokens(9)[None]).logits.isfinite().all()


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, tokens(200), progress=False)
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError):
        calibrate(model, tokens(20), progress=False)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    config = calibrate(
        tiny_model(dtype=dtype), tokens(300), rule="two_threshold", gate_power=1, importance="norm", progress=False
    )
    assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in config.thresholds.values())
    exact = calibrate(tiny_model(), tokens(300), rule="two_threshold", gate_power=1, importance="norm", progress=False)
    for name in config.thresholds:
        torch.testing.assert_close(config.thresholds[name], exact.thresholds[name], rtol=0.05, atol=0)


def test_all_text_is_run_once_for_its_counts(monkeypatch):
    """Before that, the gradients and the bins need a part of it."""
    monkeypatch.setattr("cats_ext.calibration.counting._SAMPLE_TOKENS", 200)
    monkeypatch.setattr("cats_ext.calibration.counting._GRADIENT_TOKENS", 300)
    model, lengths = tiny_model(), []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, named: lengths.append(named["input_ids"].numel()), with_kwargs=True
    )
    config = calibrate(model, tokens(1200), sequence_length=100, progress=False)
    hook.remove()
    assert lengths == [100] * (3 + 2 + 12)
    exact = gate_and_up(model, tokens(1200).view(12, 100))
    for name, (v, up) in exact.items():
        assert config.statistics[name].gate.total == int(config.statistics[name].joint.counts.sum()) == v.numel()
        kept = v >= config.thresholds[name]
        assert float(kept.float().mean()) == pytest.approx(0.625, abs=0.005)
        kept &= (v * up).abs() >= config.down_thresholds[name]
        assert float(kept.float().mean()) == pytest.approx(0.375, abs=0.005)


def test_progress_has_a_bar_for_each_pass_on_standard_error(capsys):
    calibrate(tiny_model(), tokens(200), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert all(f"pass {number} of 3" in err for number in (1, 2, 3))
    calibrate(tiny_model(), tokens(200), progress=False)
    assert capsys.readouterr().err == ""


def test_windows_are_no_longer_than_the_model_has_positions():
    config = calibrate(tiny_model(), tokens(1200), progress=False)
    assert config.calibration["sequence_length"] == 512 and config.calibration["windows"] == 3


def assert_equal(one: CatsConfig, other: CatsConfig) -> None:
    for left, right in ((one.thresholds, other.thresholds), (one.down_thresholds, other.down_thresholds)):
        assert list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_padding_does_not_change_thresholds():
    model, ids = tiny_model(), tokens(150)
    padded = torch.zeros(1, 190, dtype=torch.long)
    padded[0, 40:] = ids
    mask = (torch.arange(190) >= 40).long()[None]
    without = calibrate(model, ids, progress=False)
    with_padding = calibrate(model, [{"input_ids": padded, "attention_mask": mask}], progress=False)
    assert_equal(with_padding, without)
    assert with_padding.calibration["tokens"] == 150


def test_equal_arguments_give_equal_thresholds_and_batches_do_not_matter():
    model = tiny_model()
    text = "".join(map(chr, torch.randint(32, 127, (3000,), generator=torch.Generator().manual_seed(0)).tolist()))
    arguments = dict(tokenizer=CharacterTokenizer(), max_tokens=600, sequence_length=120, progress=False)
    first, again, other = (calibrate(model, text, seed=seed, **arguments) for seed in (3, 3, 4))
    assert_equal(first, again)
    assert not torch.equal(*(next(iter(config.thresholds.values())) for config in (first, other)))
    batched = calibrate(model, text, seed=3, batch_size=4, **arguments)
    for name, threshold in first.thresholds.items():
        torch.testing.assert_close(batched.thresholds[name], threshold, rtol=2 * BUCKET, atol=0)
