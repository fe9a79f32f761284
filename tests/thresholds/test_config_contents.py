"""Config files with a right hash and wrong contents are refused by the name of the entry."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.models import INTERMEDIATE, LAYERS, tiny_model, tokens

from cats_ext import CatsConfig, calibrate
from cats_ext.thresholds.allocation import LossTable
from cats_ext.thresholds.files import CONFIG_FILE, THRESHOLDS_FILE, _digest, pack_files, save_config_files

NAME = "model.layers.0.mlp"


@pytest.fixture(scope="module")
def config():
    return calibrate(tiny_model(), tokens(300), gate_power=1, allocation="search", progress=False)


def save_altered(config, directory, changes=None, tensors=None) -> None:
    """Save ``config`` with other entries and tensors, and a hash of them; those that are ``...`` are left out."""
    config.save_pretrained(directory)
    document = json.loads((directory / CONFIG_FILE).read_text()) | (changes or {})
    parts = load_file(directory / THRESHOLDS_FILE) | (tensors or {})
    document, parts = ({k: v for k, v in part.items() if v is not ...} for part in (document, parts))
    save_config_files(directory, pack_files(document, parts))


NUMBERS = {"first": 9, "mantissa_bits": 9, "zeros": 0, "joint_first": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rule="magic"), "rule must be one of plain, weighted, two_threshold, three_threshold, got 'magic'"),
        (dict(rule=...), "missing entry 'rule'"),
        (dict(rule=["plain"]), r"rule must be one of .* got \['plain'\]"),
        (dict(rule="weighted"), "must not have joint with rule 'weighted'"),
        (dict(sparsity=1.5), r"sparsity must be in \[0, 1\), got 1.5"),
        (dict(sparsity="much"), "sparsity must be a number"),
        (dict(sparse_prefill="false"), "sparse_prefill must be True or False, got 'false'"),
        (dict(model_type=3), "model_type must be a name or None"),
        (dict(calibration=[]), "calibration a dict, got 'llama' and \\[\\]"),
        (dict(layers={}, statistics={}), r"losses must have shape \[0, \d+\]"),
        (dict(layers={NAME: {"hidden_size": 64}}), "must be an object with hidden_size, intermediate_size"),
        (dict(layers=[1]), r"layers must be an object, got \[1\]"),
        (dict(layers={NAME: 1}), "must be an object with hidden_size, .* got 1"),
        (dict(statistics=3), "statistics must be an object, got 3"),
        (dict(statistics={NAME: []}), "statistics must be an object with first, input_first"),
        (dict(statistics={NAME: NUMBERS | {"first": -1}}), r"first must be in \[0, \d+\], got -1"),
        (dict(statistics={NAME: NUMBERS | {"first": 10**30}}), r"first must be in \[0, \d+\], got 1000"),
        (dict(statistics={NAME: NUMBERS | {"mantissa_bits": 17}}), r"mantissa_bits must be in \[0, 16\], got 17"),
        (dict(statistics={NAME: NUMBERS | {"mantissa_bits": 9.0}}), "mantissa_bits must be an integer, got 9.0"),
        (dict(statistics={NAME: NUMBERS | {"zeros": -1}}), "zeros must be in"),
        (dict(statistics={NAME: NUMBERS | {"joint_first": -1}}), "joint_first must be in"),
        (dict(statistics={NAME: NUMBERS | {"last": 1}}), "must be an object with .* got {.*last"),
        (dict(statistics={"elsewhere": {}}), "statistics has an entry for no layer: 'elsewhere'"),
        (dict(statistics={}), "tensors for no layer"),
    ],
    ids=str,
)
def test_invalid_contents(config, tmp_path, changes, message):
    save_altered(config, tmp_path, changes)
    with pytest.raises(ValueError, match=message):
        CatsConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "experts"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "64", 10**30])
def test_invalid_layers(config, key, value):
    with pytest.raises((TypeError, ValueError), match=rf"layers\['{NAME}'\].{key} must be"):
        replace(config, layers=config.layers | {NAME: replace(config.layers[NAME], **{key: value})})


EDGES = torch.tensor([0.0, 1.0, 1.0])
WEIGHTS = torch.ones(INTERMEDIATE)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("threshold", torch.tensor(-1.0), r"thresholds\['model.layers.0.mlp'\] must be finite and >= 0, got -1.0"),
        ("threshold", torch.tensor(float("nan")), "must be finite and >= 0, got nan"),
        ("threshold", torch.tensor(float("inf")), "must be finite and >= 0, got inf"),
        ("threshold", torch.ones(3), rf"must have shape \[\] or \[{INTERMEDIATE}\], got \[3\]"),
        ("threshold", torch.ones((), dtype=torch.complex64), "must be a float32 tensor, got torch.complex64"),
        ("threshold", torch.ones(()).to(torch.float8_e4m3fn), "must be a float32 tensor, got torch.float8_e4m3fn"),
        ("down_threshold", torch.ones(INTERMEDIATE).double(), "must be a float32 tensor, got torch.float64"),
        ("down_threshold", ..., "down_thresholds must have one entry per layer .* only in layers: " + NAME),
        ("gate_histogram", torch.tensor([1, -1]), "gate_histogram must have no negative count, got -1"),
        ("gate_histogram", torch.zeros(4, dtype=torch.int64), "gate_histogram must count between 1 and"),
        ("gate_histogram", torch.full((4,), 2**62), "gate_histogram must count between 1 and"),
        ("gate_histogram", torch.ones(4, dtype=torch.int64), r"gate_histogram must count \d+ values, got \d+"),
        ("gate_histogram", torch.ones(4), "gate_histogram must be a int32 or int64 tensor, got torch.float32"),
        ("gate_histogram", torch.ones(2, 2).int(), r"gate_histogram must have shape \[any\], got \[2, 2\]"),
        ("gate_histogram", torch.ones(200_000).int(), r"first must be in \[0, -\d+\]"),
        ("joint_edges", EDGES, r"joint_counts must have shape \[3, any\]"),
        ("joint_edges", ..., "missing entry 'joint_edges'"),
        ("joint_counts", torch.ones(3), "joint_counts must be a int32 or int64 tensor"),
        ("gate_weight", WEIGHTS[:3], rf"gate_weight must have shape \[{INTERMEDIATE}\], got \[3\]"),
        ("gate_weight", WEIGHTS * float("nan"), "gate_weight must be finite and >= 0, got nan"),
        ("down_weight", -WEIGHTS, "down_weight must be finite and >= 0, got -1.0"),
        (
            "threshold",
            torch.tensor(0.1),
            rf"thresholds\['{NAME}'\] must have shape \[{INTERMEDIATE}\], as its statistics",
        ),
        (
            "down_threshold",
            torch.tensor(0.1),
            rf"down_thresholds\['{NAME}'\] must have shape .* got \[\]: to set it by",
        ),
        ("gate_weight", ..., "must have gate_weight with rule 'two_threshold' and the config's powers"),
        ("down_weight", ..., "must have down_weight with rule 'two_threshold'"),
        ("weights", torch.ones(3, 4), r"weights\['model.layers.0.mlp'\] must have shape \[3, 128\], got \[3, 4\]"),
        ("weights", ..., "weights must have one entry per layer: only in layers: model.layers.0.mlp"),
        ("more", torch.tensor(1.0), "tensors for no layer: model.layers.0.mlp.more"),
    ],
)
def test_invalid_tensors_with_a_right_hash(config, tmp_path, key, tensor, message):
    save_altered(config, tmp_path, tensors={f"{NAME}.{key}": tensor})
    with pytest.raises(ValueError, match=message):
        CatsConfig.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def columns():
    return calibrate(tiny_model(), tokens(300), rule="three_threshold", importance="norm", progress=False)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        (
            "input_threshold",
            ...,
            f"input_thresholds must have one entry per layer for rule 'three_threshold': only in layers: {NAME}",
        ),
        ("input_threshold", torch.ones(3), rf"input_thresholds\['{NAME}'\] must have shape \[\], got \[3\]"),
        ("input_threshold", torch.tensor(-1.0), rf"input_thresholds\['{NAME}'\] must be finite and >= 0, got -1.0"),
        ("input_threshold", torch.tensor(1.0).double(), "must be a float32 tensor, got torch.float64"),
        ("input_histogram", ..., "missing entry 'input_histogram'"),
        ("input_histogram", torch.tensor([1, -1]), "input_histogram must have no negative count, got -1"),
        ("input_histogram", torch.ones(4, dtype=torch.int64), r"input_histogram must count \d+ values, got \d+"),
    ],
)
def test_invalid_tensors_of_inputs(columns, tmp_path, key, tensor, message):
    save_altered(columns, tmp_path, tensors={f"{NAME}.{key}": tensor})
    with pytest.raises(ValueError, match=message):
        CatsConfig.from_pretrained(tmp_path)


def test_inputs_belong_to_one_rule(config, columns, tmp_path):
    save_altered(columns, tmp_path, {"rule": "two_threshold"})
    with pytest.raises(ValueError, match="must not have inputs with rule 'two_threshold'"):
        CatsConfig.from_pretrained(tmp_path)
    save_altered(config, tmp_path, {"rule": "three_threshold"})
    with pytest.raises(ValueError, match="must have inputs with rule 'three_threshold'"):
        CatsConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="input_thresholds must have one entry per layer for rule 'two_threshold'"):
        replace(config, input_thresholds=columns.input_thresholds)
    layers = config.layers | {NAME: replace(config.layers[NAME], input_sparsity=0.3)}
    with pytest.raises(ValueError, match=r"\.input_sparsity must be 0 for rule 'two_threshold', got 0\.3"):
        replace(config, layers=layers)
    with pytest.raises(ValueError, match=rf"layers\['{NAME}'\].input_sparsity must be in \[0, 1\), got 1.5"):
        replace(columns, layers=columns.layers | {NAME: replace(columns.layers[NAME], input_sparsity=1.5)})


def test_files_of_other_rules_do_not_mention_inputs(config, columns, tmp_path):
    for made, expected in ((config, False), (columns, True)):
        made.save_pretrained(tmp_path)
        assert ("input" in (tmp_path / CONFIG_FILE).read_text()) == expected
        assert any("input" in name for name in load_file(tmp_path / THRESHOLDS_FILE)) == expected
        read = CatsConfig.from_pretrained(tmp_path)
        assert read.to_dict() == made.to_dict() and read.statistics == made.statistics


def test_loading_on_another_default_device(config, tmp_path):
    """As transformers loads a checkpoint."""
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        assert CatsConfig.from_pretrained(tmp_path).statistics == config.statistics
    save_altered(config, tmp_path, tensors={f"{NAME}.gate_histogram": torch.zeros(0, dtype=torch.int64)})
    with torch.device("meta"), pytest.raises(ValueError, match=r"gate_histogram must count .* values, got"):
        CatsConfig.from_pretrained(tmp_path)


def test_edges_that_do_not_ascend(config, tmp_path):
    edges = config.statistics[NAME].joint.edges.clone()
    for wrong in (edges.flip(0), edges + 1, edges * float("inf"), torch.cat([edges[:2], edges[1:-1]])):
        save_altered(config, tmp_path, tensors={f"{NAME}.joint_edges": wrong.contiguous()})
        with pytest.raises(ValueError, match=r"joint_edges must (ascend from 0|be finite)"):
            CatsConfig.from_pretrained(tmp_path)


def test_a_search_that_does_not_fit(config, tmp_path):
    options = torch.tensor([[0.0, 0.0], [0.5, 0.7]], dtype=torch.float64)
    table = LossTable(options, torch.ones(LAYERS, 2, dtype=torch.float64), 0.5)
    searched = replace(config, losses=table)
    searched.save_pretrained(tmp_path)
    assert CatsConfig.from_pretrained(tmp_path).losses == table
    for key, tensor, message in (
        ("losses", table.losses[1:].contiguous(), r"losses must have shape \[3, 2\], got \[2, 2\]"),
        ("losses", table.losses * float("nan"), "losses must be finite and >= 0, got nan"),
        ("options", table.options + 0.5, r"options must be sparsities in \[0, 1\)"),
        ("spread", torch.tensor(1.5, dtype=torch.float64), r"spread in \(0, 1\]"),
        ("options", ..., "missing entry 'options'"),
        ("more", table.options, "tensors for no layer: search.more"),
    ):
        save_altered(searched, tmp_path, tensors={f"search.{key}": tensor})
        with pytest.raises(ValueError, match=message):
            CatsConfig.from_pretrained(tmp_path)


def test_a_file_with_a_right_hash_that_is_no_safetensors(config, tmp_path):
    config.save_pretrained(tmp_path)
    document = json.loads((tmp_path / CONFIG_FILE).read_text())
    header = b'{"x":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}'
    for blob in (b"", bytes(8), len(header).to_bytes(8, "little") + header + bytes(2)):
        document["sha256"] = _digest(document, blob)
        (tmp_path / CONFIG_FILE).write_text(json.dumps(document))
        (tmp_path / THRESHOLDS_FILE).write_bytes(blob)
        with pytest.raises(ValueError, match=rf"{THRESHOLDS_FILE} is not a safetensors file"):
            CatsConfig.from_pretrained(tmp_path)


# --- format version 2 ------------------------------------------------------------------------------------------------
