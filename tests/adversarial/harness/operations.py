"""The operations that are interrupted line by line, on a tiny model: how each is prepared, and what is seen of it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from adversarial.harness.checkpoints import SIZES, logits
from adversarial.harness.interrupts import FILE_CODE, Operation, State, differences
from support.models import tiny_model, tokens
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from cats_ext import (
    CatsConfig,
    apply_cats,
    calibrate,
    masking_disabled,
    remove_cats,
    set_sparsity,
    track_sparsity,
)
from cats_ext.calibration import checkpoint as calibration_checkpoint
from cats_ext.patching.apply import current_config, sparse_mlps

_CALIBRATION: dict[str, Any] = dict(budget=0.6, allocation="search", sequence_length=100, progress=False)


def model_state(model: nn.Module) -> State:
    """Types, attributes, hooks, settings and tensors of all modules, the config, and what the model computes."""
    state: State = {"config": repr(model.config.to_dict()), "output": logits(model)}
    for name, module in model.named_modules():
        hooks = sum(len(value) for key, value in vars(module).items() if key.endswith("_hooks"))
        settings = repr(vars(module).get("forward_settings"))
        state[f"{name} type"] = (type(module), sorted(vars(module)), hooks, module.training, settings)
        tensors = module._parameters | module._buffers
        state |= {f"{name} {key}": t.detach() for key, t in tensors.items() if t is not None and key != "counts"}
    state["state dict"] = list(model.state_dict())
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}


def config_state(config: CatsConfig) -> State:
    at_other = config.at_sparsity(0.8)
    tensors = [*config.thresholds.values(), *config.down_thresholds.values(), *at_other.thresholds.values()]
    return {"facts": repr(config.to_dict()), "thresholds": tensors}


class Workplace:
    """A model with its config, a second one of the same shape, and directories with what both were saved as."""

    def __init__(self, directory: Path) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.directory = directory
        self.target = directory / "target"
        self.model = tiny_model(seed=0, **SIZES)
        self.text = tokens(300)
        self.config = calibrate(self.model, self.text, **_CALIBRATION)
        other = tiny_model(seed=1, **SIZES)
        self.other_config = calibrate(other, self.text, **_CALIBRATION)
        other.save_pretrained(directory / "other dense")
        apply_cats(other, self.other_config).save_pretrained(directory / "other")
        self.other_config.save_pretrained(directory / "other config")

    def dense(self) -> None:
        if sparse_mlps(self.model):
            remove_cats(self.model)

    def patched(self) -> None:
        self.dense()
        apply_cats(self.model, self.config)

    def fresh(self, like: str | None = None) -> None:
        """The target directory is empty, or a copy of another."""
        shutil.rmtree(self.target, ignore_errors=True)
        self.was_empty = like is None
        if like is None:
            self.target.mkdir()
        else:
            shutil.copytree(self.directory / like, self.target)

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.target)) for path in self.target.rglob("*"))

    # --- runs with something to check in their midst ------------------------------------------------------------------

    def run_masking_disabled(self) -> None:
        with masking_disabled(self.model):
            logits(self.model)

    def run_track_sparsity(self) -> None:
        with track_sparsity(self.model):
            logits(self.model)

    def apply(self) -> None:
        self.dense()
        apply_cats(self.model, self.config)

    def remove(self) -> None:
        if sparse_mlps(self.model):
            remove_cats(self.model)

    def calibrate(self) -> None:
        with _checkpoint_at_once():
            found = calibrate(self.model, self.text, checkpoint=self.target / "checkpoint", **_CALIBRATION)
        self.found = config_state(found)

    # --- what is seen of directories ----------------------------------------------------------------------------------

    def saved_config(self) -> State:
        try:
            found = config_state(CatsConfig.from_pretrained(self.target))
        except FileNotFoundError:
            found = {"missing": True}
        return found | {"files": self.files()}

    def saved_model(self) -> State:
        """What the directory loads as, and that the model is as it was."""
        try:
            loaded = AutoModelForCausalLM.from_pretrained(self.target)
        except (OSError, ValueError):
            if not self.was_empty:
                raise
            found: State = {"not loaded": True}  # incomplete, where nothing was before
        else:
            found = {"loaded": logits(loaded), "patched": len(sparse_mlps(loaded)), "files": self.files()}
            if sparse_mlps(loaded):
                found |= config_state(current_config(loaded))
        return found | {f"model {key}": value for key, value in model_state(self.model).items()}

    # --- all ----------------------------------------------------------------------------------------------------------

    def operations(self) -> Iterator[Operation]:
        model = self.model
        see_model = lambda: model_state(model)  # noqa: E731
        yield Operation("apply_cats", self.dense, self.apply, see_model)
        yield Operation("remove_cats", self.patched, self.remove, see_model)
        yield Operation("set_sparsity", self.patched, lambda: set_sparsity(model, 0.8), see_model)
        yield Operation("masking_disabled", self.patched, self.run_masking_disabled, see_model)
        self.patched()
        track_sparsity(model)
        on = see_model()  # an interrupt between the call and the entry of the context is as after the call
        may_be_on = lambda state: not differences(state, on)  # noqa: E731
        as_context = ("track_sparsity as a context", self.patched, self.run_track_sparsity, see_model)
        yield Operation(*as_context, may_be=may_be_on)
        yield Operation("track_sparsity", self.patched, lambda: track_sparsity(model), see_model)
        for like in ("other config", None):
            where = "over another config" if like else "into an empty directory"
            yield Operation(
                f"config.save_pretrained {where}",
                lambda like=like: self.fresh(like),
                lambda: self.config.save_pretrained(self.target),
                self.saved_config,
                FILE_CODE,
            )
        for like in ("other", "other dense", None):

            def prepare(like: str | None = like) -> None:
                self.patched()
                self.fresh(like)

            yield Operation(
                f"model.save_pretrained {'into an empty directory' if like is None else f'over the {like} checkpoint'}",
                prepare,
                lambda: model.save_pretrained(self.target),
                self.saved_model,
                FILE_CODE,
            )

        def prepare_calibration() -> None:
            self.dense()
            self.fresh()
            self.found: State = {}

        def see_calibration() -> State:
            files = [name for name in self.files() if name != "checkpoint"]
            return see_model() | self.found | {"files": files}

        yield Operation("calibrate", prepare_calibration, self.calibrate, see_calibration)


def _checkpoint_at_once() -> contextlib.AbstractContextManager:
    """Inside, calibration writes its checkpoint after every batch."""
    return mock.patch.object(calibration_checkpoint, "_SECONDS", 0.0)
