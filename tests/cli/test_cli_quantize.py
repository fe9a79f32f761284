"""``cats quantize``: what it writes is a model that the other commands take."""

from __future__ import annotations

import shutil

import pytest
import torch
from support.cli_runner import cats, error_of, json_of
from support.foreign_checkpoints import foreign_checkpoint
from support.models import LAYERS
from support.saved_model import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import cats_ext
from cats_ext.quantization import quantized_linears

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def quantised(model_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("quantised")
    document = json_of("quantize", model_dir, "-o", directory, "--weights", "int8", "--group-size", 32)
    assert document["formats"] == ["int8_g32"]
    return directory


def test_it_writes_what_the_api_would(model_dir, tmp_path):
    arguments = ("--weights", "int4", "--down", "int8", "--scope", "all", "--no-zero-points")
    document = json_of("quantize", model_dir, "-o", tmp_path, *arguments)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(model_dir)
    before = sum(p.numel() * p.element_size() for p in expected.parameters())
    cats_ext.quantize(expected, "int4", down="int8", scope="all", zero_points=False, progress=False)
    assert document["layers"] == len(quantized_linears(model)) == 7 * LAYERS + 1
    assert document["bytes_before"] == before > document["bytes"]
    assert document["scope"] == "all" and document["weights"] == "int4" and document["directory"] == str(tmp_path)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_directory_without_a_tokenizer(tmp_path):
    foreign_checkpoint("awq").save(tmp_path / "awq")
    assert "has no tokenizer: save it there too" in error_of("quantize", tmp_path / "awq", "-o", tmp_path / "out")


def test_text_is_what_errors_are_compensated_by(model_dir, text_file, tmp_path):
    json_of("quantize", model_dir, "-o", tmp_path, "--text", text_file, "--sequence-length", 64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    run = {"tokenizer": tokenizer, "sequence_length": 64, "progress": False}
    cats_ext.quantize(expected, data=text_file.read_text(), **run)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_other_commands_take_it(quantised, text_file, tmp_path):
    thresholds = tmp_path / "thresholds"
    json_of("calibrate", quantised, "--text", text_file, "-o", thresholds, "--sequence-length", 64, "--rule", "plain")
    generated = json_of("generate", quantised, "--cats", thresholds, "--prompt", "the cat", "--max-new-tokens", 4)
    assert generated["new_tokens"] <= 4 and generated["sparsity"]["up_sparsity"] > 0
    document = json_of("eval", quantised, "--cats", thresholds, "--text", text_file, "--window", 64, "--max-windows", 2)
    assert document
    again = tmp_path / "again"
    assert "is quantised already" in error_of("quantize", quantised, "-o", again)


def test_a_patched_model_keeps_its_thresholds(model_dir, text_file, tmp_path):
    save_tiny_model(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    ids = torch.arange(3, 120).repeat(3)
    cats_ext.apply_cats(model, cats_ext.calibrate(model, ids, rule="plain", progress=False)).save_pretrained(
        tmp_path / "patched"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "patched" / name).write_bytes((tmp_path / "dense" / name).read_bytes())
    json_of("quantize", tmp_path / "patched", "-o", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(loaded.model.layers[0].mlp, cats_ext.CatsMLP) and quantized_linears(loaded)


def test_it_says_what_to_do_next(model_dir, tmp_path):
    result = cats("quantize", model_dir, "-o", tmp_path)
    assert result.exit_code == 0 and f"{3 * LAYERS} layers in int4" in result.stdout
    assert f"cats calibrate {tmp_path} --text FILE" in result.stdout


def test_finetuning_it_is_refused(quantised, text_file, tmp_path):
    message = error_of("finetune", quantised, "--text", text_file, "-o", tmp_path, "--sequence-length", 64)
    assert "is quantised, and packed rows cannot be tuned" in message


def with_tokenizer(checkpoint, model_dir, directory):
    checkpoint.save(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_dir / name, directory)
    return directory


@pytest.fixture(scope="module")
def awq(model_dir, tmp_path_factory):
    return with_tokenizer(foreign_checkpoint("awq"), model_dir, tmp_path_factory.mktemp("awq"))


def test_a_checkpoint_of_awq_is_converted(awq, tmp_path):
    document = json_of("quantize", awq, "-o", tmp_path / "out", "--group-size", 32)
    expected, errors = cats_ext.convert_quantized(awq, group_size=32, progress=False)
    assert document["method"] == "awq" and document["down_errors"] == pytest.approx(errors)
    assert document["kept_errors"] == {}
    assert document["formats"] == ["int4_g64_zp", "int8_g32"] and document["bytes_before"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    result = cats("quantize", awq, "-o", tmp_path / "again", "--down", "int4")
    assert result.exit_code == 0 and f"rounded again, {LAYERS} in int4_g128_zp: relative error 0." in result.stdout


def test_what_is_not_kept_exactly_of_a_checkpoint_of_torchao_is_said(model_dir, tmp_path):
    checkpoint = foreign_checkpoint("torchao-8-sym-row")
    name = "model.layers.0.mlp.up_proj"
    checkpoint.tensors[f"{name}._weight_scale"] *= 1 + 2**-12
    directory = with_tokenizer(checkpoint, model_dir, tmp_path / "torchao")
    document = json_of("quantize", directory, "-o", tmp_path / "out")
    assert document["method"] == "torchao" and len(document["down_errors"]) == LAYERS
    assert document["kept_errors"] == {name: pytest.approx(2**-12, rel=0.01)}
    result = cats("quantize", directory, "-o", tmp_path / "again")
    assert "of the file, but for float16 scales and zero points: relative error up to 0.0002." in result.stdout


@pytest.mark.parametrize("option", [("--weights", "int8"), ("--gate", "int8"), ("--scope", "all"), ("--text", "FILE")])
def test_options_that_a_checkpoint_of_awq_has_no_use_for(awq, option, text_file, tmp_path):
    arguments = [str(text_file) if value == "FILE" else value for value in option]
    message = error_of("quantize", awq, "-o", tmp_path / "out", *arguments)
    assert option[0] in message and "must be left out" in message and "which awq has quantised" in message
