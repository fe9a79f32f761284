"""Tiny CATS checkpoints to alter, and what a model computes with them: logits, and thresholds at other sparsities."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from support.models import tiny_model, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cats_ext import CatsConfig, apply_cats, calibrate, remove_cats, set_sparsity
from cats_ext.patching.apply import sparse_mlps
from cats_ext.thresholds import config as config_module

SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2)
OTHER_SPARSITIES = (0.3, 0.8)
_FEW, _MANY = tokens(4, seed=1)[None], tokens(24, seed=2)[None]

Signature = list[Tensor]


@torch.no_grad()
def logits(model: nn.Module) -> Signature:
    """For as few tokens as the kernel takes, and for a prompt."""
    return [model(input_ids=ids).logits for ids in (_FEW, _MANY)]


def signature(model: nn.Module) -> Signature:
    """Everything that loaded thresholds decide. The model of the signature is left at another sparsity."""
    found = logits(model)
    for sparsity in OTHER_SPARSITIES if sparse_mlps(model) else ():
        set_sparsity(model, sparsity)
        found += [buffer.clone() for module in sparse_mlps(model).values() for buffer in module.buffers(recurse=False)]
    return found


def equal(a: Signature, b: Signature) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Checkpoint:
    """A directory that ``save_pretrained`` of a patched model wrote, its dense model, and what loading it gives."""

    directory: Path
    model: nn.Module
    expected: Signature

    @property
    def cats_files(self) -> list[str]:
        """Names of the files that belong to the thresholds."""
        return sorted(path.name for path in self.directory.iterdir() if path.name.startswith("cats_"))

    def copy_to(self, directory: Path, weights: bool = True) -> None:
        """Its files; without ``weights`` those of the thresholds only."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for path in self.directory.iterdir():
            if weights or path.name.startswith("cats_"):
                shutil.copyfile(path, directory / path.name)


@dataclass(frozen=True)
class Checkpoints:
    """Of one shape: the one to alter by each kind of thresholds, another model's, and that model saved densely."""

    by_rule: dict[str, Checkpoint]
    other: Checkpoint
    dense: Checkpoint


def make_checkpoints(directory: Path) -> Checkpoints:
    def make(name: str, seed: int, **arguments: Any) -> Checkpoint:
        model = tiny_model(seed=seed, **SIZES)
        config = calibrate(model, tokens(300), sequence_length=100, progress=False, **arguments)
        apply_cats(model, config).save_pretrained(directory / name)
        expected = signature(model)
        return Checkpoint(directory / name, remove_cats(model), expected)

    searched = {"budget": 0.6, "allocation": "search"}
    by_rule = {
        "searched": make("searched", 0, **searched),
        "two_threshold": make("two_threshold", 0, sparsity=0.5, rule="two_threshold", gate_power=0.5),
        "three_threshold": make("three_threshold", 0, sparsity=0.5, rule="three_threshold"),
        "plain": make("plain", 0, sparsity=0.5, rule="plain"),
    }
    other = make("other", 1, **searched)
    other.model.save_pretrained(directory / "dense")
    dense = Checkpoint(directory / "dense", other.model, logits(other.model))
    return Checkpoints(by_rule, other, dense)


def load_config_door(directory: Path, model: nn.Module) -> Signature:
    """The signature of dense ``model`` with the thresholds in ``directory``; the model is dense again afterwards."""
    config = CatsConfig.from_pretrained(directory)
    try:
        return signature(apply_cats(model, config))
    finally:
        if sparse_mlps(model):
            remove_cats(model)


def load_transformers_door(directory: Path) -> Signature:
    return signature(AutoModelForCausalLM.from_pretrained(directory))


def forge(directory: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Let ``edit`` change the JSON document and the tensors in ``directory``, with the hashes as if they were right."""
    config = CatsConfig.from_pretrained(directory)
    pack = config_module.pack_files

    def pack_edited(document: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, bytes]:
        document, tensors = copy.deepcopy(document), dict(tensors)
        edit(document, tensors)
        return pack(document, tensors)

    with mock.patch.object(config_module, "pack_files", pack_edited):
        config.save_pretrained(directory)
