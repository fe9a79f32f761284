"""``save_pretrained`` of a patched model: a directory has the old checkpoint or the new one, and never a mixture."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import tiny_model
from support.patched import InterruptAt, config_for, few, layers_of, logits
from transformers import AutoModelForCausalLM, PreTrainedModel

from cats_ext import CatsConfig, CatsMLP, apply_cats, apply_relufication, remove_cats, set_sparsity
from cats_ext.integrations import saving
from cats_ext.thresholds import replacement

OTHER_WEIGHTS = "config is for other weights than the model's: "


@pytest.fixture(scope="module")
def config():
    return config_for(tiny_model())


def tuned(config):
    """A patched model with other weights than ``config`` was made for."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    return apply_cats(model, config, check_weights=False)


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def both(tmp_path_factory, config):
    """The contents of an old checkpoint, with a file of the user, and of a new one over it."""
    directory = tmp_path_factory.mktemp("checkpoint")
    apply_cats(tiny_model(), config).save_pretrained(directory)
    (directory / "notes.txt").write_text("of the user")
    old = contents(directory)
    tuned(config).save_pretrained(directory)
    return old, contents(directory)


def fill(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def test_interrupted_at_every_line(config, both, tmp_path):
    old, new = both
    model, line, ended = tuned(config), 0, []
    functions = [saving.save_pretrained, saving._additions, saving._write, saving._in_progress.__wrapped__]
    functions += [
        saving._superseded,
        replacement.publish,
        replacement.staged.__wrapped__,
        PreTrainedModel.save_pretrained,
    ]
    while True:
        directory = fill(tmp_path / str(line), old)
        try:
            with InterruptAt(line, functions, KeyboardInterrupt):
                model.save_pretrained(directory)
        except KeyboardInterrupt:
            found = contents(directory)
            assert found in (old, new) and len(os.listdir(directory)) == len(found), line
            ended.append(found == new)
        else:
            break
        line += 1
    assert line > 100 and {*ended} == {True, False}
    assert "quantization_config" not in model.config.to_dict() and saving.state_dict_to_save() is None
    assert contents(directory) == new


def test_an_error_of_the_disk_leaves_the_old_checkpoint(config, both, tmp_path, monkeypatch):
    fill(tmp_path, both[0])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        tuned(config).save_pretrained(tmp_path)
    assert contents(tmp_path) == both[0]
    with pytest.raises(OSError, match="No space left on device"):
        tuned(config).save_pretrained(tmp_path / "new")
    assert contents(tmp_path) == both[0] and not (tmp_path / "new").exists()


def test_a_mixture_is_refused_by_name(both, tmp_path):
    """What a killed process can leave, and what users can copy together."""
    old, new = both
    for kept in ({"model.safetensors"}, {"cats_config.json", "cats_thresholds.cats"}, {"cats_thresholds.cats"}):
        directory = fill(tmp_path / "+".join(kept), new)
        fill(directory, {name: old[name] for name in kept})
        with pytest.raises(
            ValueError, match=OTHER_WEIGHTS if len(kept) != 1 or "model" in str(kept) else "not as saved"
        ):
            load(directory)
    for missing in ("cats_config.json", "cats_thresholds.cats"):
        directory = fill(tmp_path / missing, new)
        (directory / missing).unlink()
        with pytest.raises(OSError, match=f"thresholds cannot be read.*{missing}"):
            load(directory)


def test_thresholds_left_beside_a_dense_checkpoint(config, both, tmp_path):
    fill(tmp_path, both[0])
    dense = remove_cats(tuned(config))
    dense.save_pretrained(tmp_path)
    assert type(layers_of(load(tmp_path))[0]) is not CatsMLP
    left = CatsConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=OTHER_WEIGHTS):
        apply_cats(load(tmp_path), left)
    with pytest.raises(ValueError, match=OTHER_WEIGHTS):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=left)


def test_the_weights_that_are_saved_are_those_that_are_checked(config, tmp_path):
    """Trained on, saved in another dtype, from a state dict, offloaded: the checkpoint loads."""
    model = tuned(config)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), few()), logits(model, few()))
    model.bfloat16().save_pretrained(tmp_path)
    load(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).save_pretrained(tmp_path)
    load(tmp_path)
    model = apply_cats(tiny_model(), config)
    model.save_pretrained(tmp_path, state_dict={name: value + 1 for name, value in model.state_dict().items()})
    weights = CatsConfig.from_pretrained(tmp_path).weights
    assert all(torch.equal(weights[name], sample + 1) for name, sample in config.weights.items())
    load(tmp_path)


def test_an_offloaded_model_is_saved(config, tmp_path):
    from accelerate import cpu_offload

    def offloaded(model):
        cpu_offload(model, execution_device="cpu")
        model.hf_device_map = {"": "cpu"}
        return model

    try:
        offloaded(tiny_model()).save_pretrained(tmp_path / "dense")
    except NotImplementedError as error:  # transformers 5.0
        pytest.skip(f"this transformers cannot save an offloaded model: {error}")
    model = apply_cats(tiny_model(), config)
    expected = logits(model, few())
    assert layers_of(offloaded(model))[0].gate_proj.weight.is_meta
    model.save_pretrained(tmp_path / "sparse")
    torch.testing.assert_close(logits(load(tmp_path / "sparse"), few()), expected)


def test_weights_that_are_not_here_are_asked_for(config, tmp_path):
    model = apply_cats(tiny_model(), config)
    gathered = {name: value.clone() for name, value in model.state_dict().items()}
    layers_of(model)[1].up_proj.weight.data = torch.empty(0)  # as DeepSpeed leaves them
    with pytest.raises(ValueError, match=r"weights of model.layers.1.mlp are sharded: pass state_dict= with the"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, state_dict=gathered)
    with pytest.raises(ValueError, match="distributed_checkpoint must be False for a patched or quantised model"):
        model.save_pretrained(tmp_path, distributed_checkpoint=True)


@pytest.mark.parametrize("variant", [None, "mine"])
def test_sharded_and_whole_checkpoints_replace_each_other(variant, config, tmp_path):
    model = tuned(config)
    (tmp_path / "model.of.the.user.txt").write_text("stays")
    for size in ("5GB", "50KB", "60KB", "5GB"):
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        model.save_pretrained(tmp_path, max_shard_size=size, variant=variant)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, variant=variant)
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
        weights = [name for name in os.listdir(tmp_path) if "safetensors" in name]
        assert (len(weights) == 1) == (size == "5GB")
    assert (tmp_path / "model.of.the.user.txt").read_text() == "stays"


def test_weights_of_other_variants_stay(config, tmp_path):
    model = apply_cats(tiny_model(), config)
    model.save_pretrained(tmp_path, variant="half")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.half.safetensors").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path, variant="half")


def test_no_file_but_the_weights_looks_like_weights(both):
    assert [name for name in both[1] if name.endswith((".safetensors", ".bin", ".pt", ".pth"))] == ["model.safetensors"]


@pytest.mark.parametrize("models", ["one", "several"])
def test_threads_that_save_into_one_directory(models, config, tmp_path):
    shared = tuned(config)
    start = threading.Barrier(4)

    def save(worker: int) -> None:
        model = shared if models == "one" else tuned(config)
        start.wait()
        for size in ("5GB", "50KB"):
            if models == "several":
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(1 + worker / 100)
            model.save_pretrained(tmp_path, max_shard_size=size)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(4)))
    assert isinstance(layers_of(load(tmp_path))[0], CatsMLP)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "cats"


def test_an_upload_that_fails_leaves_the_files_in_their_place(config, both, tmp_path, monkeypatch):
    from transformers import modeling_utils

    fill(tmp_path, both[0])

    class Hub:
        def create_repo(self, name, **_):
            self.repo_id = name
            return self

        def save(self, path):
            Path(path).write_text("a card")

    hub, asked = Hub(), []
    monkeypatch.setattr(modeling_utils, "hf_api", lambda: hub, raising=False)
    monkeypatch.setattr(modeling_utils, "create_repo", hub.create_repo, raising=False)
    monkeypatch.setattr(modeling_utils, "create_and_tag_model_card", lambda *_, **__: hub)

    def upload(self, directory, repository, timestamps, **_):
        asked.append((Path(directory), repository, timestamps))
        raise ConnectionError("no network")

    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    with pytest.raises(ConnectionError):
        tuned(config).save_pretrained(tmp_path, push_to_hub=True)
    ((directory, repository, older),) = asked
    assert (directory, repository) == (tmp_path, tmp_path.name)
    assert older.pop("notes.txt") == float("inf") and all(name.startswith(".cats") for name in older)  # not uploaded
    found = contents(tmp_path)
    assert found.pop("README.md") == b"a card" and found["model.safetensors"] != both[0]["model.safetensors"]
    assert load(tmp_path) and len(os.listdir(tmp_path)) == len(found) + 1


def test_a_relufied_checkpoint_is_checked_too(tmp_path):
    apply_relufication(tiny_model()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_act"] == "relu"
    weights = load_file(tmp_path / "model.safetensors")
    load(tmp_path)
    tiny_model("llama-relu").save_pretrained(tmp_path / "other")
    assert weights.keys() == load_file(tmp_path / "other" / "model.safetensors").keys()
    model = tiny_model()
    with torch.no_grad():
        layers_of(model)[0].down_proj.weight.neg_()
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=OTHER_WEIGHTS + "down_proj of model.layers.0.mlp"):
        load(tmp_path)


def test_the_sparsity_that_is_set_is_saved(config, tmp_path):
    model = apply_cats(tiny_model(), config)
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    set_sparsity(model, 0.7).save_pretrained(tmp_path)
    after = contents(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {
        "config.json",
        "cats_config.json",
        "cats_thresholds.cats",
    }
