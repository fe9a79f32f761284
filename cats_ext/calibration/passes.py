"""Runs token ids through the dense model and passes each MLP's activations, and gradients if wanted, to an observer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cats_ext._inputs import evaluation_mode, hooked, input_device
from cats_ext._progress import progress_bar
from cats_ext.parallel.ranks import Failure
from cats_ext.parallel.sharding import group_of
from cats_ext.patching.detection import MERGED, SEPARATE, GatedMLP

_CHUNK = 1 << 20  # probabilities that are summed at a time

Observer = Callable[..., None]
"""Gets an MLP and its gate and up projections of a batch, each ``[T, I]``; if wanted also its input ``[T, H]``."""
GradientObserver = Callable[[GatedMLP, Tensor, Tensor, Tensor], None]
"""As an Observer, and the gradient at the MLP's output, ``[T, H]``."""


def run_pass(
    model: nn.Module,
    mlps: list[GatedMLP],
    batches: list[Tensor],
    observe: Observer,
    *,
    inputs: bool = False,
    **options: Any,
) -> None:
    """Run batches of token ids, ``[B, T]`` each, without gradients.

    Args:
        model: dense.
        mlps: those of its MLPs that are observed.
        inputs: give their inputs to ``observe`` too; not of experts.
        options: ``title`` of a progress bar, and whether it is shown (``progress``); number of the batch to ``start``
            at; a function that is called ``after`` every batch with the number of batches done.

    Raises:
        ValueError: from ``observe``, with the MLP's name before it; on all ranks of a tensor-parallel model, after the
            batch.
    """

    # The decoder alone, where there is one: the logits of a window can be larger than all activations.
    backbone = model.base_model if _is_transformers(model) else model
    failure = Failure(group_of(model))
    caught = partial(_projections_caught, inputs=inputs)
    hooks = [(_experts_caught if mlp.experts else caught)(mlp, observe, failure) for mlp in mlps]
    _run_batches(model, batches, hooks, lambda number, ids: backbone(**ids), failure, **options)


def has_gradients(model: nn.Module) -> bool:
    """Whether a gradient pass can run: the model predicts tokens, and autograd takes its weights."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head is not None and not any(parameter.is_inference() for parameter in model.parameters())


def run_gradient_pass(
    model: nn.Module,
    mlps: list[GatedMLP],
    batches: list[Tensor],
    observe: GradientObserver,
    *,
    seed: int,
    **options: Any,
) -> None:
    """As :func:`run_pass`, with the gradient of ``log p(y)`` by each MLP's output, every y drawn from the model itself.

    The second moment of that gradient is the Fisher information: a change d of an MLP's output at one position moves
    the model's predictions by a Kullback-Leibler divergence of about ``(gradient . d)^2 / 2``. Holds the activations
    of one batch in memory, as training does, without gradients of weights.
    """

    def step(number: int, ids: dict[str, Any]) -> None:
        logits = model(**ids).logits.flatten(0, -2)
        # Random numbers from the CPU, seeded by the batch: equal on every device and after an interruption.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        uniform = torch.rand(len(logits), generator=generator, dtype=torch.float64)
        logits.backward(_gradient_of_draws(logits.detach(), uniform.to(logits.device)))

    failure = Failure(group_of(model))
    hooks = [_frozen(model), *(_gradient_caught(mlp, observe, failure) for mlp in mlps), torch.enable_grad()]
    _run_batches(model, batches, hooks, step, failure, **options)


def _run_batches(
    model: nn.Module,
    batches: list[Tensor],
    hooks: list[AbstractContextManager],
    step: Callable[[int, dict[str, Any]], object],
    failure: Failure,
    *,
    title: str = "",
    progress: bool = False,
    start: int = 0,
    after: Callable[[int], None] = lambda done: None,
) -> None:
    """Inside all ``hooks``, call ``step`` with the number and the model's arguments of each batch from ``start`` on.

    What the hooks have kept in ``failure`` is raised after each.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        advance = stack.enter_context(progress_bar(title, len(batches), progress))
        for hook in hooks:
            stack.enter_context(hook)
        for number, batch in enumerate(batches):
            if number >= start:
                step(number, {"input_ids": batch.to(input_device(model)), **_options(model)})
                failure.raise_together()
                after(number + 1)
            advance()


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "base_model_prefix")


def _options(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if _is_transformers(model) else {}


def _gradient_of_draws(logits: Tensor, uniform: Tensor) -> Tensor:
    """The gradient of ``log p(y)`` by ``logits`` ``[T, V]``: one at y, less p. ``uniform`` draws each y from p."""
    gradient = logits.float().softmax(-1)
    rows = max(1, _CHUNK // logits.shape[1])
    for p, u in zip(gradient.split(rows), uniform.split(rows), strict=True):
        cumulative = p.cumsum(-1, dtype=torch.float64)
        y = torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None]).clamp(max=p.shape[1] - 1)
        p.neg_().scatter_add_(1, y, p.new_ones(()).expand_as(y))
    return gradient.to(logits.dtype)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter collects a gradient inside."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def put_back() -> None:
        for parameter in trained:
            parameter.requires_grad_(True)

    try:
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            put_back()
    finally:  # of an interrupt in or right before the first one
        put_back()


@contextmanager
def _observing(mlp: GatedMLP, failure: Failure, part: str = "") -> Iterator[None]:
    """Put the MLP's name before the message of a ValueError; the ranks go on, since the model's layers communicate."""
    with failure.kept():
        try:
            yield
        except ValueError as error:
            raise ValueError(f"activations of {mlp.name}{part}: {error}") from error


@contextmanager
def _projections_caught(mlp: GatedMLP, observe: Observer, failure: Failure, inputs: bool = False) -> Iterator[None]:
    """Inside, the outputs of the MLP's gate and up projections go to ``observe`` together, ``[T, I]`` each.

    With ``inputs`` their input ``[T, H]`` does too.
    """
    names = MERGED[:1] if mlp.merged else SEPARATE[:2]
    outputs: dict[str, Tensor] = {}

    def catch(name: str, x: Tensor, output: Tensor) -> None:
        outputs[name] = output
        if len(outputs) == len(names):
            gate, up = (t.reshape(-1, mlp.neurons) for t in mlp.gate_and_up(outputs))
            outputs.clear()
            with _observing(mlp, failure):
                observe(mlp, gate, up, *((x.reshape(-1, mlp.hidden_size),) if inputs else ()))

    def hook(module: nn.Module, args: tuple, named: dict[str, Any], output: Tensor, name: str) -> None:
        catch(name, args[0] if args else next(iter(named.values())), output)

    hooks = {getattr(mlp.module, name): partial(hook, name=name) for name in names}
    with hooked(nn.Module.register_forward_hook, hooks, with_kwargs=True):
        yield


@contextmanager
def _experts_caught(mlp: GatedMLP, observe: Observer, failure: Failure) -> Iterator[None]:
    """As :func:`_projections_caught`, for each expert with the tokens routed to it; computes the projections again."""

    def catch(module: nn.Module, x: Tensor, experts: Tensor, routing: Tensor) -> None:
        for expert in experts.unique().tolist():
            rows = x[(experts == expert).any(-1)]
            gate, up = F.linear(rows, module.gate_up_proj[expert]).chunk(2, dim=-1)
            with _observing(mlp, failure, f", expert {expert}"):
                observe(mlp, gate, up)

    def hook(module: nn.Module, args: tuple, named: dict[str, Any]) -> None:
        catch(module, *args, *named.values())

    with hooked(nn.Module.register_forward_pre_hook, {mlp.module: hook}, with_kwargs=True):
        yield


@contextmanager
def _gradient_caught(mlp: GatedMLP, observe: GradientObserver, failure: Failure) -> Iterator[None]:
    """Inside, a backward pass gives the projections and the gradient at the MLP's output to ``observe``."""
    caught: list[Tensor] = []

    def keep(_: GatedMLP, gate: Tensor, up: Tensor) -> None:
        caught[:] = gate.detach(), up.detach()
        if not torch.stack([*gate.aminmax(), *up.aminmax()]).isfinite().all():  # else earlier layers would be named
            bad = sum(int((~values.isfinite()).sum()) for values in caught)
            raise ValueError(f"{bad} of {2 * gate.numel()} values are NaN or infinite")

    def open_output(module: nn.Module, args: object, output: Tensor) -> Tensor:
        probe = torch.zeros_like(output, requires_grad=True)
        gate, up = caught

        def deliver(gradient: Tensor) -> None:
            with _observing(mlp, failure):
                observe(mlp, gate, up, gradient.reshape(-1, mlp.hidden_size))

        probe.register_hook(deliver)
        return output + probe

    with _projections_caught(mlp, keep, failure), hooked(nn.Module.register_forward_hook, {mlp.module: open_output}):
        yield
