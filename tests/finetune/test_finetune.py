"""Fine-tuning of a tiny model: what is saved, going on after an interruption, and errors that lose nothing."""

from __future__ import annotations

import errno
import json
import shutil
import sys

import pytest
import torch
from support.cli_runner import cats, error_of, json_of
from support.models import LAYERS, tiny_model, tokens
from support.patched import few, layers_of, logits
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import cats_ext
from cats_ext.evaluation.comparison import perplexity
from cats_ext.finetune import FinetuneSettings, TrainingStoppedError, finetune, relufy
from cats_ext.finetune.trainer import last_checkpoint
from cats_ext.patching.mlp import CatsMLP

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, LENGTH = 6, 48
OPTIONS = ("--steps", STEPS, "--sequence-length", LENGTH, "--batch-size", 2, "--learning-rate", 1e-2)
OPTIONS += ("--save-every", 2, "--report-to", "none")
SETTINGS = FinetuneSettings(steps=STEPS, sequence_length=LENGTH, batch_size=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def run(model_dir, text_file, tmp_path_factory):
    """A LoRA tuning at 50 %, from the command line: its directory and its JSON."""
    out = tmp_path_factory.mktemp("tuned")
    return out, json_of("finetune", model_dir, "--text", text_file, "-o", out, *OPTIONS)


def tune(output, settings=SETTINGS, **arguments):
    arguments = {"save_every": 2, "progress": False} | arguments
    return finetune(tiny_model(), tokens(LENGTH * 12), output, settings, **arguments)


def test_the_tuned_model_is_saved_and_runs_on_the_kernel(run, model_dir, text_file, called):
    out, found = run
    assert len(found["loss"]) == STEPS and found["loss"][-1][1] < found["loss"][0][1] - 0.1
    assert found["after"]["ppl"] < found["before"]["ppl"] and found["resumed_from"] is None
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert [isinstance(module, CatsMLP) for module in layers_of(model)] == [True] * LAYERS
    thresholds = cats_ext.CatsConfig.from_pretrained(out / "training" / "thresholds").thresholds
    for name, module in zip(thresholds, layers_of(model), strict=True):
        assert torch.equal(module.threshold, thresholds[name])
    logits(model, few())
    assert set(called) == {"sparse_mlp"}
    # what the report says was measured on these windows, of this model
    ids = torch.tensor(tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"])
    count = len(ids) // LENGTH
    held_out = ids[(count - max(1, min(8, count // 10))) * LENGTH : count * LENGTH]
    assert held_out.numel() == found["held_out_tokens"]
    with cats_ext.track_sparsity(model):
        ppl = perplexity(model, held_out, window=LENGTH, progress=False).ppl
    assert ppl == pytest.approx(found["after"]["ppl"], rel=1e-4)
    report = cats_ext.sparsity_report(model)
    assert report.up_sparsity == pytest.approx(found["after"]["sparsity"]["up_sparsity"], abs=1e-3)
    assert json.loads((out / "training" / "result.json").read_text()) == found
    names = {path.name for path in (out / "training").glob("checkpoint-*")}
    assert names == {"checkpoint-4", "checkpoint-6"}


def test_tuning_with_three_thresholds(tmp_path, called):
    config = cats_ext.calibrate(tiny_model(), tokens(300), rule="three_threshold", sparsity=0.6, progress=False)
    found = tune(tmp_path, config=config, recalibrate=True)
    assert found["recalibrated"]["sparsity"]["input_target"] == pytest.approx(0.36)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for mlp, before in zip(layers_of(model), layers_of(tiny_model()), strict=True):
        assert not torch.equal(mlp.gate_proj.weight, before.gate_proj.weight)  # the adapter there has learnt
    stored = layers_of(model)[0].cats.config
    assert stored.rule == "three_threshold" and stored.layers == config.layers
    assert stored.input_thresholds != config.input_thresholds
    called.clear()
    logits(model, few()[:, :4])
    assert set(called) == {"sparse_mlp_columns"}


def test_killed_while_it_writes_a_checkpoint_it_goes_on_with_the_same_loss(
    run, model_dir, text_file, tmp_path, monkeypatch
):
    write = Trainer._save_rng_state

    def killed(self, directory):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        write(self, directory)

    monkeypatch.setattr(Trainer, "_save_rng_state", killed)
    command = ("finetune", model_dir, "--text", text_file, "-o", tmp_path, *OPTIONS)
    assert cats(*command).exit_code != 0
    assert (tmp_path / "training" / "checkpoint-4").is_dir()  # half of one
    assert last_checkpoint(tmp_path / "training").name == "checkpoint-2"
    monkeypatch.undo()
    found = json_of(*command)
    assert found["resumed_from"] == "checkpoint-2"
    assert found["loss"] == run[1]["loss"] and found["after"] == run[1]["after"]
    again = json_of(*command)  # finished: nothing left to do, and the same model
    assert again["resumed_from"] == "checkpoint-6" and again["after"] == found["after"]
    assert again["loss"] == found["loss"]


def test_recalibrated_thresholds_reach_their_target(thresholds, model_dir, text_file, tmp_path):
    options = ("--cats", thresholds, "--sparsity", 0.7, "--recalibrate", "--gradient-checkpointing", "--full")
    result = cats("finetune", model_dir, "--text", text_file, "-o", tmp_path, *options, *OPTIONS)
    assert result.exit_code == 0, result.stderr
    assert "recalibrated" in result.stdout and f"cats eval {tmp_path}" in result.stdout
    found = json.loads((tmp_path / "training" / "result.json").read_text())
    assert found["settings"]["sparsity"] == 0.7 and found["settings"]["lora_rank"] == 0
    before, after = (found[name]["sparsity"] for name in ("after", "recalibrated"))
    assert abs(after["up_sparsity"] - 0.7) < 0.05 and after["up_target"] == before["up_target"] == pytest.approx(0.7)
    saved, first = (cats_ext.CatsConfig.from_pretrained(path) for path in (tmp_path, tmp_path / "training/thresholds"))
    assert saved.rule == first.rule == "plain"
    assert not any(torch.equal(saved.thresholds[name], first.thresholds[name]) for name in first.thresholds)


def test_tensorboard_has_the_loss_of_every_step(model_dir, text_file, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = [option for option in OPTIONS if option not in ("--report-to", "none")]  # what is installed is used
    found = json_of("finetune", model_dir, "--text", text_file, "-o", tmp_path, "--method", "dense", *options)
    (directory,) = (tmp_path / "training" / "runs").iterdir()
    events = event_accumulator.EventAccumulator(str(directory)).Reload()
    logged = [[event.step, event.value] for event in events.Scalars("train/loss")]
    assert logged == [[step, pytest.approx(loss, rel=1e-6)] for step, loss in found["loss"]] and len(logged) == STEPS
    assert len(events.Scalars("train/learning_rate")) == STEPS


def test_thresholds_are_set_anew_without_tuning_again(tmp_path):
    settings = FinetuneSettings(**(vars(SETTINGS) | {"learning_rate": 0.05}))  # enough for the sparsity to drift
    first = tune(tmp_path, settings)
    again = tune(tmp_path, settings, recalibrate=True)
    assert again["resumed_from"] == "checkpoint-6" and again["loss"] == first["loss"]
    assert again["after"] == first["after"] and first["recalibrated"] is None
    assert again["recalibrated"]["sparsity"]["drift"] < again["after"]["sparsity"]["drift"] / 2
    before, after = (
        cats_ext.CatsConfig.from_pretrained(path).thresholds for path in (tmp_path / "training/thresholds", tmp_path)
    )
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", ["relufication", "dense"])
def test_other_methods(method, tmp_path, called):
    found = tune(tmp_path, FinetuneSettings(**(vars(SETTINGS) | {"method": method, "steps": 2})))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert found["after"]["nll"] < found["before"]["nll"] + 1
    called.clear()
    logits(model, few())
    if method == "dense":
        assert not called and found["after"]["sparsity"] is None and model.config.hidden_act == "silu"
    else:
        assert set(called) == {"sparse_mlp"} and model.config.hidden_act == "relu"
        assert 0.2 < found["after"]["sparsity"]["up_sparsity"] < 0.8


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_relufied_for_good(family, tmp_path):
    model = relufy(tiny_model(family))
    torch.testing.assert_close(
        logits(model, few()), logits(cats_ext.apply_relufication(tiny_model(family)), few()), rtol=1e-4, atol=1e-4
    )
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path), few()), logits(model, few()))


# --- errors ---------------------------------------------------------------------------------------------------------


def test_text_of_a_dataset(run, model_dir, text_file, tmp_path):
    """A directory, which the package reads as it does what is on the hub."""
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    words = text_file.read_text().split()
    rows = [{"text": " ".join(words[i : i + 100]) + " "} for i in range(0, len(words), 100)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ("finetune", model_dir, "-o", tmp_path / "out", "--method", "dense", *OPTIONS)
    found = json_of(*command, "--dataset", tmp_path / "data")
    assert found["held_out_tokens"] == run[1]["held_out_tokens"] and len(found["loss"]) == STEPS
    few = ("--dataset", tmp_path / "data", "--rows", 5)
    assert "holds a tuning with data '" in error_of(*command, *few)
    (tmp_path / "data" / "train.jsonl").write_text('{"content": "a"}')
    assert "must have texts in a field 'text', got the fields content" in error_of(*command, *few)
    assert "cannot be loaded (" in error_of(*command, "--dataset", tmp_path / "nowhere")


@pytest.mark.parametrize("what", ["the loss", "the norm of the gradients"])
def test_nan_stops_and_keeps_the_last_good_checkpoint(what, tmp_path, monkeypatch):
    step = Trainer.training_step

    def spoiled(self, model, *arguments, **named):
        loss = step(self, model, *arguments, **named)
        if self.state.global_step == 3:
            if what == "the loss":
                return loss * float("nan")
            next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(Trainer, "training_step", spoiled)
    with pytest.raises(TrainingStoppedError, match=rf"{what} is nan at step 4: .*checkpoint-2.* than 0.01 helps"):
        tune(tmp_path)
    monkeypatch.undo()
    assert tune(tmp_path)["resumed_from"] == "checkpoint-2"


def test_a_model_that_the_last_step_broke_is_not_saved(tmp_path):
    settings = FinetuneSettings(**(vars(SETTINGS) | {"method": "dense", "steps": 1, "learning_rate": 1e300}))
    with pytest.raises(TrainingStoppedError, match=r"held-out text is nan after the tuning.* than 1e\+300 helps"):
        tune(tmp_path, settings)
    assert [path.name for path in tmp_path.iterdir()] == ["training"]


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_at_a_checkpoint_and_at_the_end(tmp_path, monkeypatch):
    settings = FinetuneSettings(**(vars(SETTINGS) | {"method": "dense", "steps": 2}))
    save = Trainer._save_optimizer_and_scheduler

    def second_fails(self, directory):
        (no_space if directory.endswith("checkpoint-2") else save)(self, directory)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", second_fails)
    with pytest.raises(OSError, match=r"of step 2 cannot be written.*No space left.*checkpoint-1; call again"):
        tune(tmp_path, settings, save_every=1)
    assert not (tmp_path / "training" / "checkpoint-2").exists()
    monkeypatch.undo()
    monkeypatch.setattr("cats_ext.finetune.run.write_together", no_space)
    with pytest.raises(OSError, match=r"tuned model cannot be written to .*No space left.*checkpoint-2, is complete"):
        tune(tmp_path, settings, save_every=1)
    monkeypatch.undo()
    assert tune(tmp_path, settings, save_every=1)["resumed_from"] == "checkpoint-2"


def test_a_tuning_with_other_settings_is_not_gone_on_with(run, model_dir, text_file, tmp_path):
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    command = ("finetune", model_dir, "--text", text_file, "-o", tmp_path, *OPTIONS)
    assert "holds a tuning with method 'cats', got method 'dense'" in error_of(*command, "--method", "dense")
    assert "holds a tuning with steps 6, got steps 7" in error_of(*command, "--steps", 7)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    (tmp_path / "training" / "settings.json").write_text("{")
    assert "is not what finetune wrote" in error_of(*command)
    (tmp_path / "training" / "settings.json").unlink()
    (tmp_path / "config.json").unlink()
    assert "is not empty and holds no tuning" in error_of(*command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lora-targets", "q_proj,c_attn"), "--lora-targets must be linear modules of LlamaForCausalLM, down_proj, "),
        (("--method", "dense", "--sparsity", "0.5"), "--sparsity 0.5 is for --method cats, got --method dense"),
        (("--method", "dense", "--recalibrate"), "--recalibrate is for method 'cats', got method 'dense'"),
        (("--full", "--lora-targets", "q_proj"), "give --full or --lora-targets"),
        (("--sparsity", "1"), "sparsity must be"),
        (("--dataset", "some/set"), "give --text or --dataset, got --text"),
        (("--lora-targets", ""), "v_proj, got ''"),
        (("--report-to", "nosuch"), "--report-to must be one of those installed, "),
        (("--learning-rate", "nan"), "--learning-rate must be positive and finite, got nan"),
        (("--sequence-length", "400", "--text", "missing.txt"), "--text 'missing.txt' does not exist"),
    ],
    ids=str,
)
def test_bad_options(options, message, model_dir, text_file, tmp_path):
    assert message in error_of("finetune", model_dir, "--text", text_file, "-o", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["accelerate", "peft"])
def test_missing_package_is_named_before_anything_is_computed(package, model_dir, text_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    error = error_of("finetune", model_dir, "--text", text_file, "-o", tmp_path / "out")
    assert f"fine-tuning needs the package {package}" in error and "pip install 'cats_ext[finetune]'" in error
    assert not (tmp_path / "out" / "training").exists()


def test_no_model_is_overwritten(model_dir, text_file):
    before = {path: path.stat().st_mtime_ns for path in model_dir.rglob("*")}
    assert "holds a model, which would be over" in error_of("finetune", model_dir, "--text", text_file, "-o", model_dir)
    assert before == {path: path.stat().st_mtime_ns for path in model_dir.rglob("*")}


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])
def test_bfloat16(rank, tmp_path):
    settings = FinetuneSettings(**(vars(SETTINGS) | {"steps": 2, "lora_rank": rank}))
    model = tiny_model(dtype=torch.bfloat16)
    found = finetune(model, tokens(LENGTH * 12), tmp_path, settings, progress=False)
    assert all(torch.tensor(loss).isfinite() for _, loss in found["loss"]) and len(found["loss"]) == 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16 and isinstance(layers_of(loaded)[0], CatsMLP)
    tuned, start = model.state_dict(), tiny_model(dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(value, tuned[name]) for name, value in loaded.state_dict().items())
    assert not torch.equal(tuned["model.layers.0.mlp.down_proj.weight"], start["model.layers.0.mlp.down_proj.weight"])


def test_too_little_text(tmp_path):
    with pytest.raises(ValueError, match=r"data must fill at least 2 windows of 400 tokens, got 576 tokens"):
        tune(tmp_path, FinetuneSettings(sequence_length=400))
