"""Gated MLPs whose projections hold packed rows: recognised, checked as dense ones are, compiled."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_model
from support.patched import config_for, few, layers_of, logits, many
from torch import nn

from cats_ext import apply_cats, calibrate, quantize, remove_cats
from cats_ext.patching.detection import find_gated_mlps
from cats_ext.rows import FORMATS, QuantizedLinear

SIZES = {"hidden_size": 128, "intermediate_size": 192}


def quantized_model(family="llama"):
    return quantize(tiny_model(family, **SIZES), progress=False)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_they_are_found_with_their_sizes(family):
    for dense, packed in zip(
        find_gated_mlps(tiny_model(family, **SIZES)), find_gated_mlps(quantized_model(family)), strict=True
    ):
        for name in ("name", "activation", "merged", "experts", "hidden_size", "intermediate_size"):
            assert getattr(packed, name) == getattr(dense, name)
        assert packed.packed and not dense.packed
        torch.testing.assert_close(packed.dense_down_weight(), dense.down_weight, rtol=0, atol=0.3)


def transposed(mlp):
    mlp.up_proj = QuantizedLinear(128, 192, FORMATS["int4_g64"], input_rows=True)


def misaligned(mlp):
    weight = mlp.up_proj.weight
    memory = torch.zeros(weight.numel() + 8, dtype=torch.uint8)
    mlp.up_proj.weight.data = memory[8:].view(weight.shape).copy_(weight)


def replace(name, made):
    return lambda mlp: setattr(mlp, name, made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace("up_proj", nn.Linear(128, 192)), "up_proj is a torch.nn.*Linear, but gate_proj is a QuantizedLinear"),
        (replace("gate_proj", nn.Linear(128, 192)), "up_proj is a cats_ext.*QuantizedLinear, not a torch.nn.Linear"),
        (transposed, "up_proj must have a packed row for each output, got one for each input"),
        (
            replace("down_proj", QuantizedLinear(192, 128, FORMATS["int8_g64"])),
            "down_proj must have a packed row for each input, got one for each output",
        ),
        (
            replace("up_proj", QuantizedLinear(128, 160, FORMATS["int8_g64"])),
            r"up_proj.weight must have shape \[192, 128\] to fit down_proj.weight \[128, 192\], got \[160, 128\]",
        ),
        (
            lambda mlp: setattr(mlp.up_proj, "weight", nn.Parameter(torch.zeros(2, 3, dtype=torch.uint8), False)),
            r"up_proj.weight must have shape \[192, 96\] for int4_g128_zp, got \[2, 3\]",
        ),
        (
            lambda mlp: setattr(mlp.up_proj, "weight", nn.Parameter(torch.zeros(192, 96), False)),
            "up_proj.weight must be uint8, got torch.float32",
        ),
        (misaligned, "up_proj.weight must start at a multiple of 16 bytes: copy it"),
        (lambda mlp: setattr(mlp.up_proj, "weight", mlp.gate_proj.weight), "shares memory with another weight"),
        (
            lambda mlp: setattr(mlp, "forward", lambda x: x),
            "its forward has been replaced on the instance",
        ),
        (lambda mlp: setattr(type(mlp), "limit", 0.5), "its forward is not down"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    class Clamped(type(layers_of(tiny_model())[0])):
        limit = None

        def forward(self, x):
            gate = self.act_fn(self.gate_proj(x))
            return self.down_proj((gate if self.limit is None else gate.clamp(max=self.limit)) * self.up_proj(x))

    model = quantized_model()
    layers_of(model)[1].__class__ = Clamped
    config = config_for(model)
    change(layers_of(model)[1])
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.mlp .* cannot run sparsely: .*{message}"):
        apply_cats(model, config)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_compiled_in_one_graph(family):
    model = quantized_model(family)
    apply_cats(model, config_for(model))
    expected = [logits(model, ids) for ids in (few(), many().repeat(1, 4))]
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ids, want in zip((few(), many().repeat(1, 4)), expected, strict=True):
        torch.testing.assert_close(logits(compiled, ids), want, rtol=1e-4, atol=1e-4)


def test_hooks_on_a_projection_take_the_masked_path(called):
    model = quantized_model()
    apply_cats(model, config_for(model))
    expected = logits(model, few())
    seen = []
    for mlp in layers_of(model):
        mlp.up_proj.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    called.clear()
    torch.testing.assert_close(logits(model, few()), expected, rtol=1e-3, atol=1e-3)
    assert len(seen) == len(layers_of(model)) and set(called) == {"gated_threshold"}


def test_transforms_and_autocast():
    model = quantized_model()
    apply_cats(model, config_for(model))
    mlp = layers_of(model)[0]
    x = torch.randn(3, 128)
    with torch.no_grad():
        expected = mlp(x)
        torch.testing.assert_close(torch.func.vmap(mlp)(x[:, None])[:, 0], expected, rtol=1e-3, atol=1e-3)
        _, tangent = torch.func.jvp(mlp, (x,), (torch.ones_like(x),))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(mlp(x).float(), expected, rtol=0.1, atol=0.1)
    assert tangent.isfinite().all() and tangent.abs().max() > 0


def test_thresholds_in_a_base_model_fit_the_one_with_a_head():
    model = quantized_model()
    config = calibrate(model.model, few().repeat(1, 20)[0], rule="plain", progress=False)
    apply_cats(model, config)
    remove_cats(model)
