"""Runs text through the dense model and hands each MLP's activations, and gradients where wanted, to an observer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cats_ext._inputs import evaluation_mode, input_device
from cats_ext._progress import finish_despite_interrupt, progress_bar
from cats_ext.patching.detection import MERGED, SEPARATE, GatedMLP

_CHUNK = 1 << 20  # activations looked at together: temporaries of about 60 MB, and no slower than larger pieces

Observer = Callable[[GatedMLP, Tensor, Tensor], None]
"""Gets an MLP and some rows of its gate and up projections, each ``[rows, I]``."""
GradientObserver = Callable[[GatedMLP, Tensor, Tensor, Tensor], None]
"""Gets an MLP, its gate and up projections of a batch, and the gradient at its output: ``[T, I]`` twice, ``[T, H]``."""


def run_pass(
    model: nn.Module,
    mlps: list[GatedMLP],
    batches: list[Tensor],
    observe: Observer,
    title: str,
    progress: bool,
    *,
    start: int = 0,
    after: Callable[[int], None] = lambda done: None,
) -> None:
    """Run all batches of token ids from number ``start`` on, without gradients; ``after`` hears how many are done.

    Raises:
        ValueError: from ``observe``, with the MLP's name put before it.
    """

    def in_pieces(mlp: GatedMLP, gate: Tensor, up: Tensor) -> None:
        rows = max(1, _CHUNK // mlp.intermediate_size)
        for gate_rows, up_rows in zip(gate.split(rows), up.split(rows), strict=True):
            observe(mlp, gate_rows, up_rows)

    # The decoder alone, where there is one: the logits of a window can be larger than all activations.
    is_transformers = hasattr(model, "base_model_prefix")
    backbone = model.base_model if is_transformers else model
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        for mlp in mlps:
            stack.enter_context((_experts_caught if mlp.experts else _projections_caught)(mlp, in_pieces))
        advance = stack.enter_context(progress_bar(title, len(batches), progress))
        for number, batch in enumerate(batches):
            if number >= start:
                backbone(input_ids=batch.to(input_device(model)), **_options(model))
                after(number + 1)
            advance()


def has_gradients(model: nn.Module) -> bool:
    """Whether a gradient pass can run: the model predicts tokens, and autograd takes its weights."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head is not None and not any(parameter.is_inference() for parameter in model.parameters())


def run_gradient_pass(
    model: nn.Module,
    mlps: list[GatedMLP],
    batches: list[Tensor],
    observe: GradientObserver,
    title: str,
    progress: bool,
    *,
    seed: int,
    start: int = 0,
    after: Callable[[int], None] = lambda done: None,
) -> None:
    """As :func:`run_pass`, with the gradient of ``log p(y)`` by each MLP's output, every y drawn from the model itself.

    The second moment of that gradient is the Fisher information: a change d of an MLP's output at one position moves
    the model's predictions by a Kullback-Leibler divergence of about ``(gradient . d)^2 / 2``. Holds the activations
    of one batch in memory, as training would, without gradients of weights.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(_frozen(model))
        for mlp in mlps:
            stack.enter_context(_gradient_caught(mlp, observe))
        advance = stack.enter_context(progress_bar(title, len(batches), progress))
        stack.enter_context(torch.enable_grad())
        for number, batch in enumerate(batches):
            if number < start:
                advance()
                continue
            logits = model(input_ids=batch.to(input_device(model)), **_options(model)).logits
            log_p = logits.flatten(0, -2).float().log_softmax(-1)
            # Numbers from the CPU and of this batch's own: the same on every device and after an interruption.
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            uniform = torch.rand(len(log_p), generator=generator, dtype=torch.float64)
            y = _inverse_cdf(log_p.detach(), uniform.to(log_p.device))
            log_p.gather(1, y[:, None]).sum().backward()
            after(number + 1)
            advance()


def _options(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(model, "base_model_prefix") else {}


def _inverse_cdf(log_p: Tensor, uniform: Tensor) -> Tensor:
    """One index a row, drawn with probabilities ``exp(log_p)``."""
    cumulative = log_p.double().exp().cumsum(-1)
    return torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None]).clamp(max=log_p.shape[1] - 1)[:, 0]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter collects a gradient inside."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        finish_despite_interrupt(lambda: [parameter.requires_grad_(True) for parameter in trained])


@contextmanager
def _projections_caught(mlp: GatedMLP, observe: Observer) -> Iterator[None]:
    """While entered, the outputs of the MLP's gate and up projections go to ``observe`` together, ``[T, I]`` each."""
    names = MERGED[:1] if mlp.merged else SEPARATE[:2]
    outputs: dict[str, Tensor] = {}

    def catch(name: str, output: Tensor) -> None:
        outputs[name] = output
        if len(outputs) == len(names):
            gate, up = (t.reshape(-1, mlp.intermediate_size) for t in mlp.gate_and_up(outputs))
            outputs.clear()
            try:
                observe(mlp, gate, up)
            except ValueError as error:
                raise ValueError(f"activations of {mlp.name}: {error}") from error

    with ExitStack() as stack:
        for name in names:
            projection = getattr(mlp.module, name)
            hook = projection.register_forward_hook(lambda module, args, output, name=name: catch(name, output))
            stack.callback(hook.remove)
        yield


@contextmanager
def _experts_caught(mlp: GatedMLP, observe: Observer) -> Iterator[None]:
    """As :func:`_projections_caught`, for each expert with the tokens routed to it, which are projected once more."""

    def catch(module: nn.Module, x: Tensor, experts: Tensor, routing: Tensor) -> None:
        for expert in experts.unique().tolist():
            rows = x[(experts == expert).any(-1)]
            gate, up = F.linear(rows, module.gate_up_proj[expert]).chunk(2, dim=-1)
            try:
                observe(mlp, gate, up)
            except ValueError as error:
                raise ValueError(f"activations of {mlp.name}, expert {expert}: {error}") from error

    hook = mlp.module.register_forward_pre_hook(
        lambda module, args, named: catch(module, *args, *named.values()), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _gradient_caught(mlp: GatedMLP, observe: GradientObserver) -> Iterator[None]:
    """While entered, a backward pass hands the projections and the gradient at the MLP's output to ``observe``."""
    caught: list[Tensor] = []

    def keep(_: GatedMLP, gate: Tensor, up: Tensor) -> None:
        caught[:] = gate.detach(), up.detach()
        bad = sum(int((~values.isfinite()).sum()) for values in caught)  # the gradient of earlier layers would show it
        if bad:
            raise ValueError(f"{bad} of {2 * gate.numel()} values are NaN or infinite")

    def open_output(module: nn.Module, args: object, output: Tensor) -> Tensor:
        probe = torch.zeros_like(output, requires_grad=True)
        gate, up = caught

        def deliver(gradient: Tensor) -> None:
            try:
                observe(mlp, gate, up, gradient.reshape(-1, mlp.hidden_size))
            except ValueError as error:
                raise ValueError(f"activations of {mlp.name}: {error}") from error

        probe.register_hook(deliver)
        return output + probe

    with _projections_caught(mlp, keep):
        hook = mlp.module.register_forward_hook(open_output)
        try:
            yield
        finally:
            hook.remove()
            caught.clear()
