"""calibrate: runs text through a dense model and sets each MLP's thresholds to quantiles of what it sees.

Activations are counted into histograms as they come and never kept. Every pass runs the dense model, so that what is
counted serves any sparsity: thresholds for another one follow from the stored counts (CatsConfig.at_sparsity).
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cats_ext._inputs import batches_of, check_token_ids
from cats_ext._progress import finish_despite_interrupt, note
from cats_ext._version import __version__
from cats_ext.calibration.accumulator import LayerAccumulator
from cats_ext.calibration.checkpoint import Checkpoint
from cats_ext.calibration.data import collect_windows
from cats_ext.calibration.passes import has_gradients, run_gradient_pass, run_pass
from cats_ext.evaluation.comparison import compare
from cats_ext.patching.apply import apply_cats, find_dense_mlps, remove_cats, sparse_mlps
from cats_ext.patching.detection import GatedMLP
from cats_ext.patching.tracking import SparsityDriftWarning
from cats_ext.patching.wrappers import unwrapped
from cats_ext.thresholds.allocation import LossTable
from cats_ext.thresholds.config import CatsConfig, LayerConfig, thresholds_of
from cats_ext.thresholds.rules import (
    DEFAULT_GATE_POWER,
    LAST_GATE_POWER,
    budget_of,
    check_weights,
    sparsity_of,
    sparsity_split,
)

ALLOCATIONS = ("uniform", "search")
_GRADIENT_TOKENS = 16384  # that the gradient passes use, in whole windows from all over the data
_UP = (*(i / 20 for i in range(20)), 0.99)  # sparsities that the search chooses from
_OFFSETS = (0.0, 0.15, 0.25, 0.35)  # of the down sparsity over the up sparsity
_FACTOR = 4  # of a pass with gradients and losses, in passes without (measured on two CPU cores: 3.6)
_CHECK_TOKENS = 4096  # on which a search is compared with the uniform allocation


@torch.inference_mode(False)
def calibrate(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    sparsity: float | None = None,
    budget: float | None = None,
    rule: str = "two_threshold",
    down_sparsity: float | None = None,
    gate_power: float | None = None,
    last_gate_power: float | None = None,
    importance: str | None = None,
    allocation: str | None = None,
    spread: float = 1.0,
    max_tokens: int = 32768,
    sequence_length: int = 1024,
    batch_size: int = 1,
    seed: int = 0,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
) -> CatsConfig:
    """Find the thresholds at which the gated MLPs of ``model`` skip a share of their neurons.

    Rules (v = act(x Wg), u = x Wu, h = v u, Wd_j the down projection's weights of neuron j):

    - ``plain``: CATS (arXiv 2404.08763, section 3). One threshold a layer, the ``sparsity`` quantile of ``|v|``.
    - ``weighted``: one threshold a neuron, from the quantile of ``|v_j| c_j ** gate_power``.
    - ``two_threshold``: the gate's threshold is set to the lower sparsity s_u, then a neuron is dropped if ``|h_j|
      n_j`` is below its quantile s_d (dropped neurons counted as 0). ``s_u + s_d = 2 sparsity``, so a token reads as
      many bytes as with the plain rule. By default s_d is ``sparsity + 0.125``, closer where that leaves [0, 1).

    Weights: with importance "norm", ``n_j = norm(Wd_j)`` and ``c_j = rms(u_j) n_j``. With "gradient", ``n_j =
    rms(Wd_j . g)`` and ``c_j = rms(u_j Wd_j . g)``, where g is the gradient of the model's own log-likelihood at the
    MLP's output; needs memory for the activations of a window, as training would.

    The experts of a mixture have their thresholds in common, from quantiles over all tokens routed to any of them, and
    ``n_j = c_j = 1``: rules with weights, gradients and the search are for dense MLPs.

    Args:
        model: dense model on any device or spread over several; unchanged afterwards.
        data: a text, an iterable of texts, or an iterable of token ids: integer tensors ``[T]`` or ``[B, T]``, or
            mappings with ``input_ids`` and optionally ``attention_mask`` (padding is left out). See
            :func:`cats_ext.calibration_data.collect_windows` for how windows are made and chosen.
        tokenizer: needed for texts.
        sparsity: share of neurons to skip in every layer, in [0, 1); 0 sets thresholds of 0, which is the dense model.
        budget: instead of sparsity, the share of MLP weight bytes that a token may read: ``1 - 2/3 sparsity``. Without
            either it is 2/3, or a sparsity of 0.5 where there can be no search and with the other rules.
        rule: "two_threshold", "plain" or "weighted".
        down_sparsity: s_d of the two-threshold rule, with uniform allocation.
        gate_power: exponent of the gate's weights in [0, 1]; 0 is no weights. By default 1 with "weighted" and 1/2
            with "two_threshold", there 0 for mixtures of experts.
        last_gate_power: the same of the last layer, whose output the logits are made of. By default no larger than
            gate_power, 1 with "weighted" and 1/16 with "two_threshold".
        importance: "norm", or "gradient", which comes closer to the dense model and takes a backward pass over 16,384
            tokens. By default "gradient" with the two-threshold rule, dense MLPs and a model with a head, else "norm".
        allocation: "uniform" gives every layer the same sparsity (the paper's way, and the default for a sparsity).
            "search" spreads the budget over layers, and over up and down, so that the predictions change least (the
            default for a budget, and for neither with importance "gradient"); the last layer stays as it is,
            :mod:`cats_ext.allocation`. Takes another backward pass.
        spread: of a search: how far a layer's up and down sparsity may be from those of the uniform allocation.
        max_tokens: how many tokens to use at most.
        sequence_length: tokens in a window; at most as many as the model has positions are used.
        batch_size: windows of equal length run together.
        seed: chooses the windows where there are more than needed. Equal arguments give equal thresholds.
        checkpoint: a file that progress is written to, at most once a minute; an interrupted calibration called again
            with the same arguments goes on from there. Removed at the end.
        progress: show a bar per pass, with the time left, on standard error.

    Returns:
        The config, with its statistics, for :func:`cats_ext.apply_cats` and ``save_pretrained``.

    Raises:
        TypeError, ValueError: an argument is out of its range, there is too little data, the model has no gated MLP, is
            patched already, a layer's activations are NaN, infinite or all zero, or the checkpoint is of another run.
    """
    unasked = sparsity is None and budget is None and down_sparsity is None and allocation is None
    sparsity, allocation = _target(sparsity, budget, allocation)
    if allocation == "search" and down_sparsity is not None:
        raise ValueError(f"down_sparsity is for uniform allocation, got {down_sparsity} with a search")
    split = sparsity_split(sparsity, rule, down_sparsity)
    if not isinstance(spread, (int, float)) or isinstance(spread, bool) or not 0 < spread <= 1:
        raise ValueError(f"spread must be a number in (0, 1], got {spread!r}")
    for name, value in (("max_tokens", max_tokens), ("sequence_length", sequence_length), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    mlps, model = find_dense_mlps(model), unwrapped(model)
    has_experts = any(mlp.experts for mlp in mlps)
    if importance is None:
        wanted = rule == "two_threshold" and not has_experts
        importance = "gradient" if wanted and has_gradients(model) else "norm"
    if gate_power is None:
        gate_power = 0.0 if has_experts and rule == "two_threshold" else DEFAULT_GATE_POWER[rule]
    check_weights(rule, gate_power, last_gate_power or 0, importance)
    if last_gate_power is None:
        last_gate_power = min(gate_power, LAST_GATE_POWER[rule])
    if (importance == "gradient" or allocation == "search") and not has_gradients(model):
        raise ValueError(
            "importance must be 'norm' and allocation 'uniform' for a model without an output layer or made in "
            f"inference mode, got {importance!r} and {allocation!r}"
        )
    if has_experts:
        _check_for_experts(max(gate_power, last_gate_power), importance, allocation)
    if unasked and rule == "two_threshold" and importance == "gradient":
        allocation = "search"
    if allocation == "search":  # what cannot be allocated is refused now, not after all passes
        _table(rule, torch.zeros(len(mlps), len(_options(rule))), spread).targets(
            budget_of(sparsity), [mlp.hidden_size * mlp.intermediate_size for mlp in mlps], split
        )
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if longest is not None:
        sequence_length = min(sequence_length, longest)
    windows = collect_windows(data, tokenizer, sequence_length, max_tokens, seed)
    check_token_ids("data", torch.cat(windows), model)

    powers = [gate_power] * (len(mlps) - 1) + [last_gate_power]
    layers = {mlp.name: LayerAccumulator(mlp, power, importance) for mlp, power in zip(mlps, powers, strict=True)}
    batches = batches_of(windows, batch_size)
    with_gradient = [window[None] for window in _few(windows, _GRADIENT_TOKENS)]  # one at a time: memory
    steps = _steps(layers, rule, max(powers), importance, allocation)
    arguments = {"rule": rule, "gate_power": powers, "importance": importance, "allocation": allocation}
    arguments |= {"seed": seed, "batch_size": batch_size, "cats_ext_version": __version__}
    saved = Checkpoint(checkpoint, arguments, windows, layers)
    seconds_a_token = 0.0
    for number in range(saved.step, len(steps)):
        step = steps[number]
        if allocation == "search" and number == len(steps) - 1 and progress and seconds_a_token:
            # a backward pass costs about two forward ones, and the check runs two models twice
            tokens = _FACTOR * sum(batch.numel() for batch in with_gradient) + 4 * _CHECK_TOKENS
            note(f"search for an allocation: about {max(1, round(seconds_a_token * tokens)):,} s")
        started = time.monotonic()
        todo = with_gradient if step.gradient else batches
        start = saved.batch if number == saved.step else 0
        title = f"calibration, pass {number + 1} of {len(steps)}" if len(steps) > 1 else "calibration"
        run = partial(run_gradient_pass, seed=seed) if step.gradient else run_pass
        run(model, mlps, todo, step.observe, title, progress, start=start, after=partial(saved.save, number))
        if not step.gradient:
            seconds_a_token = (time.monotonic() - started) / sum(batch.numel() for batch in todo[start:] or todo)
        for layer in layers.values():
            step.finish(layer)

    statistics = {name: layer.statistics() for name, layer in layers.items()}
    targets = dict.fromkeys(layers, split)
    thresholds, down_thresholds = thresholds_of(statistics, targets)
    config = CatsConfig(
        thresholds=thresholds,
        down_thresholds=down_thresholds,
        layers={
            mlp.name: LayerConfig(
                mlp.hidden_size, mlp.intermediate_size, mlp.activation, *targets[mlp.name], experts=mlp.experts
            )
            for mlp in mlps
        },
        model_type=getattr(getattr(model, "config", None), "model_type", None),
        sparsity=sparsity,
        rule=rule,
        gate_power=gate_power,
        last_gate_power=last_gate_power,
        importance=importance,
        calibration={
            "tokens": sum(len(window) for window in windows),
            "windows": len(windows),
            "sequence_length": sequence_length,
            "seed": seed,
            "cats_ext_version": __version__,
        },
        statistics=statistics,
    )
    if allocation == "search":
        losses = torch.stack([layer.mean_losses() for layer in layers.values()])
        config = _searched(model, config, _table(rule, losses, spread), windows)
    saved.remove()
    _warn_of_ties(config)
    return config


def _warn_of_ties(config: CatsConfig) -> None:
    """Values that are all alike cannot be told apart by a threshold, and are then kept."""
    for name, layer in config.layers.items():
        statistics = config.statistics[name]
        reached = statistics.gate.share_below(statistics.cuts(layer.up_sparsity, layer.down_sparsity)[0])
        if reached < layer.up_sparsity - 0.05:
            warnings.warn(
                f"so many gate activations of {name} are equal that its threshold drops {reached:.1%} of them, not "
                f"{layer.up_sparsity:.1%}",
                SparsityDriftWarning,
                stacklevel=3,
            )


@dataclass(frozen=True)
class _Step:
    """One pass over the data: what is counted, and what follows from it."""

    observe: Callable[..., None]
    finish: Callable[[LayerAccumulator], None] = lambda layer: None
    gradient: bool = False


def _steps(
    layers: dict[str, LayerAccumulator], rule: str, gate_power: float, importance: str, allocation: str
) -> list[_Step]:
    def each(method: Callable[..., None]) -> Callable[..., None]:
        return lambda mlp, *activations: method(layers[mlp.name], *activations)

    steps = []
    if importance == "gradient":
        steps.append(_Step(each(LayerAccumulator.add_gradient), LayerAccumulator.finish_weights, gradient=True))
    elif gate_power:
        steps.append(_Step(each(LayerAccumulator.add_up), LayerAccumulator.finish_weights))
    steps.append(_Step(each(LayerAccumulator.add_gate), LayerAccumulator.finish_gate))
    if rule == "two_threshold":
        steps.append(_Step(each(LayerAccumulator.add_joint)))
    if allocation == "search":
        cuts: dict[str, list[tuple[float, float]]] = {}

        def add_losses(mlp: GatedMLP, *activations: Tensor) -> None:
            if mlp.name not in cuts:
                statistics = layers[mlp.name].statistics()
                cuts[mlp.name] = [statistics.cuts(*option) for option in _options(rule)]
            layers[mlp.name].add_losses(*activations, cuts[mlp.name])

        steps.append(_Step(add_losses, gradient=True))
    return steps


def _options(rule: str) -> list[tuple[float, float]]:
    """Up and down sparsities that the search chooses from."""
    if rule != "two_threshold":
        return [(up, up) for up in _UP]
    return sorted({(up, min(round(up + more, 2), _UP[-1])) for up in _UP for more in _OFFSETS})


def _table(rule: str, losses: Tensor, spread: float) -> LossTable:
    return LossTable(torch.tensor(_options(rule), dtype=torch.float64), losses, spread)


def _searched(model: nn.Module, config: CatsConfig, table: LossTable, windows: list[Tensor]) -> CatsConfig:
    """``config`` with the allocation that the table finds, if the model's predictions confirm that it loses less."""
    searched = replace(config, losses=table).at_sparsity(config.sparsity)
    text = [ids for ids in _few(windows, _CHECK_TOKENS) if len(ids) > 1]
    bought = {"uniform_kl": _kl(model, config, text), "searched_kl": _kl(model, searched, text)}
    chosen = searched if bought["searched_kl"] < bought["uniform_kl"] else config
    return replace(chosen, calibration=config.calibration | {"search": bought})


def _kl(model: nn.Module, config: CatsConfig, windows: list[Tensor]) -> float:
    """Mean over all positions of the divergence from the dense model, in nats; 0 without windows."""
    try:
        apply_cats(model, config)
        sums = [len(ids) * compare(model, ids, window=len(ids), progress=False).kl for ids in windows]
    finally:
        finish_despite_interrupt(lambda: sparse_mlps(model) and remove_cats(model))
    return sum(sums) / max(1, sum(map(len, windows)))


def _check_for_experts(gate_power: float, importance: str, allocation: str) -> None:
    """Thresholds of experts are one a layer; too few tokens reach each for what needs sums over a neuron's own."""
    for name, value, possible in (
        ("allocation (by default 'search' with a budget)", allocation, "uniform"),
        ("gate_power (by default 1 with the rule 'weighted')", gate_power, 0),
        ("importance", importance, "norm"),
    ):
        if value != possible:
            raise ValueError(f"{name} must be {possible!r} for mixtures of experts, got {value!r}")


def _few(windows: list[Tensor], tokens: int) -> list[Tensor]:
    """As many windows as hold about so many tokens, from all over the data, and at least one."""
    count = min(len(windows), math.ceil(tokens * len(windows) / sum(map(len, windows))))
    return [windows[i * len(windows) // count] for i in range(count)]


def _target(sparsity: float | None, budget: float | None, allocation: str | None) -> tuple[float, str]:
    if sparsity is not None and budget is not None:
        raise ValueError(f"give sparsity or budget, not both, got {sparsity} and {budget}")
    if allocation is None:
        allocation = "uniform" if budget is None else "search"
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}")
    if budget is not None:
        return sparsity_of(budget), allocation
    return 0.5 if sparsity is None else sparsity, allocation
