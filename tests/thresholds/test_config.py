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
from cats_ext.thresholds.files import CONFIG_FILE, OLD_FILES, THRESHOLDS_FILE

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
    assert a.statistics == b.statistics and a.losses == b.losses
    assert a.weights.keys() == b.weights.keys() and all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)


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
    assert len(document["sha256"]) == 64 and load_file(tmp_path / THRESHOLDS_FILE)
    assert document["bytes_share"] == pytest.approx(2 / 3)
    assert (tmp_path / THRESHOLDS_FILE).stat().st_size < LAYERS * 2 * 100_000
    assert not os.stat(tmp_path / CONFIG_FILE).st_mode & 0o111


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
@pytest.mark.parametrize("time", [1, 2])
def test_an_error_while_saving_leaves_the_earlier_config(config, plain, tmp_path, monkeypatch, call, time):
    plain.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    really, calls = getattr(os, call), []

    def fail(*arguments, **named):
        calls.append(arguments)
        if len(calls) == time:
            raise KeyboardInterrupt
        really(*arguments, **named)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(KeyboardInterrupt):
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

    monkeypatch.setattr(os, "replace", replace_once)
    with pytest.raises(KeyboardInterrupt):
        config.save_pretrained(tmp_path / "new")
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
    with pytest.raises(ValueError, match=r"truncated, altered .*sha256 [0-9a-f]{64}, expected '[0-9a-f]{64}'.*save it"):
        CatsConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "\x00", '{"format_version": 1'])
def test_invalid_json(config, tmp_path, text):
    config.save_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{CONFIG_FILE} is not valid JSON"):
        CatsConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[" * 100_000, "nested too deeply"), ('{"format_version": ' + "1" * 5000 + "}", "a number has 5000 digits")],
    ids=["nested", "long number"],
)
def test_unreasonable_json(tmp_path, text, message):
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{CONFIG_FILE} is not valid JSON: {message}"):
        CatsConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [CONFIG_FILE, THRESHOLDS_FILE])
def test_a_huge_file_is_not_read(config, tmp_path, name):
    config.save_pretrained(tmp_path)
    with open(tmp_path / name, "r+b") as file:
        file.truncate(10 * 2**30)  # takes no space on disk
    with pytest.raises(ValueError, match=rf"{name} must have at most \d+ bytes, got 10737418240"):
        CatsConfig.from_pretrained(tmp_path)


def change_json(directory, **changes) -> None:
    path = directory / CONFIG_FILE
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


def test_every_character_of_the_json_counts(config, tmp_path):
    """Digits, letters and signs are changed in turn: refused, or the same config."""
    config.save_pretrained(tmp_path)
    path, text = tmp_path / CONFIG_FILE, (tmp_path / CONFIG_FILE).read_text()
    for place in range(0, len(text), 23):
        path.write_text(text[:place] + {"1": "2", "x": "y"}.get(text[place], "1") + text[place + 1 :])
        try:
            found = CatsConfig.from_pretrained(tmp_path)
        except ValueError as error:
            assert CONFIG_FILE in str(error)
        else:  # a digit beyond the precision of a float
            assert_same(config, found)
    document = json.loads(text)
    document["layers"] = dict(reversed(document["layers"].items()))  # which the search's table depends on
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="altered or edited by hand"):
        CatsConfig.from_pretrained(tmp_path)
    path.write_text(json.dumps(json.loads(text)))  # other white space
    assert_same(config, CatsConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("version", [0, 1, 4, "3", 3.0, True, [], None, ...])
def test_wrong_format_version(config, tmp_path, version):
    config.save_pretrained(tmp_path)
    change_json(tmp_path, format_version=version)
    with pytest.raises(ValueError, match="must have format_version 2 or 3, got"):
        CatsConfig.from_pretrained(tmp_path)


def save_as_version_2(config, directory, tensors=None) -> None:
    """As earlier versions did: no sample of the weights, a hash over the tensors only, infinite thresholds."""
    replace(config, weights={}).save_pretrained(directory)
    document = json.loads((directory / CONFIG_FILE).read_text()) | {"format_version": 2}
    save_file(load_file(directory / THRESHOLDS_FILE) | (tensors or {}), directory / OLD_FILES[0])
    (directory / THRESHOLDS_FILE).unlink()
    del document["sha256"]
    for numbers in document["statistics"].values():
        del numbers["total"]
    document["thresholds_sha256"] = hashlib.sha256((directory / OLD_FILES[0]).read_bytes()).hexdigest()
    (directory / CONFIG_FILE).write_text(json.dumps(document))


def test_version_2_is_read_with_a_warning_and_replaced(config, tmp_path):
    infinite = config.thresholds[NAME].clone()
    infinite[5] = torch.inf
    save_as_version_2(config, tmp_path, {f"{NAME}.threshold": infinite})
    with pytest.warns(UserWarning, match="of format version 2, which does not say for which weights"):
        loaded = CatsConfig.from_pretrained(tmp_path)
    assert loaded.thresholds[NAME][5] == torch.finfo(torch.float32).max
    loaded.thresholds[NAME][5] = config.thresholds[NAME][5]
    assert_same(loaded, replace(config, weights={}))
    apply_cats(tiny_model(), loaded)
    loaded.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG_FILE, THRESHOLDS_FILE]
    assert_same(loaded, CatsConfig.from_pretrained(tmp_path))


@pytest.mark.filterwarnings("ignore:.*format version 2")
def test_version_2_is_checked_as_far_as_it_can_be(config, tmp_path):
    save_as_version_2(config, tmp_path, {f"{NAME}.down_threshold": torch.tensor(torch.inf)})
    with pytest.raises(ValueError, match=r"down_thresholds\['model.layers.0.mlp'\] must be finite and >= 0, got inf"):
        CatsConfig.from_pretrained(tmp_path)
    path = tmp_path / OLD_FILES[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{OLD_FILES[0]} is not as saved \(truncated, altered"):
        CatsConfig.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{OLD_FILES[0]} is missing"):
        CatsConfig.from_pretrained(tmp_path)


# --- in memory ------------------------------------------------------------------------------------------------------


def test_validation_in_memory(plain, config):
    with pytest.raises(ValueError, match=r"must be finite and >= 0, got -0\.5"):
        replace(plain, thresholds=plain.thresholds | {NAME: torch.tensor(-0.5)})
    with pytest.raises(TypeError, match="must be a float32 tensor, got float"):
        replace(plain, thresholds=plain.thresholds | {NAME: 0.5})
    with pytest.raises(ValueError, match=f"thresholds must have one entry per layer .* only in layers: {NAME}"):
        replace(plain, thresholds={k: v for k, v in plain.thresholds.items() if k != NAME})
    with pytest.raises(ValueError, match="down_thresholds must have one entry per layer for rule 'plain'"):
        replace(plain, down_thresholds=config.down_thresholds)
    with pytest.raises(ValueError, match=r"up_sparsity must be in \[0, 1\), got 1.0"):
        replace(plain, layers=plain.layers | {NAME: replace(plain.layers[NAME], up_sparsity=1.0)})
    with pytest.raises(ValueError, match="must be finite and >= 0, got inf"):
        replace(plain, thresholds=plain.thresholds | {NAME: torch.tensor(torch.inf)})
    with pytest.raises(TypeError, match=r"config cannot be written as JSON: .*Tensor"):
        replace(plain, calibration={"tokens": torch.tensor(3)}).to_files()
    with pytest.raises(ValueError, match="config cannot be written as JSON: Out of range"):
        replace(plain, calibration={"tokens": float("nan")}).to_files()


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


def test_columns_of_the_gate_count_as_rows_do(plain):
    layer = replace(plain.layers[NAME], up_sparsity=0.2, down_sparsity=0.5, input_sparsity=0.3)
    assert layer.bytes_share == pytest.approx(2 / 3)
