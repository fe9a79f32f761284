"""transformers' Trainer for :mod:`cats_ext.finetune`: complete checkpoints, and a stop at NaN and infinities."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cats_ext.finetune.settings import FinetuneSettings

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback


class TrainingStoppedError(RuntimeError):
    """The loss or a gradient is NaN or infinite. The message names the step and the last complete checkpoint."""


def check_integrations(report_to: tuple[str, ...]) -> None:
    """Raise ValueError unless Trainer can report to all of them: it finds out when the training starts."""
    if report_to:
        from transformers.integrations.integration_utils import get_available_reporting_integrations

        possible = [*get_available_reporting_integrations(), "all", "none"]
        for name in report_to:
            if name not in possible:
                raise ValueError(f"report_to must be one of those installed, {', '.join(possible)}, got {name!r}")


def last_checkpoint(training: Path) -> Path | None:
    """The newest complete checkpoint in ``training``; None if there is none."""
    complete = [path for path in training.glob("checkpoint-*") if _is_complete(path)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    try:  # written last, so an interrupted checkpoint has none, or a part of one
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return checkpoint.name.rpartition("-")[2].isdigit()


def make_trainer(
    model: nn.Module,
    windows: list[Tensor],
    training: Path,
    settings: FinetuneSettings,
    save_every: int,
    report_to: tuple[str, ...],
    advance: Callable[[], None],
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """A Trainer on ``windows`` of equal length; its ``train_on()`` trains from the last checkpoint in ``training``.

    Incomplete checkpoints there are removed. On CUDA, float32 weights are trained in bfloat16 autocast.

    Args:
        windows: token ids, ``[T]`` each.
        training: where checkpoints and logs are written.
        save_every: steps between checkpoints.
        report_to: Trainer's integrations.
        advance: called after every step, and for each step of the checkpoint at the start.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

    for path in training.glob("checkpoint-*"):
        if not _is_complete(path):
            shutil.rmtree(path)

    def check(what: str, value: Tensor, step: int) -> None:
        if not torch.isfinite(value):
            kept = last_checkpoint(training)
            raise TrainingStoppedError(
                f"{what} is {value.item()} at step {step}: tuning is stopped, and the last complete checkpoint is "
                f"{kept or 'none, since none has been written yet'}. Most often a lower learning rate than "
                f"{settings.learning_rate} helps"
            )

    class Checked(Trainer):
        def train_on(self) -> Path | None:
            """Train from the last complete checkpoint, which is returned; only load it if it is the last step's."""
            last = last_checkpoint(training)
            state = last and TrainerState.load_from_json(str(last / "trainer_state.json"))
            if state is not None and state.global_step >= self.args.max_steps:  # train() would do one step more
                self._load_from_checkpoint(str(last))
                self.state = state
            else:
                self.train(resume_from_checkpoint=last and str(last))
            return last

        def training_step(self, *arguments: Any, **named: Any) -> Tensor:
            loss = super().training_step(*arguments, **named)
            check("the loss", loss, self.state.global_step + 1)
            return loss

        def _save_checkpoint(self, *arguments: Any, **named: Any) -> None:
            path = training / f"checkpoint-{self.state.global_step}"
            try:
                super()._save_checkpoint(*arguments, **named)
            except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
                if not _is_complete(path):
                    shutil.rmtree(path, ignore_errors=True)
                raise OSError(
                    f"the checkpoint of step {self.state.global_step} cannot be written to {path}: {error}. The last "
                    f"complete one is {last_checkpoint(training) or 'none'}; call again with the same arguments to "
                    "continue"
                ) from error

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            for _step in range(state.global_step):
                advance()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            check("the norm of the gradients", torch.nn.utils.get_total_norm(gradients), state.global_step + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            advance()

    weights = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    on_cuda = weights.is_cuda
    arguments = TrainingArguments(
        output_dir=str(training),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.steps // 20,
        seed=settings.seed,
        bf16=on_cuda and weights.dtype == torch.float32,
        use_cpu=not on_cuda,
        dataloader_pin_memory=on_cuda,
        dataloader_drop_last=len(windows) >= settings.batch_size,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(report_to),
        disable_tqdm=True,
        **({"gradient_checkpointing": True} if settings.gradient_checkpointing else {}),  # deprecated, but in all of v5
    )
    if on_cuda:
        arguments._n_gpu = 1  # the device that the model is on, not DataParallel over all
    trainer = Checked(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": window, "labels": window} for window in windows],
        callbacks=[Watch(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)  # prints to standard output
    return trainer
