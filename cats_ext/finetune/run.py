"""finetune: tunes a sparse, a ReLUfied or a dense model on text with transformers' Trainer, resumable at any time.

OUTPUT/training holds the settings, the thresholds, Trainer's checkpoints and its logs; the tuned model, with merged
adapters, is written to OUTPUT itself. A checkpoint is complete if its ``trainer_state.json`` is: it is written last.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cats_ext._inputs import check_integer, check_token_ids
from cats_ext._progress import progress_bar
from cats_ext.calibration.run import calibrate
from cats_ext.data.windows import collect_windows
from cats_ext.evaluation.comparison import perplexity
from cats_ext.finetune.settings import FinetuneSettings, check_continues, facts_of
from cats_ext.finetune.trainer import TrainingStoppedError, check_integrations, last_checkpoint, make_trainer
from cats_ext.patching.apply import (
    apply_cats,
    apply_relufication,
    current_config,
    find_dense_mlps,
    remove_cats,
    sparse_mlps,
)
from cats_ext.patching.detection import ACTIVATION_NAMES
from cats_ext.patching.tracking import reset_sparsity, sparsity_report, track_sparsity
from cats_ext.quantization import quantized_linears
from cats_ext.thresholds.config import CatsConfig
from cats_ext.thresholds.files import CONFIG_FILE, write_together

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

_HELD_OUT = 8  # windows at most, and a tenth of all at most, are kept for measuring and not trained on


def finetune(
    model: PreTrainedModel,
    data: Any,
    output_dir: str | os.PathLike,
    settings: FinetuneSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: CatsConfig | None = None,
    recalibrate: bool = False,
    save_every: int = 50,
    report_to: tuple[str, ...] = (),
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Tune ``model`` in place on ``data`` and write it, with adapters merged, to ``output_dir``.

    After an interruption, a call with equal arguments continues from the last complete checkpoint, with the same losses
    as without the interruption. A patched model is saved as a CATS checkpoint, which ``from_pretrained`` loads patched;
    a ReLUfied one too, with ReLU as the activation in its config.

    Args:
        model: a dense causal language model of transformers with gated MLPs, on one device.
        data: as for :func:`cats_ext.calibrate`; windows shorter than ``sequence_length`` are left out. The last windows
            are not trained on: perplexity and sparsity are measured on them.
        settings: by default a LoRA tuning of 400 steps at 50 % sparsity.
        tokenizer: needed for texts; saved beside the model.
        config: thresholds for method "cats"; without them the model is calibrated on the data at ``sparsity``.
        recalibrate: calibrate again after the tuning, to the same target in every layer.
        save_every: steps between checkpoints, of which the last two are kept.
        report_to: Trainer's integrations, such as "tensorboard" or "trackio".
        callbacks: transformers' TrainerCallback objects, for instance to measure during the tuning.
        progress: show bars with the time left on standard error.

    Returns:
        Plain numbers: ``before`` and ``after`` (perplexity on the held-out windows and the sparsity reached there, at
        unchanged thresholds), ``recalibrated`` likewise or None, ``loss`` by step, ``resumed_from``.

    Raises:
        TypeError, ValueError: an argument is out of its range, there is too little data, a LoRA target does not exist,
            the model is quantised, or ``output_dir`` holds a tuning with other settings.
        TrainingStoppedError: the loss or a gradient became NaN or infinite; the checkpoints before it are kept. Or the
            tuned model's loss is; it is not saved.
        OSError: a file cannot be written; the checkpoints before it are kept.
        ImportError: LoRA without the package peft, or training without accelerate.
    """
    settings = settings or FinetuneSettings()
    check_integer("save_every", save_every, 1)
    _check_packages(settings)
    check_integrations(report_to)
    if config is not None and settings.method != "cats":
        raise ValueError(f"config is for method 'cats', got method {settings.method!r}")
    if recalibrate and settings.method != "cats":
        raise ValueError(f"recalibrate is for method 'cats', got method {settings.method!r}")
    find_dense_mlps(model)
    if quantized_linears(model):
        raise ValueError(
            f"model of class {type(model).__name__} is quantised, and packed rows cannot be tuned: tune the dense one"
        )
    train, held_out, length = _windows(model, data, tokenizer, settings)
    if settings.lora_rank:
        _check_targets(model, settings.lora_targets)
    output = Path(output_dir)
    training = output / "training"
    check_continues(training, facts_of(model, train, held_out, settings, config))
    ids = torch.cat(held_out)
    run = {"batch_size": settings.batch_size, "progress": progress}
    measure = partial(_measure, model, ids, window=length, **run)
    calibrate_on_train = partial(calibrate, model, train, sequence_length=length, seed=settings.seed, **run)

    if settings.method == "cats":
        directory = training / "thresholds"  # those that the tuning began with
        if (directory / CONFIG_FILE).is_file():
            config = CatsConfig.from_pretrained(directory)
        else:
            counts = training / "calibration"  # what an interrupted calibration continues from
            config = config or calibrate_on_train(sparsity=settings.sparsity, checkpoint=counts)
            config.save_pretrained(directory)
            counts.unlink(missing_ok=True)
        apply_cats(model, config)
    elif settings.method == "relufication":
        relufy(model)
    before = measure()
    tuned = _with_adapters(model, settings)
    with progress_bar(f"tuning, {settings.method}", settings.steps, progress) as advance:
        trainer = make_trainer(tuned, train, training, settings, save_every, report_to, advance, callbacks)
        resumed_from = trainer.train_on()
    if settings.lora_rank:
        tuned.merge_and_unload()
    model.requires_grad_(True).eval()
    after, recalibrated = measure(), None
    if not math.isfinite(after["nll"]):
        raise TrainingStoppedError(
            f"the loss on the held-out text is {after['nll']} after the tuning: the model is not saved. Most often a "
            f"lower learning rate than {settings.learning_rate} helps"
        )
    if recalibrate:
        _recalibrate(model, calibrate_on_train)
        recalibrated = measure()
    result = {
        "output": str(output),
        "settings": asdict(settings),
        "resumed_from": resumed_from and resumed_from.name,
        "held_out_tokens": ids.numel(),
        "before": before,
        "after": after,
        "recalibrated": recalibrated,
        "loss": [[row["step"], row["loss"]] for row in trainer.state.log_history if "loss" in row],
    }
    _save(model, tokenizer, output, training, result)
    return result


def relufy(model: PreTrainedModel) -> PreTrainedModel:
    """As :func:`cats_ext.apply_relufication`, and permanent: the modules and the model's config have ReLU.

    ``remove_cats`` then gives a dense ReLU model, and a saved checkpoint loads as one.

    Returns:
        ``model``.

    Raises:
        ValueError: as there, or the model's config does not name its activation.
    """
    names = [name for name in ("hidden_act", "hidden_activation") if getattr(model.config, name, None) is not None]
    if not names:
        raise ValueError(f"the config of {type(model).__name__} has neither hidden_act nor hidden_activation")
    config = current_config(apply_relufication(model))
    remove_cats(model)
    for mlp in find_dense_mlps(model):
        setattr(mlp.module, next(name for name in ACTIVATION_NAMES if hasattr(mlp.module, name)), nn.ReLU())
    for name in names:
        setattr(model.config, name, "relu")
    return apply_cats(model, config)


def _windows(
    model: nn.Module, data: Any, tokenizer: Any, settings: FinetuneSettings
) -> tuple[list[Tensor], list[Tensor], int]:
    """Windows to train on, windows to measure on, and their length."""
    length = min(settings.sequence_length, getattr(model.config, "max_position_embeddings", None) or sys.maxsize)
    windows = collect_windows(data, tokenizer, length, sys.maxsize, settings.seed)
    tokens = sum(len(window) for window in windows)
    windows = [window for window in windows if len(window) == length]
    if len(windows) < 2:
        raise ValueError(f"data must fill at least 2 windows of {length} tokens, got {tokens} tokens")
    check_token_ids("data", torch.cat(windows), model)
    held_out = max(1, min(_HELD_OUT, len(windows) // 10))
    return windows[:-held_out], windows[-held_out:], length


def _check_packages(settings: FinetuneSettings) -> None:
    for package in ("accelerate", *(("peft",) if settings.lora_rank else ())):
        try:
            import_module(package)
        except ImportError as error:
            hint = f"fine-tuning needs the package {package}: pip install 'cats_ext[finetune]' ({error})"
            raise ImportError(hint) from error


def _check_targets(model: nn.Module, targets: tuple[str, ...] | None) -> None:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets or ():
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            have = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ValueError(f"lora_targets must be linear modules of {type(model).__name__}, {have}, got {target!r}")


def _with_adapters(model: PreTrainedModel, settings: FinetuneSettings) -> nn.Module:
    if not settings.lora_rank:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(settings.seed)
    targets = "all-linear" if settings.lora_targets is None else list(settings.lora_targets)
    adapters = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=targets, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, adapters)


def _measure(model: nn.Module, ids: Tensor, **options: Any) -> dict[str, Any]:
    """Perplexity, with ``options`` of :func:`perplexity`, and of a patched model the sparsity reached."""
    patched = bool(sparse_mlps(model))
    if patched:
        reset_sparsity(model)
    with track_sparsity(model) if patched else nullcontext():
        found = perplexity(model, ids, **options)
    sparsity = None
    if patched:
        report = sparsity_report(model)
        sparsity = report.to_dict() | {"drift": max(layer.drift for layer in report.layers)}
        reset_sparsity(model)
    return {"ppl": found.ppl, "nll": found.nll, "sparsity": sparsity}


def _recalibrate(model: nn.Module, calibrate_on_train: Callable[..., CatsConfig]) -> None:
    """Set new thresholds by the same rule for the same targets, layer by layer."""
    old = current_config(model)
    same = {key: getattr(old, key) for key in ("rule", "gate_power", "last_gate_power", "importance")}
    remove_cats(model)
    new = calibrate_on_train(allocation="uniform", **same)
    new = new.with_targets({name: layer.split for name, layer in old.layers.items()}, old.sparsity)
    apply_cats(model, replace(new, sparse_prefill=old.sparse_prefill))


def _save(model: PreTrainedModel, tokenizer: Any, output: Path, training: Path, result: dict[str, Any]) -> None:
    try:
        model.save_pretrained(output)
        if tokenizer is not None:
            tokenizer.save_pretrained(output)
        write_together({training / "result.json": (json.dumps(result, indent=2) + "\n").encode()})
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the tuned model cannot be written to {output}: {error}. The last checkpoint, "
            f"{last_checkpoint(training)}, is complete: call again with the same arguments when there is space"
        ) from error
