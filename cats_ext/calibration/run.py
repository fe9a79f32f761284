"""calibrate: runs text through a dense model and sets each MLP's thresholds to quantiles of its activations.

Activations are counted into histograms as they come and never kept. Every pass runs the dense model, so the counts
serve any sparsity: thresholds for another one follow from them without the model (CatsConfig.at_sparsity).
"""

from __future__ import annotations

import os
import warnings
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from cats_ext._inputs import check_token_ids
from cats_ext.calibration.accumulator import LayerAccumulator
from cats_ext.calibration.checkpoint import Checkpoint
from cats_ext.calibration.counting import count_activations
from cats_ext.calibration.search import search_allocation
from cats_ext.calibration.settings import CalibrationSettings
from cats_ext.data.windows import collect_windows
from cats_ext.parallel.ranks import check_same, raised_together
from cats_ext.parallel.sharding import group_of
from cats_ext.patching.apply import find_dense_mlps
from cats_ext.patching.tracking import SparsityDriftWarning
from cats_ext.patching.wrappers import unwrapped
from cats_ext.thresholds.config import CatsConfig, LayerConfig
from cats_ext.thresholds.fit import sample_all_ranks, weight_of
from cats_ext.thresholds.rules import has_input_threshold
from cats_ext.thresholds.statistics import thresholds_of


@torch.inference_mode(False)
def calibrate(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    sparsity: float | None = None,
    budget: float | None = None,
    rule: str = CalibrationSettings.rule,
    down_sparsity: float | None = None,
    gate_power: float | None = None,
    last_gate_power: float | None = None,
    importance: str | None = None,
    allocation: str = CalibrationSettings.allocation,
    spread: float = CalibrationSettings.spread,
    max_tokens: int = CalibrationSettings.max_tokens,
    sequence_length: int = CalibrationSettings.sequence_length,
    batch_size: int = CalibrationSettings.batch_size,
    seed: int = CalibrationSettings.seed,
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
    - ``three_threshold``: as ``two_threshold``, and for the gate, not for up, inputs count as 0 if ``|x_i|`` is below
      its quantile s_x, one for a layer. ``s_x = 0.6 sparsity``, ``s_x + s_u + s_d = 2 sparsity``, so fewer neurons are
      dropped for the columns of the gate that need not be read, and ``s_d = s_u + 0.2``, closer where that leaves
      [0, 1). Of dense MLPs with a gate_proj, on one rank.

    Weights: with importance "norm", ``n_j = norm(Wd_j)`` and ``c_j = rms(u_j) n_j``. With "gradient", ``n_j =
    rms(Wd_j . g)`` and ``c_j = rms(u_j Wd_j . g)``, where g is the gradient of the model's own log-likelihood at the
    MLP's output; this takes memory for the activations of a window, as training does.

    All ranks of a tensor-parallel model have to call it, with the same data. They count their own neurons, and get the
    same config, which is that of the model in one process up to rounding.

    The experts of a mixture share their thresholds, from quantiles over all tokens routed to any of them, and
    ``n_j = c_j = 1``: gate weights, gradients and the search are for dense MLPs.

    Args:
        model: dense model on any device or spread over several; unchanged afterwards.
        data: a text, an iterable of texts, or an iterable of token ids: integer tensors ``[T]`` or ``[B, T]``, or
            mappings with ``input_ids`` and optionally ``attention_mask`` (padding is left out). See
            :func:`cats_ext.data.windows.collect_windows` for how windows are made and chosen.
        tokenizer: needed for texts.
        sparsity: share of neurons to skip in every layer, in [0, 1); with several shares, the one of as many bytes.
            0 sets thresholds of 0, which is the dense model.
        budget: instead of sparsity, the share of MLP weight bytes that a token may read: ``1 - 2/3 sparsity``. Without
            either it is 2/3.
        rule: "two_threshold", "plain", "weighted" or "three_threshold".
        down_sparsity: s_d of the two-threshold rule, with uniform allocation.
        gate_power: exponent of the gate's weights in [0, 1]; 0 is no weights. By default 1 with "weighted" and 1/2
            with "two_threshold" and "three_threshold", there 0 for mixtures of experts.
        last_gate_power: the same of the last layer, whose output the logits are made of. By default no larger than
            gate_power, 1 with "weighted" and 1/16 with "two_threshold" and "three_threshold".
        importance: "norm", or "gradient", which comes closer to the dense model and takes a backward pass over 16,384
            tokens. By default "gradient" with the two-threshold and the three-threshold rule, dense MLPs and a model
            with a head, else "norm".
        allocation: "uniform" gives every layer the same sparsity, as in the paper. "search" spreads the bytes over
            layers, and over up and down, so that the predictions change least; the last layer stays as it is,
            :mod:`cats_ext.thresholds.allocation`. Takes another backward pass over 16,384 tokens. Not with
            "three_threshold".
        spread: of a search, the largest difference between a layer's up and down sparsity and those of the uniform
            allocation, in (0, 1].
        max_tokens: how many tokens to use at most.
        sequence_length: tokens in a window; at most as many as the model has positions are used.
        batch_size: windows of equal length run together.
        seed: chooses the windows where there are more than needed. Equal arguments give equal thresholds.
        checkpoint: a file that progress is written to, once a minute and at the end. The same call continues from it,
            or gives the same result again; remove it when the result is saved.
        progress: show a bar per pass, with the time left, on standard error.

    Returns:
        The config, with its statistics, for :func:`cats_ext.apply_cats` and ``save_pretrained``.

    Raises:
        TypeError, ValueError: an argument is out of its range, there is too little data, the model has no gated MLP, is
            patched already, the rule does not go with its MLPs, a layer's activations are NaN, infinite or all zero, or
            the checkpoint is of another run.
        OSError: the checkpoint cannot be written; this is tried before the first pass.
    """
    group = group_of(unwrapped(model))
    with raised_together(group):
        settings = CalibrationSettings(
            sparsity=sparsity,
            budget=budget,
            rule=rule,
            down_sparsity=down_sparsity,
            gate_power=gate_power,
            last_gate_power=last_gate_power,
            importance=importance,
            allocation=allocation,
            spread=spread,
            max_tokens=max_tokens,
            sequence_length=sequence_length,
            batch_size=batch_size,
            seed=seed,
        )
        mlps, model = find_dense_mlps(model), unwrapped(model)
        settings = settings.for_model(model, mlps)
        windows = collect_windows(data, tokenizer, settings.sequence_length, settings.max_tokens, settings.seed)
        check_token_ids("data", torch.cat(windows), model)

        powers = settings.gate_powers(len(mlps))
        layers = {
            m.name: LayerAccumulator(m, power, settings.importance, has_input_threshold(settings.rule))
            for m, power in zip(mlps, powers, strict=True)
        }
        if checkpoint is not None and group is not None:
            raise ValueError(f"checkpoint must be None for a tensor-parallel model, got {str(checkpoint)!r}")
        identity = settings.identity(len(mlps))
        saved = Checkpoint(checkpoint, identity, model, windows, layers)
    check_same(group, "the arguments of calibrate", lambda: repr(settings))
    check_same(group, "data", lambda: sha256(torch.cat(windows).numpy().tobytes()).digest())
    count_activations(model, layers, windows, settings, saved, progress)
    config = _uniform_config(model, layers, windows, settings)
    if settings.allocation == "search":
        losses = settings.loss_table(torch.stack([layer.mean_losses() for layer in layers.values()]))
        config = search_allocation(model, config, losses, windows)
    _warn_of_ties(config)
    return config


def _uniform_config(
    model: nn.Module, layers: dict[str, LayerAccumulator], windows: list[Tensor], settings: CalibrationSettings
) -> CatsConfig:
    """The config in which every layer has the same sparsity."""
    statistics = {name: layer.statistics() for name, layer in layers.items()}
    mlps, split = [layer.mlp for layer in layers.values()], settings.split
    sparsities = {f"{matrix}_sparsity": share for matrix, share in split._asdict().items()}
    return CatsConfig(
        **thresholds_of(statistics, dict.fromkeys(layers, split)),
        layers={
            mlp.name: LayerConfig(
                mlp.hidden_size, mlp.intermediate_size, mlp.activation, experts=mlp.experts, **sparsities
            )
            for mlp in mlps
        },
        model_type=getattr(getattr(model, "config", None), "model_type", None),
        sparsity=settings.sparsity,
        rule=settings.rule,
        gate_power=settings.gate_power,
        last_gate_power=settings.last_gate_power,
        importance=settings.importance,
        calibration=settings.record(windows),
        statistics=statistics,
        weights={mlp.name: sample_all_ranks(partial(weight_of, mlp.bare()), mlp.shard) for mlp in mlps},
    )


def _warn_of_ties(config: CatsConfig) -> None:
    """Warn of layers in which so many values are equal that no threshold can drop the wanted share of them."""
    for name, layer in config.layers.items():
        statistics = config.statistics[name]
        cut, _ = statistics.cuts(layer.up_sparsity, layer.down_sparsity)
        tests = [("so many gate activations of ", statistics.gate.share_below(cut), layer.up_sparsity)]
        if statistics.inputs is not None:
            below = statistics.inputs.share_below(float(config.input_thresholds[name]))
            tests.append(("so many inputs of ", below, layer.input_sparsity))
        for so_many, reached, wanted in tests:
            if reached < wanted - 0.05:
                warnings.warn(
                    f"{so_many}{name} are equal that its threshold drops {reached:.1%} of them, not {wanted:.1%}",
                    SparsityDriftWarning,
                    stacklevel=3,
                )
