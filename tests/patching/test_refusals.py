"""What apply_cats refuses, by name and with the reason, leaving the model as it was."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from support.models import HIDDEN, INTERMEDIATE, VOCABULARY, tiny_model
from support.patched import assert_unchanged, config_for, layers_of, snapshot
from torch import nn

from cats_ext import CatsMLP, apply_cats, remove_cats, set_sparsity


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


def test_arguments_of_the_wrong_kind():
    model, config = tiny_model(), config_for(tiny_model())
    before = snapshot(model)
    for name in ("sparse_prefill", "neuron_rows"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got 'no'"):
            apply_cats(model, config, **{name: "no"})
    assert_unchanged(model, before)
    for function in (remove_cats, lambda model: set_sparsity(model, 0.5)):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
            function("model")


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


class Packed(torch.Tensor):
    """As quantising libraries have them, and DTensor."""


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
        r"up_proj is a test_refusals.Scaled, not a torch.nn.Linear",
    ),
    "activation": (lambda mlp, model: setattr(mlp, "act_fn", nn.Tanh()), "its activation Tanh is none of silu, gelu"),
    "no activation": (lambda mlp, model: delattr(mlp, "act_fn"), "none of the attributes act_fn, activation_fn"),
    "another child": (lambda mlp, model: mlp.add_module("norm", nn.LayerNorm(2)), "it has further children: norm"),
    "tied": (
        lambda mlp, model: setattr(mlp.gate_proj, "weight", model.model.layers[0].mlp.gate_proj.weight),
        "gate_proj.weight shares memory with another weight of the model",
    ),
    "same memory": (
        lambda mlp, model: setattr(mlp.gate_proj.weight, "data", model.model.layers[2].mlp.up_proj.weight.data),
        "gate_proj.weight shares memory with another weight of the model",
    ),
    "shared": (lambda mlp, model: setattr(model.model.layers[2], "mlp", mlp), "used in more than one place"),
    "dtype": (lambda mlp, model: mlp.up_proj.half(), "up_proj.weight is torch.float16 on cpu, but gate_proj.weight is"),
    "complex": (
        lambda mlp, model: setattr(
            mlp.gate_proj, "weight", nn.Parameter(mlp.gate_proj.weight.data.to(torch.complex64))
        ),
        "gate_proj.weight must be float32, float16, bfloat16 or float64, got torch.complex64",
    ),
    "packed": (
        lambda mlp, model: setattr(
            mlp.gate_proj, "weight", nn.Parameter(Packed(mlp.gate_proj.weight.data), requires_grad=False)
        ),
        "gate_proj.weight is a Packed, not a plain tensor",
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


def test_adapters_first_are_refused():
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    config = config_for(model)
    get_peft_model(model, LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"up_proj is a peft\.tuners\.lora.* adapters are added after patching"):
        apply_cats(model, config)
