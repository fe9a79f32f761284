"""Thresholds travel with transformers checkpoints, which stay dense checkpoints where cats_ext is not imported."""

from __future__ import annotations

import copy
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.installed import skip_unless_transformers_takes_peft
from support.models import tiny_model
from support.patched import assert_unchanged, config_for, few, layers_of, logits, many, snapshot
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from cats_ext import CatsConfig, CatsMLP, apply_cats, quantize, remove_cats, set_sparsity

FILES = {
    "cats_config.json",
    "cats_thresholds.cats",
    "config.json",
    "generation_config.json",
    "model.safetensors",
}


@pytest.fixture(scope="module")
def config():
    return config_for(tiny_model())


def load(directory, **arguments):
    return AutoModelForCausalLM.from_pretrained(directory, **arguments)


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        *((family, rule) for family in ("llama", "phi3", "gemma2") for rule in ("plain", "two_threshold")),
        ("llama", "three_threshold"),
        ("gemma2", "three_threshold"),
    ],
)
def test_round_trip_with_identical_logits(family, rule, tmp_path):
    model = tiny_model(family)
    dense, config = logits(model, few()), config_for(model, rule=rule, gate_power=float(rule == "two_threshold"))
    model.save_pretrained(tmp_path / "dense")
    by_hand = apply_cats(model, config)
    expected = [logits(by_hand, ids) for ids in (few(), many())]
    assert not torch.allclose(expected[0], dense, atol=1e-3)

    at_loading = load(tmp_path / "dense", quantization_config=config)
    at_loading.save_pretrained(tmp_path / "cats")
    again = load(tmp_path / "cats")
    again.save_pretrained(tmp_path / "again")
    for loaded in (at_loading, again, load(tmp_path / "again")):
        for ids, want in zip((few(), many()), expected, strict=True):
            assert torch.equal(logits(loaded, ids), want)
        assert loaded.state_dict().keys() == model.state_dict().keys()
    for name in ("cats_config.json", "cats_thresholds.cats"):
        assert (tmp_path / "cats" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    torch.testing.assert_close(logits(remove_cats(again), few()), dense)


def test_with_and_without_a_head(cats_directory, config, tmp_path):
    full, base = load(cats_directory), AutoModel.from_pretrained(cats_directory)
    with torch.no_grad():
        expected = full.model(input_ids=few()).last_hidden_state
        assert torch.equal(base(input_ids=few()).last_hidden_state, expected)
    assert torch.equal(base.layers[1].mlp.threshold, config.thresholds["model.layers.1.mlp"])
    set_sparsity(base, 0.7)
    base.save_pretrained(tmp_path)
    headed = load(tmp_path)  # with a new head
    with torch.no_grad():
        again = headed.model(input_ids=few()).last_hidden_state
        assert torch.equal(again, base(input_ids=few()).last_hidden_state) and not torch.equal(again, expected)


def test_input_thresholds_with_and_without_a_head(tmp_path):
    model = tiny_model()
    apply_cats(model, config_for(model, rule="three_threshold")).save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry["rule"] == "three_threshold" and entry["bytes_share"] == pytest.approx(2 / 3)
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.model(input_ids=few()).last_hidden_state
        assert torch.equal(base(input_ids=few()).last_hidden_state, expected)
    assert torch.equal(base.layers[1].mlp.input_threshold, model.model.layers[1].mlp.input_threshold)
    quantize(tiny_model(), progress=False).save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"rule 'three_threshold' needs .* got packed rows in model\.layers\.0\.mlp"):
        apply_cats(load(tmp_path / "packed"), CatsConfig.from_pretrained(tmp_path))


def test_files_of_a_checkpoint(cats_directory, dense_directory, config):
    assert {path.name for path in cats_directory.iterdir()} == FILES  # JSON and safetensors, no pickle
    entry = json.loads((cats_directory / "config.json").read_text())["quantization_config"]
    assert entry == {
        "quant_method": "cats",
        "rule": "two_threshold",
        "sparsity": 0.5,
        "bytes_share": config.bytes_share,
    }
    stored = CatsConfig.from_pretrained(cats_directory)
    assert all(torch.equal(stored.thresholds[name], threshold) for name, threshold in config.thresholds.items())
    weights = load_file(cats_directory / "model.safetensors")
    assert all(
        torch.equal(weights[name], value) for name, value in load_file(dense_directory / "model.safetensors").items()
    )


def test_without_the_package_the_checkpoint_is_the_dense_model(cats_directory, tmp_path):
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(cats_directory)!r})\n"
        "assert 'cats_ext' not in sys.modules\n"
        f"torch.save(model(input_ids=torch.arange(3, 19)[None]).logits, {str(tmp_path / 'logits')!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Unknown quantization type, got cats" in result.stdout + result.stderr
    got, expected = torch.load(tmp_path / "logits"), logits(tiny_model(), torch.arange(3, 19)[None])
    torch.testing.assert_close(got, expected)


# Whatever is imported first, and however its import ends.
IMPORTS = {
    "cats_ext": "import cats_ext; assert 'transformers' not in sys.modules",
    "transformers, lazily": "import transformers, cats_ext",
    "quantizers": "import transformers.quantizers.auto, cats_ext",
    "models": "import transformers.modeling_utils, cats_ext",
    "models without quantizers": (
        "sys.modules['transformers.modeling_utils'] = types.ModuleType('transformers.modeling_utils')\n"
        "import cats_ext\n"
        "assert cats_ext.patching.listeners._listeners\n"
        "del sys.modules['transformers.modeling_utils']"
    ),
    "an import that fails": (
        "import cats_ext\n"
        "sys.modules['transformers.quantizers.base'] = None\n"
        "try: import transformers.quantizers.auto\n"
        "except ImportError: pass\n"
        "else: raise AssertionError\n"
        "del sys.modules['transformers.quantizers.base']"
    ),
    "in the middle of the quantizers": (
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'transformers.quantizers.quantizer_awq':\n"
        "            sys.meta_path.remove(self)\n"
        "            import cats_ext\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import transformers.quantizers.auto\n"
        "assert 'cats_ext' in sys.modules\n"
        "import transformers.models.llama.modeling_llama"
    ),
}


@pytest.mark.parametrize("order", IMPORTS)
def test_registered_in_whatever_order_modules_are_imported(order):
    script = (
        f"import sys, types\n{IMPORTS[order]}\n"
        "import transformers.quantizers.auto as auto\n"
        "from cats_ext.patching import listeners\n"
        "assert auto.AUTO_QUANTIZER_MAPPING['cats'].__name__ == 'CatsQuantizer'\n"
        "assert len(listeners._listeners) == 1\n"
    )
    # not from the source tree, which python -c would put first
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "arguments", [{"dtype": torch.bfloat16}, {"device_map": "auto"}, {"device_map": "cpu"}], ids=str
)
def test_loading_options(arguments, cats_directory, config):
    model = load(cats_directory, **arguments)
    assert model.dtype == arguments.get("dtype", torch.float32)
    for name, module in zip(config.layers, layers_of(model), strict=True):
        assert torch.equal(module.threshold.cpu(), config.thresholds[name]) and module.threshold.dtype == torch.float32
        assert module.down_proj.weight.t().is_contiguous()


def test_a_loaded_model_may_be_cast_trained_copied_and_made_dense(cats_directory, tmp_path):
    model = load(cats_directory)
    expected = logits(model, few())
    assert torch.equal(logits(copy.deepcopy(model).double().float(), few()), expected)
    assert model.half().bfloat16().dtype == torch.bfloat16
    Trainer(model=model, args=TrainingArguments(output_dir=tmp_path, report_to=[], use_cpu=True))  # refuses quantised
    assert model.hf_quantizer.is_compileable
    model = load(cats_directory)
    assert model.dequantize() is model
    assert torch.equal(logits(model, few()), logits(tiny_model(), few()))
    assert "quantization_config" not in model.config.to_dict()


def test_a_copy_saves_its_own_weights(tmp_path, config):
    model = apply_cats(tiny_model(), config)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            twin.lm_head.weight.zero_()
            layers_of(twin)[0].threshold.zero_()
        twin.save_pretrained(tmp_path)
        assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].count_nonzero() == 0
        stored = CatsConfig.from_pretrained(tmp_path)
        assert stored.thresholds["model.layers.0.mlp"].count_nonzero() == 0  # as they are in the model now
        assert torch.equal(stored.thresholds["model.layers.1.mlp"], config.thresholds["model.layers.1.mlp"])


def test_a_model_made_dense_saves_a_dense_checkpoint(tmp_path, config):
    remove_cats(apply_cats(tiny_model(), config)).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"cats_config.json", "cats_thresholds.cats"}
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_only_the_main_process_writes(tmp_path, config):
    model = apply_cats(tiny_model(), config)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("cats_*"))
    model.save_pretrained(tmp_path, True, max_shard_size="50KB")
    assert {"cats_config.json", "model.safetensors.index.json"} < {path.name for path in tmp_path.iterdir()}
    assert torch.equal(logits(load(tmp_path), few()), logits(model, few()))


@pytest.mark.parametrize("how", ["by name", "by position"])
def test_a_state_dict_that_is_given_is_what_is_saved(how, tmp_path, config):
    model = apply_cats(tiny_model(), config)
    gathered = {name: value + 1 for name, value in model.state_dict().items()}  # as FSDP and DeepSpeed give it
    if how == "by name":
        model.save_pretrained(tmp_path, state_dict=gathered)
    else:
        model.save_pretrained(tmp_path, True, gathered)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in gathered.items())
    assert isinstance(layers_of(load(tmp_path))[0], CatsMLP)


def test_push_to_hub_uploads_the_thresholds(tmp_path, config, monkeypatch):
    from transformers import modeling_utils

    uploaded = []

    def upload(self, directory, repository, timestamps, **_):
        changed = [p for p in Path(directory).iterdir() if p.stat().st_mtime > timestamps.get(p.name, 0)]
        uploaded.extend(path.name for path in changed)

    hub = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name))
    if hasattr(modeling_utils, "hf_api"):
        monkeypatch.setattr(modeling_utils, "hf_api", lambda: hub)
    else:  # transformers 5.0
        monkeypatch.setattr(modeling_utils, "create_repo", hub.create_repo)
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(modeling_utils, "create_and_tag_model_card", lambda *_, **__: card)
    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    apply_cats(tiny_model(), config).save_pretrained(str(tmp_path), push_to_hub=True, repo_id="someone/model")
    assert set(uploaded) == FILES


@pytest.mark.parametrize("subfolder", ["", "sparse/half"])
def test_from_the_hub(subfolder, cats_directory, tmp_path, monkeypatch):
    """Weights come with the model, the thresholds' files are asked for by name: at the same revision and place."""
    from cats_ext.integrations import transformers

    commit, asked = "0123456789abcdef0123456789abcdef01234567", []
    repository = tmp_path / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v2").write_text(commit)
    place_of_weights = repository / "snapshots" / commit / subfolder
    shutil.copytree(cats_directory, place_of_weights, ignore=shutil.ignore_patterns("cats_*"))

    def download(repository, name, **place):
        asked.append((repository, name, place))
        return shutil.copy(cats_directory / name, place_of_weights / name)

    monkeypatch.setattr(transformers, "cached_file", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = {"revision": "v2", "subfolder": subfolder, "cache_dir": tmp_path}
    assert isinstance(layers_of(load("someone/model", **arguments))[0], CatsMLP)
    place = {"cache_dir": str(tmp_path), "revision": commit, "subfolder": subfolder}
    assert asked == [("someone/model", name, place) for name in ("cats_config.json", "cats_thresholds.cats")]
    assert isinstance(layers_of(load("someone/model", **arguments))[0], CatsMLP) and len(asked) == 2


def test_saving_that_fails_leaves_the_model_as_it_was(tmp_path, config):
    model = apply_cats(tiny_model(), config)
    before = snapshot(model)
    layers_of(model)[1].threshold.fill_(-1)
    with pytest.raises(ValueError, match=r"thresholds\['model.layers.1.mlp'\] must be finite and >= 0, got -1.0"):
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert not list(tmp_path.iterdir())
    assert_unchanged(model, before)


def test_an_adapter_of_transformers_own_is_saved_by_itself(tmp_path, config):
    skip_unless_transformers_takes_peft()
    from peft import LoraConfig

    model = apply_cats(tiny_model(), config)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert "adapter_model.safetensors" in names and not names & (FILES - {"generation_config.json"})


# --- refused --------------------------------------------------------------------------------------------------------


def test_damaged_checkpoints(cats_directory, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(cats_directory, broken)
    blob = (broken / "cats_thresholds.cats").read_bytes()
    (broken / "cats_thresholds.cats").write_bytes(blob[:-8])
    with pytest.raises(
        ValueError, match=r"cats_thresholds.cats are not as saved \(truncated, altered or edited by hand\)"
    ):
        load(broken)
    (broken / "cats_thresholds.cats").unlink()
    with pytest.raises(OSError, match=r"cats_thresholds.cats"):
        load(broken)
    (broken / "cats_config.json").unlink()
    with pytest.raises(
        OSError, match=r"thresholds cannot be read; without that entry .* dense model.*cats_config.json"
    ):
        load(broken)
    around = tmp_path / "around"  # whose thresholds are another checkpoint's
    shutil.copytree(cats_directory, around)
    shutil.copytree(broken, around / "inside")
    with pytest.raises(OSError, match=r"around/inside does not appear to have a file named cats_config.json"):
        load(around, subfolder="inside")


def test_thresholds_of_another_model_or_a_second_config(dense_directory, cats_directory, config, tmp_path):
    tiny_model("mistral").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config is for a model of type 'llama', got one of type 'mistral'"):
        load(tmp_path, quantization_config=config)
    with pytest.raises(ValueError, match="CatsCheckpointConfig but you are passing a CatsConfig"):
        load(cats_directory, quantization_config=config)
    with pytest.raises(ValueError, match="is patched already: call remove_cats first"):
        apply_cats(load(cats_directory), config)


def test_an_incomplete_entry(dense_directory):
    with pytest.raises(ValueError, match=r"must be a cats_ext.CatsConfig, .* got rule=plain, sparsity=None"):
        load(dense_directory, quantization_config={"quant_method": "cats", "rule": "plain"})


def test_further_items_in_the_entry_are_passed_over(cats_directory, tmp_path):
    shutil.copytree(cats_directory, tmp_path, dirs_exist_ok=True)
    document = json.loads((tmp_path / "config.json").read_text())
    document["quantization_config"] |= {"self": 1, "more": 2}
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert isinstance(layers_of(load(tmp_path))[0], CatsMLP)


@pytest.mark.parametrize("checkpoint", ["dense", "cats"])
def test_offloading_to_disk_is_refused(checkpoint, dense_directory, cats_directory, config, tmp_path):
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0", "model.layers.1"]
    device_map = dict.fromkeys(names, "cpu") | {"model.layers.2": "disk"}
    chosen = dense_directory if checkpoint == "dense" else cats_directory
    arguments = {"quantization_config": config} if checkpoint == "dense" else {}
    with pytest.raises(ValueError, match=r"model.layers.2.mlp .* is on the meta device: .* without offloading"):
        load(chosen, device_map=device_map, offload_folder=tmp_path, **arguments)


def test_quantised_models_are_refused_by_name(config):
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    model = tiny_model()
    model.hf_quantizer = Bnb4BitHfQuantizer(BitsAndBytesConfig(load_in_4bit=True))
    for function in (lambda: apply_cats(model, config), lambda: config_for(model)):
        with pytest.raises(ValueError, match="LlamaForCausalLM is quantised with bitsandbytes, which is not supported"):
            function()
    model.hf_quantizer.quantization_config.quant_method = "gptq"
    with pytest.raises(ValueError, match=r"with gptq, which is not supported: cats_ext.convert_quantized\(directory\)"):
        apply_cats(model, config)
