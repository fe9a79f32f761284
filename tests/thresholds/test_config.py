"""CatsConfig: what it accepts, and that its files come back exactly or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import INTERMEDIATE, LAYERS, tiny_model, tokens

from cats_ext import CatsConfig, apply_cats, calibrate
from cats_ext.thresholds.files import CONFIG_FILE, THRESHOLDS_FILE

NAME = "model.layers.0.mlp"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def config(model):
    return calibrate(model, tokens(300), rule="two_threshold", gate_power=1, progress=False)


@pytest.fixture(scope="module")
def plain(model):
    return calibrate(model, tokens(300), rule="plain", sparsity=0.3, progress=False)


def assert_same(a: CatsConfig, b: CatsConfig) -> None:
    assert a.to_dict() == b.to_dict()
    assert list(a.layers) == list(b.layers)
    for left, right in ((a.thresholds, b.thresholds), (a.down_thresholds, b.down_thresholds)):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)
    assert a.statistics == b.statistics


@pytest.mark.parametrize("which", ["config", "plain"])
def test_round_trip(which, request, tmp_path):
    config = request.getfixturevalue(which)
    config.save_pretrained(tmp_path / "new" / "directory")
    assert sorted(os.listdir(tmp_path / "new" / "directory")) == [CONFIG_FILE, THRESHOLDS_FILE]
    assert_same(config, CatsConfig.from_pretrained(tmp_path / "new" / "directory"))
    assert_same(config, CatsConfig.from_pretrained(str(tmp_path / "new" / "directory")))


def test_round_trip_gives_identical_logits(config, tmp_path):
    config.save_pretrained(tmp_path)
    ids = tokens(12)[None]
    with torch.no_grad():
        a = apply_cats(tiny_model(), config)(input_ids=ids).logits
        b = apply_cats(tiny_model(), CatsConfig.from_pretrained(tmp_path))(input_ids=ids).logits
    assert torch.equal(a, b)


def test_saved_histograms_give_the_thresholds_again(plain, tmp_path):
    plain.save_pretrained(tmp_path)
    loaded = CatsConfig.from_pretrained(tmp_path)
    for name, threshold in loaded.thresholds.items():
        assert loaded.statistics[name].gate.quantile(0.3) == float(threshold)


def test_huge_counts_survive(plain, tmp_path):
    big = replace(plain, statistics={NAME: deepcopy(plain.statistics[NAME])})
    big.statistics[NAME].gate.counts *= 2**33
    big.save_pretrained(tmp_path)
    assert CatsConfig.from_pretrained(tmp_path).statistics == big.statistics


def test_json_is_readable_and_small(config, tmp_path):
    config.save_pretrained(tmp_path)
    document = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert document["rule"] == "two_threshold" and document["model_type"] == "llama"
    assert document["layers"][NAME]["intermediate_size"] == INTERMEDIATE
    assert document["thresholds_sha256"] == hashlib.sha256((tmp_path / THRESHOLDS_FILE).read_bytes()).hexdigest()
    assert document["bytes_share"] == pytest.approx(2 / 3)
    assert (tmp_path / THRESHOLDS_FILE).stat().st_size < LAYERS * 2 * 100_000
    assert not os.stat(tmp_path / CONFIG_FILE).st_mode & 0o111


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["open", "copy2", "first replace", "second replace"])
def test_an_error_while_saving_leaves_the_earlier_config(config, plain, tmp_path, monkeypatch, failing):
    plain.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    calls = []

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    if failing == "open":
        monkeypatch.setattr("cats_ext.thresholds.files.os.fsync", fail)
    elif failing == "copy2":
        monkeypatch.setattr("cats_ext.thresholds.files.shutil.copy2", fail)
    else:
        really = os.replace

        def replace_or_fail(source, target):
            calls.append(target)
            if len(calls) == (1 if failing == "first replace" else 2):
                fail()
            really(source, target)

        monkeypatch.setattr("cats_ext.thresholds.files.os.replace", replace_or_fail)
    with pytest.raises(OSError, match="No space left"):
        config.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_an_error_in_a_new_directory_leaves_nothing(config, tmp_path, monkeypatch):
    really, calls = os.replace, []

    def replace_once(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        really(source, target)

    monkeypatch.setattr("cats_ext.thresholds.files.os.replace", replace_once)
    with pytest.raises(KeyboardInterrupt):
        config.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == []


def test_overwriting(config, plain, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights of the model")
    config.save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path)
    assert_same(plain, CatsConfig.from_pretrained(tmp_path))
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights of the model"


# --- reading --------------------------------------------------------------------------------------------------------


def test_missing_files(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory with a CATS config"):
        CatsConfig.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"{CONFIG_FILE} is missing"):
        CatsConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    (tmp_path / THRESHOLDS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"{THRESHOLDS_FILE} is missing"):
        CatsConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("how", ["truncated", "one bit", "another config"])
def test_altered_thresholds(config, plain, tmp_path, how):
    config.save_pretrained(tmp_path)
    path = tmp_path / THRESHOLDS_FILE
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    elif how == "one bit":
        content[-1] ^= 1
    else:
        plain.save_pretrained(tmp_path / "other")
        content = (tmp_path / "other" / THRESHOLDS_FILE).read_bytes()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"truncated or altered.*sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        CatsConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "\x00", '{"format_version": 1'])
def test_invalid_json(config, tmp_path, text):
    config.save_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{CONFIG_FILE} is not valid JSON"):
        CatsConfig.from_pretrained(tmp_path)


def change_json(directory, **changes) -> None:
    path = directory / CONFIG_FILE
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


@pytest.mark.parametrize("version", [0, 1, 3, "2", None, ...])
def test_wrong_format_version(config, tmp_path, version):
    config.save_pretrained(tmp_path)
    change_json(tmp_path, format_version=version)
    with pytest.raises(ValueError, match="must have format_version 2, got"):
        CatsConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rule="magic"), "rule must be one of plain, weighted, two_threshold, got 'magic'"),
        (dict(rule=...), "missing entry 'rule'"),
        (dict(sparsity=1.5), r"sparsity must be in \[0, 1\), got 1.5"),
        (dict(sparsity="much"), "sparsity must be a number"),
        (dict(sparse_prefill="false"), "sparse_prefill must be True or False, got 'false'"),
        (dict(layers={}), "no layer|at least one MLP"),
        (dict(layers={NAME: {"hidden_size": 64}}), "missing 4 required positional arguments"),
        (dict(layers=[1]), "object"),
        (dict(statistics={NAME: {"first": -1, "mantissa_bits": 9}}), "exceed"),
        (dict(statistics={NAME: {"first": 9, "mantissa_bits": 9, "joint_first": -1}}), "exceed the joint histogram's"),
        (dict(statistics={NAME: {"last": 1}}), "unexpected keyword argument 'last'"),
        (dict(statistics={"elsewhere": {}}), "missing entry 'gate_histogram'"),
        (dict(statistics={}), "entries for no layer"),
    ],
)
def test_invalid_contents(config, tmp_path, changes, message):
    config.save_pretrained(tmp_path)
    change_json(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        CatsConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        (f"{NAME}.threshold", torch.tensor(-1.0), r"thresholds\['model.layers.0.mlp'\] must be >= 0, got -1.0"),
        (f"{NAME}.threshold", torch.tensor(float("nan")), "must be >= 0, got nan"),
        (f"{NAME}.threshold", torch.ones(3), rf"must have shape \[\] or \[{INTERMEDIATE}\], got \[3\]"),
        (f"{NAME}.down_threshold", torch.ones(INTERMEDIATE).double(), "must be a float32 tensor, got torch.float64"),
        (f"{NAME}.down_threshold", None, "down_thresholds must have one entry per layer .* only in layers: " + NAME),
        ("model.layers.9.mlp.threshold", torch.tensor(1.0), "entries for no layer: model.layers.9.mlp.threshold"),
    ],
)
def test_invalid_tensors_with_a_right_hash(config, tmp_path, key, tensor, message):
    config.save_pretrained(tmp_path)
    path = tmp_path / THRESHOLDS_FILE
    tensors = load_file(path) | {key: tensor}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    change_json(tmp_path, thresholds_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match=message):
        CatsConfig.from_pretrained(tmp_path)


# --- in memory ------------------------------------------------------------------------------------------------------


def test_validation_in_memory(plain, config):
    with pytest.raises(ValueError, match=r"must be >= 0, got -0\.5"):
        replace(plain, thresholds=plain.thresholds | {NAME: torch.tensor(-0.5)})
    with pytest.raises(TypeError, match="must be a float32 tensor, got float"):
        replace(plain, thresholds=plain.thresholds | {NAME: 0.5})
    with pytest.raises(ValueError, match=f"thresholds must have one entry per layer .* only in layers: {NAME}"):
        replace(plain, thresholds={k: v for k, v in plain.thresholds.items() if k != NAME})
    with pytest.raises(ValueError, match="down_thresholds must have one entry per layer for rule 'plain'"):
        replace(plain, down_thresholds=config.down_thresholds)
    with pytest.raises(ValueError, match=r"up_sparsity must be in \[0, 1\), got 1.0"):
        replace(plain, layers=plain.layers | {NAME: replace(plain.layers[NAME], up_sparsity=1.0)})
    replace(plain, thresholds=plain.thresholds | {NAME: torch.tensor(torch.inf)})  # drops everything, and may


def test_a_config_changed_after_it_was_made_is_checked_again(plain, tmp_path):
    changed = replace(plain, thresholds=dict(plain.thresholds))
    changed.thresholds[NAME] = torch.tensor(float("nan"))
    with pytest.raises(ValueError, match="got nan"):
        changed.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="got nan"):
        apply_cats(tiny_model(), changed)


def test_bytes_share_weighs_layers_by_size(plain):
    first, second, third = plain.layers
    layers = {
        first: replace(plain.layers[first], up_sparsity=0.9, down_sparsity=0.9),
        second: replace(plain.layers[second], up_sparsity=0.0, down_sparsity=0.0, intermediate_size=3 * INTERMEDIATE),
        third: replace(plain.layers[third], up_sparsity=0.3, down_sparsity=0.6),
    }
    config = replace(plain, layers=layers)
    assert config.bytes_share == pytest.approx((0.4 + 3 * 1.0 + 0.7) / 5)
