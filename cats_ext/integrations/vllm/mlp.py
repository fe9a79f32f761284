"""ServedMLP: what a gated MLP of vLLM becomes, with its own children and the sparse forward.

Its forward calls one op: see vllm_op.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import LinearBase, MergedColumnParallelLinear

from cats_ext.integrations.vllm.checkpoint import Checkpoint
from cats_ext.integrations.vllm_op import gated_mlp, halves
from cats_ext.ops import dispatch
from cats_ext.ops.reference import ACTIVATIONS
from cats_ext.patching.detection import MERGED, PROBE_TOLERANCE, SEPARATE
from cats_ext.thresholds.config import CatsConfig, LayerConfig
from cats_ext.thresholds.exact import ExactConfig
from cats_ext.thresholds.fit import check_weights


@dataclass
class ServedState:
    """What a ServedMLP knows beside its children and buffers."""

    name: str  # in the config
    config: CatsConfig
    projections: tuple[str, ...]  # names of its children, that of down_proj last
    activation: str
    first: int  # of the MLP's neurons, the first that this rank has
    neurons: int  # how many it has
    counting: str | bool  # as in Adoption
    formats: list[str]  # of the packed rows of gate, up and down; empty if the weights are dense

    @property
    def layer(self) -> LayerConfig:
        return self.config.layers[self.name]

    def at_sparsity(self, sparsity: float, down_sparsity: float | None) -> CatsConfig:
        return self.config.at_sparsity(sparsity, down_sparsity=down_sparsity)

    def own(self, threshold: Tensor | None) -> Tensor | None:
        """This rank's part, always a vector: compiled code may be loaded again for other thresholds."""
        if threshold is None or threshold.dim() == 0:
            return None if threshold is None else threshold.repeat(self.neurons)
        return threshold[self.first : self.first + self.neurons].clone()


class ServedMLP(nn.Module):
    """A gated MLP of vLLM that computes only the neurons above their thresholds; made by :func:`make_served`.

    ``threshold``, ``down_threshold`` (float32 ``[I]``) and ``counts`` (int64 ``[3]``, None unless counting) are buffers
    outside the state dict. Under LoRA the children are called and the mask put between, so all rows are read.
    """

    served: ServedState
    threshold: Tensor
    down_threshold: Tensor | None
    counts: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``, all-reduced as the down projection itself does."""
        *inputs, down = (self._modules[name] for name in self.served.projections)
        mask = self.threshold, self.down_threshold, self.served.activation
        if not all(isinstance(linear, LinearBase) for linear in (*inputs, down)):
            gate, up = halves([_call(linear, x) for linear in inputs])
            return _call(down, torch.ops.cats.gated_threshold_forward(gate, up, *mask))
        biases = [linear.bias for linear in inputs if linear.bias is not None]
        down_bias = None if down.tp_rank > 0 else down.bias
        weights = [linear.weight for linear in inputs]
        y = gated_mlp(x, weights, down.weight, self.served.formats, mask, biases, down_bias, self._counting())
        return tensor_model_parallel_all_reduce(y) if _is_reduced(down) else y

    def _counting(self) -> tuple[Tensor, bool] | None:
        return None if self.counts is None else (self.counts, self.served.counting == dispatch.KERNEL)

    @torch.inference_mode()
    def set_thresholds(self, config: CatsConfig) -> None:
        """Take over this rank's part of the thresholds of ``config``, in place."""
        served = self.served
        self.threshold.copy_(served.own(config.thresholds[served.name]))
        if self.down_threshold is not None:
            self.down_threshold.copy_(served.own(config.down_thresholds[served.name]))
        served.config = config

    def counted(self) -> dict[str, Any]:
        served, layer = self.served, self.served.layer
        *inputs, down = (self._modules[name].weight for name in served.projections)
        rows = inputs[0], inputs[-1], down if served.formats else down.t()
        return {
            "counts": self.counts.tolist(),
            "intermediate_size": layer.intermediate_size,
            "matrix_bytes": [layer.intermediate_size * w.shape[1] * w.element_size() for w in rows],
            "up_target": layer.up_sparsity,
            "down_target": layer.down_sparsity,
        }


def make_served(mlp: nn.Module, checkpoint: Checkpoint, name: str, counting: str | bool) -> None:
    """Turn ``mlp``, whose weights are loaded, into a :class:`ServedMLP` with this rank's part of the thresholds.

    Without a config in the checkpoint it skips zeros, as :func:`cats_ext.apply_exact` does.

    Raises:
        ValueError: it is no gated MLP, does not compute ``down(act(gate) * up)``, has another size, or other weights
            than the thresholds were made for. It is unchanged then.
    """
    kind = type(mlp).__name__
    projections = _projections(mlp)
    if projections is None:
        raise ValueError(f"{name} ({kind}) cannot run sparsely: it has no children {', '.join(MERGED)}")
    others = [n for n, m in mlp._modules.items() if n not in projections and any(True for _ in m.parameters())]
    if others or mlp._parameters:
        raise ValueError(f"{name} ({kind}) cannot run sparsely: it has further weights: {[*others, *mlp._parameters]}")
    *inputs, down = (mlp._modules[n] for n in projections)
    formats = _formats(name, [*inputs, down])
    hidden_size, neurons = (down.output_size, len(down.weight)) if formats else down.weight.shape
    ranks, rows = down.tp_size, sum(linear.weight.shape[0] for linear in inputs)
    config = checkpoint.config
    if config is None:
        size = hidden_size, neurons * ranks
        config = ExactConfig.of([(name, LayerConfig(*size, checkpoint.activation, 0.0, 0.0))], None)
    layer, found = config.layers[name], (hidden_size, neurons * ranks)
    if found != (layer.hidden_size, layer.intermediate_size) or rows != 2 * neurons:
        raise ValueError(
            f"config has hidden_size {layer.hidden_size} and intermediate_size {layer.intermediate_size} for {name}, "
            f"the model has {found[0]} and {found[1]} on {ranks} ranks, with {rows} rows of gate and up on this one"
        )
    served = ServedState(
        name, config, projections, layer.activation, down.tp_rank * neurons, neurons, counting, formats
    )
    if name in config.weights:
        with torch.device("cpu"):  # not the GPU on which vLLM may be loading
            names = MERGED if len(inputs) == 1 else SEPARATE
            weights = {n: linear.weight for n, linear in zip(names, (*inputs, down), strict=True)}
            check_weights(name, config.weights[name], weights.get, served.first, layer.intermediate_size)
    _check_formula(mlp, served)
    device = down.weight.device
    # vLLM's Transformers backend binds a rewritten forward to the module, which would hide the class's.
    vars(mlp).pop("forward", None)
    mlp.__class__ = _served_class(type(mlp))
    mlp.served = served
    counts = torch.zeros(3, dtype=torch.int64, device=device) if counting else None
    buffers = {"threshold": config.thresholds[name], "down_threshold": config.down_thresholds.get(name)}
    for buffer, value in buffers.items():
        value = served.own(value)
        mlp.register_buffer(buffer, None if value is None else value.to(device), persistent=False)
    mlp.register_buffer("counts", counts, persistent=False)


def _projections(mlp: nn.Module) -> tuple[str, ...] | None:
    """The names of its projections. vLLM's Transformers backend may have merged gate and up under another name."""
    merged = [name for name, child in mlp._modules.items() if isinstance(child, MergedColumnParallelLinear)]
    for names in (SEPARATE, MERGED, (*merged[:1], MERGED[1])):
        if len(names) > 1 and mlp._modules.keys() >= {*names}:
            return names
    return None


def _formats(name: str, linears: list[LinearBase]) -> list[str]:
    """Of the packed rows of gate, up and down; empty if none of them is packed."""
    formats = [linear.quant_method.row_format for linear in linears]
    if not any(formats):
        return []
    if not all(formats):
        raise ValueError(f"{name} must have packed rows in all its projections or in none of them")
    return [form.name for form in (formats[0], formats[-2], formats[-1])]


@cache
def _served_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Served{kind.__name__}", (ServedMLP, kind), {})


@torch.inference_mode()
def _check_formula(mlp: nn.Module, served: ServedState) -> None:
    """Run the module on four vectors: two of unit variance, and two that give large gate values, which clamps change.

    Ranks have different neurons and get the same vectors, so the size of the gate values is their mean over all ranks.
    """
    *inputs, down = (mlp._modules[n] for n in served.projections)
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(4, served.layer.hidden_size, generator=generator, dtype=torch.float32, device="cpu")
    x = x.to(down.weight.device, down.params_dtype)
    size = halves([_call(linear, x) for linear in inputs])[0].float().pow(2).mean()
    if down.tp_size > 1:
        size = tensor_model_parallel_all_reduce(size[None])[0] / down.tp_size
    x[2:] *= (32 / size.sqrt().clamp(min=1e-3)).to(x.dtype)
    gate, up = halves([_call(linear, x) for linear in inputs])
    expected = _call(down, ACTIVATIONS[served.activation](gate) * up).float()
    found = mlp.forward(x).float()
    tolerance = PROBE_TOLERANCE.get(x.dtype, 1e-4)
    for want, have in zip(expected, found, strict=True):
        difference = (want - have).nan_to_num(0, 0, 0).abs().max()
        if not difference <= tolerance * want.nan_to_num(0, 0, 0).abs().max():
            raise ValueError(
                f"{served.name} ({type(mlp).__name__}) cannot run sparsely: its forward is not down(act(gate) * up) "
                f"with the activation {served.activation}"
            )


def _is_reduced(down: LinearBase) -> bool:
    return down.tp_size > 1 and getattr(down, "reduce_results", False)


def _call(linear: nn.Module, x: Tensor) -> Tensor:
    y = linear(x)
    return y[0] if isinstance(y, tuple) else y
