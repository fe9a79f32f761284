"""Importance by gradients and the search for an allocation, against brute force on tiny models."""

from __future__ import annotations

import re

import pytest
import torch
from support.models import INTERMEDIATE, LAYERS, tiny_model, tokens
from torch import nn

from cats_ext import CatsConfig, apply_cats, calibrate, remove_cats
from cats_ext._inputs import batches_of
from cats_ext.calibration.accumulator import LayerAccumulator
from cats_ext.calibration.passes import _gradient_of_draws, run_gradient_pass
from cats_ext.evaluation.comparison import compare
from cats_ext.patching.detection import GatedMLP, find_gated_mlps
from cats_ext.thresholds.allocation import search_options
from cats_ext.thresholds.rules import LAST_GATE_POWER, sparsity_of


def gathered(model, batches, seed=0):
    """Of every layer: gate, up, and the gradient at the MLP's output."""
    found = {mlp.name: [] for mlp in find_gated_mlps(model)}
    run_gradient_pass(model, find_gated_mlps(model), batches, lambda mlp, *t: found[mlp.name].append(t), seed=seed)
    return {name: [torch.cat(parts) for parts in zip(*calls, strict=True)] for name, calls in found.items()}


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_gradient_is_that_of_dropping_a_neuron(family):
    """``h_j Wd_j . g``, summed over positions, is the first-order change of log p(y) when neuron j is left out."""
    model, ids = tiny_model(family), tokens(24)[None]
    name = find_gated_mlps(model)[1].name
    gate, up, gradient = gathered(model, [ids])[name]
    mlp = find_gated_mlps(model)[1]
    accumulator = LayerAccumulator(mlp, 1.0, "gradient")
    h = accumulator.act(gate) * up
    predicted = (h * (gradient @ mlp.down_weight.detach())).sum(0)

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        uniform = torch.rand(24, generator=generator, dtype=torch.float64)
        cumulative = log_p.double().exp().cumsum(-1)
        y = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None])
        epsilon, weight = 1e-2, mlp.down_weight
        for j in (0, 5, INTERMEDIATE - 1):
            sums = []
            for sign in (1, -1):
                kept = weight[:, j].clone()
                weight[:, j] *= 1 + sign * epsilon
                sums.append(model(input_ids=ids).logits[0].double().log_softmax(-1).gather(1, y).sum())
                weight[:, j] = kept
            assert float(predicted[j]) == pytest.approx(float(sums[0] - sums[1]) / (2 * epsilon), rel=0.02, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_draws_is_that_of_autograd(dtype):
    logits = torch.randn(40, 3000).to(dtype).requires_grad_()
    gradient = _gradient_of_draws(logits.detach(), torch.rand(40, dtype=torch.float64))
    y = gradient.argmax(1)
    logits.float().log_softmax(-1).gather(1, y[:, None]).sum().backward()
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, logits.grad)


def test_draws_have_the_probabilities_of_the_model():
    p = torch.tensor([0.1, 0.2, 0.7])
    gradient = _gradient_of_draws(p.log().expand(10000, 3), (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000)
    torch.testing.assert_close(gradient.mean(0), torch.zeros(3), atol=2e-4, rtol=0)


def test_gradient_pass_leaves_nothing_behind():
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    gathered(model, [tokens(30)[None]])
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("last", "last_power"), [(None, LAST_GATE_POWER["two_threshold"]), (0.25, 0.25), (0, None)])
def test_weights_are_root_mean_squares(last, last_power):
    model, ids = tiny_model(), tokens(300)
    arguments = dict(gate_power=0.5, last_gate_power=last, importance="gradient", sequence_length=100, progress=False)
    config = calibrate(model, ids, rule="two_threshold", **arguments)
    found = gathered(model, batches_of(ids.split(100), 1))
    mlps = find_gated_mlps(model)
    powers = dict.fromkeys((mlp.name for mlp in mlps), 0.5) | {mlps[-1].name: last_power}
    for mlp in mlps:
        _, up, gradient = found[mlp.name]
        row = gradient @ mlp.down_weight.detach()
        statistics = config.statistics[mlp.name]
        torch.testing.assert_close(statistics.down_weight, row.square().mean(0).sqrt(), rtol=1e-4, atol=0)
        if powers[mlp.name] is None:
            assert statistics.gate_weight is None and config.thresholds[mlp.name].shape == ()
        else:
            c = (row * up).square().mean(0).sqrt() ** powers[mlp.name]
            torch.testing.assert_close(statistics.gate_weight, c, rtol=1e-4, atol=0)


def test_losses_of_every_option_by_brute_force():
    model, ids = tiny_model(), tokens(300)
    config = calibrate(
        model, ids, rule="two_threshold", gate_power=0.5, importance="norm", sequence_length=100, progress=False
    )
    found = gathered(model, batches_of(ids.split(100), 1))
    options = [(0.0, 0.0), (0.0, 0.3), (0.2, 0.2), (0.2, 0.5), (0.6, 0.9), (0.5, 0.5)]
    for mlp in find_gated_mlps(model):
        statistics = config.statistics[mlp.name]
        accumulator = LayerAccumulator(mlp, 0.5, "norm")
        accumulator.gate_weight = statistics.gate_weight
        gate, up, gradient = found[mlp.name]
        accumulator.add_losses(gate, up, gradient, [statistics.cuts(*option) for option in options])
        v = accumulator.act(gate)
        product = v * up * (gradient @ mlp.down_weight.detach())
        for option, loss in zip(options, accumulator.mean_losses().tolist(), strict=True):
            threshold, down_threshold = statistics.thresholds(*option)
            kept = (v.abs() >= threshold) & ((v * up).abs() >= down_threshold)
            expected = torch.where(kept, 0, product).sum(1).square().mean() / 2
            assert loss == pytest.approx(float(expected), rel=1e-3, abs=1e-9)


@pytest.fixture(scope="module")
def uneven():
    """A model whose second layer hardly matters."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 0.02
    return model


@pytest.mark.parametrize("rule", ["plain", "two_threshold"])
def test_search_takes_from_the_layer_that_matters_least(uneven, rule):
    ids = tokens(600)
    arguments = dict(allocation="search", spread=0.3, sequence_length=150, progress=False)
    config = calibrate(uneven, ids, rule=rule, budget=0.6, **arguments)
    shares = [layer.bytes_share for layer in config.layers.values()]
    assert shares[1] == min(shares) < 0.5
    assert config.bytes_share <= 0.6 + 1e-6 and config.bytes_share == pytest.approx(0.6, abs=0.02)
    assert config.sparsity == pytest.approx(0.6)
    search = config.calibration["search"]
    assert search["searched_kl"] < search["uniform_kl"]
    measured = []
    for each in (config, calibrate(uneven, ids, rule=rule, sparsity=0.6, sequence_length=150, progress=False)):
        apply_cats(uneven, each)
        measured.append(compare(uneven, tokens(600, seed=5), window=150, progress=False).kl)
        remove_cats(uneven)
    assert measured[0] < measured[1]


def test_another_budget_follows_from_the_stored_losses(uneven, tmp_path):
    arguments = dict(rule="two_threshold", allocation="search", sequence_length=150, progress=False)
    config = calibrate(uneven, tokens(600), budget=0.6, **arguments)
    config.save_pretrained(tmp_path)
    loaded = CatsConfig.from_pretrained(tmp_path)
    assert loaded.losses == config.losses and len(config.losses.losses) == LAYERS
    want = calibrate(uneven, tokens(600), budget=0.8, **arguments)
    got = loaded.at_sparsity(sparsity_of(0.8))
    assert {n: (t.up_sparsity, t.down_sparsity) for n, t in got.layers.items()} == {
        n: (t.up_sparsity, t.down_sparsity) for n, t in want.layers.items()
    }
    assert all(torch.equal(got.thresholds[name], want.thresholds[name]) for name in want.thresholds)
    assert loaded.at_sparsity(0.5, down_sparsity=0.6).layers["model.layers.1.mlp"].up_sparsity == pytest.approx(0.4)


def test_the_search_says_beforehand_how_long_it_takes(uneven, capsys):
    calibrate(uneven, tokens(200), allocation="search", sequence_length=100)
    assert re.match(r"calibration on \d+ tokens in 4 passes: about \d+ s\n", capsys.readouterr().err)
    calibrate(uneven, tokens(200), allocation="search", sequence_length=100, progress=False)
    assert capsys.readouterr().err == ""


def test_without_a_target_the_same_bytes_as_at_one_half_are_searched(uneven):
    arguments = dict(allocation="search", sequence_length=150, progress=False)
    config = calibrate(uneven, tokens(600), **arguments)
    assert config.sparsity == 0.5 and config.losses is not None
    same = calibrate(uneven, tokens(600), budget=2 / 3, **arguments)
    for name, layer in same.layers.items():
        assert config.layers[name].up_sparsity == pytest.approx(layer.up_sparsity)
        assert config.layers[name].down_sparsity == pytest.approx(layer.down_sparsity)
    assert config.at_sparsity(0.98).bytes_share == pytest.approx(1 - 0.98 * 2 / 3, abs=0.01)
    with pytest.raises(ValueError, match=r"budget must be at least 0.34 for a search, got 0.3367"):
        config.at_sparsity(0.995)


def test_a_search_is_checked_window_by_window(uneven):
    """Windows of other lengths are not run together, and text of single tokens buys nothing."""
    lengths = []

    def count(_, args, named):
        lengths.append(named["input_ids"].shape[1])

    hook = uneven.register_forward_pre_hook(count, with_kwargs=True)
    ragged = calibrate(uneven, [tokens(150), *tokens(60).view(-1, 20), tokens(1)], allocation="search", progress=False)
    hook.remove()
    assert lengths[-16:] == 2 * [150, 150, 20, 20, 20, 20, 20, 20]  # dense and sparse, uniform and searched
    assert ragged.calibration["search"]["uniform_kl"] > 0
    single = calibrate(uneven, list(tokens(200).view(-1, 1)), allocation="search", progress=False)
    assert single.losses is None and single.calibration["search"] == {"uniform_kl": 0, "searched_kl": 0}


def test_counts_of_a_7b_model_take_less_than_200_mb():
    """32 layers of Mistral-7B's intermediate size; a hidden size of 8 stands for 4096, of which nothing is kept."""
    mlp = GatedMLP("mlp", nn.Module(), "silu", merged=False)
    mlp.module.down_proj = nn.Linear(14336, 8, bias=False)
    accumulator = LayerAccumulator(mlp, 0.5, "gradient")
    gate, up, gradient = torch.randn(4, 14336), torch.randn(4, 14336), torch.randn(4, 8)
    accumulator.add_gradient(gate, up, gradient)
    accumulator.finish_weights()
    accumulator.add_activations(gate, up)
    accumulator.finish_sample()
    accumulator.add_activations(gate, up)
    cuts = [accumulator.statistics().cuts(*option) for option in search_options("two_threshold")]
    accumulator.add_losses(gate, up, gradient, cuts)
    assert 32 * sum(t.numel() * t.element_size() for t in accumulator.state().values()) < 200e6


def spread_model(last):
    """On the first GPU, but for the last layer, which is on ``last``."""
    from accelerate import dispatch_model

    places = ("model.embed_tokens", "model.rotary_emb", *(f"model.layers.{i}" for i in range(LAYERS - 1)))
    device_map = dict.fromkeys(places, "cuda:0") | dict.fromkeys(
        (f"model.layers.{LAYERS - 1}", "model.norm", "lm_head"), last
    )
    return dispatch_model(tiny_model(), device_map, main_device="cuda:0", force_hooks=True)


@pytest.mark.gpu
def test_a_model_with_an_offloaded_layer_is_not_calibrated():
    with pytest.raises(ValueError, match=f"model.layers.{LAYERS - 1}.mlp.* on the meta device"):
        calibrate(spread_model("cpu"), tokens(600), budget=0.7, sequence_length=128, progress=False)


@pytest.mark.gpu
def test_a_model_spread_over_devices_is_calibrated_alike():
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")
    arguments = dict(budget=0.7, allocation="search", sequence_length=128, progress=False)
    whole = calibrate(tiny_model(), tokens(600), **arguments)
    model = spread_model("cuda:1")
    assert {str(parameter.device) for parameter in model.parameters()} == {"cuda:0", "cuda:1"}
    spread = calibrate(model, tokens(600), **arguments)
    torch.testing.assert_close(spread.losses.losses, whole.losses.losses, rtol=0.05, atol=1e-6)
    assert spread.bytes_share == pytest.approx(0.7, abs=0.01)
    assert 0 < spread.calibration["search"]["searched_kl"] < 0.1
