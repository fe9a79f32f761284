"""What vLLM is not to serve is refused by name, before an engine runs."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from support.models import tiny_model
from support.patched import config_for
from support.served import SIZES, edit_config, engine, skip_without_vllm

import cats_ext
from cats_ext import CatsConfig
from cats_ext.integrations.vllm import checkpoint
from cats_ext.integrations.vllm.versions import SUPPORTED, refusing, unsupported

skip_without_vllm()

from cats_ext.integrations.vllm.linear import Adoption  # noqa: E402
from cats_ext.integrations.vllm.quantization import CatsQuantizationConfig, adopt, check_supported  # noqa: E402


@pytest.fixture
def copy(llama, tmp_path):
    return shutil.copytree(llama[0], tmp_path / "copy")


# Not one that vLLM's Transformers backend has run in this process (test_outputs): that changes transformers' class.
FAMILY = "qwen2"


def refused(directory, message, **arguments):
    with pytest.raises(Exception, match=message), engine(directory, **arguments):
        pass


def test_thresholds_of_other_weights(copy):
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"] *= 1.5
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    refused(copy, "config is for other weights than the model's: down_proj of model.layers.2.mlp differs")


def test_thresholds_that_are_missing(copy):
    (copy / "cats_thresholds.cats").unlink()
    refused(copy, "cats_thresholds.cats is missing")


def test_dense_prefill(copy):
    config = CatsConfig.from_pretrained(copy)
    config.sparse_prefill = False
    config.save_pretrained(copy)
    refused(copy, "sparse_prefill=False, which is not supported under vLLM")


def test_mlps_of_other_names(copy):
    config = CatsConfig.from_pretrained(copy)
    parts = {
        part: {name.replace("layers.2.", "layers.7."): value for name, value in getattr(config, part).items()}
        for part in ("thresholds", "down_thresholds", "layers", "statistics", "weights")
    }
    CatsConfig(**{**vars(config), **parts}).save_pretrained(copy)
    refused(copy, "vLLM's model has no MLP of the names that the thresholds are for: model.layers.7.mlp")


def test_other_activation(copy):
    edit_config(copy, hidden_act="silu")
    config = CatsConfig.from_pretrained(copy)
    layers = {name: type(layer)(**vars(layer) | {"activation": "gelu"}) for name, layer in config.layers.items()}
    CatsConfig(**{**vars(config), "layers": layers}).save_pretrained(copy)
    refused(copy, r"its forward is not down\(act\(gate\) \* up\) with the activation gelu")


def test_mixture_of_experts(tmp_path):
    model = tiny_model("qwen3-moe", hidden_size=128, head_dim=32)
    cats_ext.apply_cats(model, config_for(model, rule="plain")).save_pretrained(tmp_path)
    refused(tmp_path, "has thresholds of experts .*, which are not supported under vLLM", skip_tokenizer_init=True)


def test_gate_and_up_in_different_formats(tmp_path):
    model = tiny_model(FAMILY, **SIZES)
    cats_ext.quantize(model, "int8", up="int4", progress=False)
    cats_ext.apply_cats(model, config_for(model)).save_pretrained(tmp_path)
    message = r"gate_up_proj must have rows of one format under vLLM, .*, got gate_proj int8_g128, up_proj int4_g128_zp"
    refused(tmp_path, message, skip_tokenizer_init=True)


def test_rows_that_are_not_described(copy):
    entry = json.loads((copy / "config.json").read_text())["quantization_config"]
    edit_config(copy, quantization_config=entry | {"rows": {"model.layers.*.mlp.up_proj": {"format": "int3"}}})
    refused(copy, r"rows\['model.layers.\*.mlp.up_proj'\] must be an object with format and input_rows")


def test_packed_rows_of_other_weights(tmp_path):
    model = tiny_model(FAMILY, **SIZES)
    cats_ext.quantize(model, "int8", progress=False)
    cats_ext.apply_cats(model, config_for(model)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"] += 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = "config is for other weights than the model's: down_proj of model.layers.2.mlp differs"
    refused(tmp_path, message, skip_tokenizer_init=True)


@pytest.mark.parametrize("family", ["opt", "nemotron"])
def test_sparse_by_itself_without_a_gated_relu(tmp_path, family):
    cats_ext.apply_exact(tiny_model(family)).save_pretrained(tmp_path)
    refused(tmp_path, "is sparse by itself, but not by a gated ReLU, which is not supported", skip_tokenizer_init=True)


def test_sparse_by_itself_without_a_gate():
    """Once vLLM has made its model, it is known whether there was a gated MLP."""
    adoption = Adoption(checkpoint.Checkpoint(None, {}, "relu", ""), {}, [], False)
    with pytest.raises(ValueError, match="vLLM's model has no gated MLP, which is not supported"):
        adoption.complete()


def test_unknown_entry_of_the_checkpoint(copy):
    entry = json.loads((copy / "config.json").read_text())["quantization_config"]
    edit_config(copy, quantization_config=entry | {"row_format": "int4"})
    refused(copy, r"quantization_config must have no entries but .*, got \['row_format'\]")


def test_other_thresholds_on_another_machine(copy):
    quantization = CatsQuantizationConfig()
    quantization.maybe_update_config(str(copy))
    CatsConfig.from_pretrained(copy).at_sparsity(0.3).save_pretrained(copy)
    with pytest.raises(ValueError, match="not those that the engine was configured with"):
        adopt(quantization, None)


def test_file_of_an_earlier_version(copy, monkeypatch):
    (copy / "cats_thresholds.cats").rename(copy / "cats_thresholds.safetensors")
    monkeypatch.setattr(checkpoint, "thresholds_file", lambda path: "cats_thresholds.safetensors")
    monkeypatch.setattr(CatsConfig, "from_pretrained", lambda directory: config)
    config = config_for(tiny_model(FAMILY, **SIZES))
    refused(copy, "is of an earlier version, which vLLM takes for weights: load the checkpoint with transformers")


def settings(**changes):
    offload = SimpleNamespace(uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0))
    return SimpleNamespace(**{"offload_config": offload, "additional_config": {}, "lora_config": None} | changes)


def test_settings_of_vllm(monkeypatch):
    check_supported(settings())
    offload = SimpleNamespace(uva=SimpleNamespace(cpu_offload_gb=1), prefetch=SimpleNamespace(offload_group_size=0))
    with pytest.raises(ValueError, match="offloading weights to the CPU is not supported"):
        check_supported(settings(offload_config=offload))
    with pytest.raises(ValueError, match="not supported together with LoRA adapters"):
        check_supported(settings(additional_config={"cats": {"count": True}}, lora_config=object()))
    with pytest.raises(ValueError, match=r"additional_config\['cats'\] must be .*, got {'counts': True}"):
        check_supported(settings(additional_config={"cats": {"counts": True}}))
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT=1 is not supported"):
        check_supported(settings())


@pytest.mark.parametrize("version", ["0.22.1", "0.33.0", "1.0"])
def test_unsupported_version(version):
    assert unsupported(version) == f"CATS checkpoints need {SUPPORTED}, found vLLM {version}"
    with pytest.raises(RuntimeError, match=f"found vLLM {version}"):
        refusing(unsupported(version)).from_config({})


@pytest.mark.parametrize("version", ["0.23.0", "0.27.1rc1", "0.32.0+cpu", "0.32.5", "0.1.dev1+gabcdef", "dev"])
def test_supported_version(version):
    assert unsupported(version) is None


def test_no_vllm_model_is_changed_by_a_refusal(llama, monkeypatch):
    """An unsupported vLLM serves its other models as ever: registering does not raise."""
    import vllm
    from vllm.model_executor.layers.quantization import get_quantization_config

    from cats_ext.integrations.vllm import register

    with monkeypatch.context() as patch:
        patch.setattr(vllm, "__version__", "0.22.0")
        register()
        with pytest.raises(RuntimeError, match=r"found vLLM 0\.22\.0"):
            get_quantization_config("cats").from_config({})
    register()
    assert get_quantization_config("cats") is CatsQuantizationConfig
