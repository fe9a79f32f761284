"""Packed rows travel with transformers checkpoints, alone or with thresholds; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import tiny_model
from support.patched import assert_unchanged, config_for, few, layers_of, logits, many, snapshot
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from cats_ext import (
    CatsMLP,
    QuantizationConfig,
    apply_cats,
    apply_exact,
    apply_relufication,
    quantize,
    remove_cats,
)
from cats_ext.quantization import quantized_linears

SIZES = {"hidden_size": 128, "intermediate_size": 192}
DENSE_FILES = {"config.json", "generation_config.json", "model.safetensors"}


def quantized_model(family="llama", **arguments):
    sizes = SIZES | {"tie_word_embeddings": arguments.pop("tied", False)}
    return quantize(tiny_model(family, **sizes), progress=False, **arguments)


def load(directory, **arguments):
    return AutoModelForCausalLM.from_pretrained(directory, **arguments)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quantized")
    quantized_model(down="int8").save_pretrained(directory)
    return directory


@pytest.fixture
def changed(directory, tmp_path):
    """A copy of the checkpoint, and a function that changes its entry in config.json."""

    def change(**entries):
        path = tmp_path / "config.json"
        content = json.loads(path.read_text())
        content["quantization_config"] |= entries
        path.write_text(json.dumps(content))
        return tmp_path

    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    return change


@pytest.mark.parametrize("family", ["llama", "llama-bias", "phi3"])
@pytest.mark.parametrize("arguments", [{}, {"scope": "all"}, {"scope": "all", "tied": True}, {"weights": "fp8"}])
def test_round_trip_alone_and_with_thresholds(family, arguments, tmp_path):
    model = quantized_model(family, **arguments)
    expected = [logits(model, ids) for ids in (few(), many())]
    model.save_pretrained(tmp_path / "rows")
    loaded = load(tmp_path / "rows")
    assert {p.name for p in (tmp_path / "rows").iterdir()} == DENSE_FILES
    for ids, want in zip((few(), many()), expected, strict=True):
        assert torch.equal(logits(loaded, ids), want)
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}

    sparse = logits(apply_cats(loaded, config_for(loaded)), few())
    loaded.save_pretrained(tmp_path / "both")
    again = load(tmp_path / "both")
    assert isinstance(layers_of(again)[0], CatsMLP) and torch.equal(logits(again, few()), sparse)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(few(), **greedy), loaded.generate(few(), **greedy))
    remove_cats(again).save_pretrained(tmp_path / "both")  # the thresholds that were there go
    assert {p.name for p in (tmp_path / "both").iterdir()} == DENSE_FILES
    assert torch.equal(logits(load(tmp_path / "both"), few()), expected[0])


def test_a_model_that_is_sparse_by_itself(tmp_path):
    model = quantized_model("llama-relu")
    dense = logits(model, few())
    apply_exact(model)
    assert (logits(model, few()) - dense).norm() <= 1e-5 * dense.norm()
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == DENSE_FILES
    again = load(tmp_path)
    assert isinstance(layers_of(again)[0], CatsMLP) and torch.equal(logits(again, few()), logits(model, few()))


def test_files_are_as_small_as_the_format_says(directory):
    tensors = load_file(directory / "model.safetensors")
    model = load(directory)
    for name, linear in quantized_linears(model).items():
        rows = linear.in_features if linear.input_rows else linear.out_features
        size = rows * linear.row_format.row_bytes(linear.row_width)
        assert tensors[f"{name}.weight"].numel() == size and tensors[f"{name}.weight"].dtype == torch.uint8
    packed = sum(linear.weight.numel() for linear in quantized_linears(model).values())
    others = sum(p.numel() * 4 for p in model.parameters() if p.dtype == torch.float32)
    assert (directory / "model.safetensors").stat().st_size - packed - others < 16384


def test_the_entry_names_layers_once(directory):
    entry = json.loads((directory / "config.json").read_text())["quantization_config"]
    name = "model.layers.*.mlp."
    assert entry == {
        "quant_method": "cats",
        "rows": {
            f"{name}gate_proj": {"format": "int4_g128_zp", "input_rows": False},
            f"{name}up_proj": {"format": "int4_g128_zp", "input_rows": False},
            f"{name}down_proj": {"format": "int8_g128", "input_rows": True},
        },
    }


def test_with_and_without_a_head(directory):
    full, base = load(directory), AutoModel.from_pretrained(directory)
    with torch.no_grad():
        assert torch.equal(base(few()).last_hidden_state, full.model(few()).last_hidden_state)
    assert quantized_linears(base).keys() == {name.removeprefix("model.") for name in quantized_linears(full)}
    scored = AutoModelForSequenceClassification.from_pretrained(directory)
    assert quantized_linears(scored).keys() == quantized_linears(full).keys()


def test_in_another_dtype(directory):
    model = load(directory, dtype=torch.bfloat16)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    for name, linear in quantized_linears(model).items():
        assert torch.equal(linear.weight, load(directory).get_submodule(name).weight)
    assert logits(apply_cats(model, config_for(model)), few()).dtype == torch.bfloat16


def test_a_dense_checkpoint_is_quantised_as_it_is_loaded(tmp_path):
    dense = tiny_model(**SIZES)
    dense.save_pretrained(tmp_path)
    loaded = load(tmp_path, quantization_config=QuantizationConfig("int4", 64, scope="all"))
    expected = quantize(dense, "int4", 64, scope="all", progress=False)
    assert torch.equal(logits(loaded, many()), logits(expected, many()))
    loaded.save_pretrained(tmp_path / "rows")
    assert torch.equal(logits(load(tmp_path / "rows"), many()), logits(expected, many()))


def test_relufied_and_quantised(tmp_path):
    model = apply_relufication(quantized_model())
    expected = logits(model, few())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), few()), expected)


def test_saving_and_marks_end_with_neither_rows_nor_thresholds():
    model = tiny_model(**SIZES)
    before = snapshot(model)
    remove_cats(apply_cats(model, config_for(model)))
    assert_unchanged(model, before)
    quantize(model, progress=False)
    after = snapshot(model)
    remove_cats(apply_cats(model, config_for(model)))
    assert_unchanged(model, after)
    assert not getattr(model, "is_quantized", False) and model.half().dtype == torch.float16


def test_dequantize_is_refused():
    model = apply_cats(quantized_model(), config_for(quantized_model()))
    with pytest.raises(ValueError, match=r"is quantised, and the weights before are not kept: remove_cats\(model\)"):
        model.dequantize()
    assert isinstance(layers_of(model)[0], CatsMLP)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "rows in quantization_config must be an object with an entry a layer"),
        ([1], "rows in quantization_config must be an object with an entry a layer"),
        ({"a": "int4_g64"}, "rows.'a'. must be an object with format and input_rows, got 'int4_g64'"),
        ({"a": {"format": 1, "input_rows": False}}, "rows.'a'. must have a name and true or false"),
        ({"a": {"format": "int3", "input_rows": False}}, "row format must be one of"),
        (
            {"model.layers.9.mlp.up_proj": {"format": "int4_g64", "input_rows": False}},
            "the checkpoint has packed rows for model.layers.9.mlp.up_proj, which its model does not have",
        ),
    ],
)
def test_entries_that_are_not_valid_are_refused(changed, rows, message):
    with pytest.raises(ValueError, match=message):
        load(changed(rows=rows))


def test_sizes_that_do_not_match_are_refused(changed):
    other = {"format": "int8_g64", "input_rows": False}
    rows = {f"model.layers.*.mlp.{name}_proj": other for name in ("gate", "up", "down")}
    with pytest.raises(Exception, match=r"ignore_mismatched_sizes|must have packed rows"):
        load(changed(rows=rows))
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight, torch\.uint8 \[192, 144\] by its config\.json, got"):
        load(changed(rows=rows), ignore_mismatched_sizes=True)
    path = changed() / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 96}))
    with pytest.raises(ValueError, match=r"rows of model\.layers\.0\.mlp\.gate_proj do not fit the model: columns"):
        load(path.parent)


def test_missing_rows_are_refused(changed):
    path = changed() / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"must have packed rows model\.layers\.1\.mlp\.up_proj\.weight"):
        load(path.parent)


def test_offloaded_rows_are_refused(directory, tmp_path):
    pytest.importorskip("accelerate")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    with pytest.raises(ValueError, match=r"\.mlp\.gate_proj\.weight is on the meta device: load the weights"):
        others = {"model.layers.1": "disk", "model.layers.2": "disk"}
        load(directory, device_map=places | others, offload_folder=tmp_path)


def test_thresholds_of_other_rows_are_refused(tmp_path):
    model = quantized_model()
    apply_cats(model, config_for(model)).save_pretrained(tmp_path)
    other = quantize(tiny_model(seed=1, **SIZES), progress=False)
    tensors = {name: t.contiguous() for name, t in other.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"for other weights than the model's: gate_proj of model\.layers\.0"):
        load(tmp_path)


def test_a_quantised_checkpoint_is_not_quantised_again(directory):
    with pytest.raises(ValueError, match=r"CatsCheckpointConfig but you are passing a QuantizationConfig"):
        load(directory, quantization_config=QuantizationConfig())
    with pytest.raises(ValueError, match="is quantised already"):
        quantize(load(directory))


def test_without_cats_ext_it_is_refused(directory):
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(directory)!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0 and "mismatch" in result.stderr
