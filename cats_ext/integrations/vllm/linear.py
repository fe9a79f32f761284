"""vLLM's methods of linear layers with dense weights, and what they share: which MLPs get thresholds."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.model_executor.layers.linear import UnquantizedLinearMethod, register_weight_loader_v2_supported_method
from vllm.platforms import current_platform

from cats_ext.integrations.vllm.checkpoint import NOT_EXACT, Checkpoint
from cats_ext.integrations.vllm.mlp import ServedMLP, make_served
from cats_ext.rows import RowFormat


class Adoption:
    """Which MLPs of a worker's model run sparsely, and that each of them does.

    Args:
        names: in the config, by vLLM's name; empty if the checkpoint has no config, and all gated MLPs are meant.
        here: those of ``names`` that are on this rank.
        counting: whether neurons are counted; KERNEL where the kernel runs only.
    """

    def __init__(self, checkpoint: Checkpoint, names: dict[str, str], here: list[str], counting: str | bool) -> None:
        self.checkpoint, self.names, self.here, self.counting = checkpoint, names, here, counting
        self.asked: set[str] = set()
        self._hook = register_module_module_registration_hook(partial(_note_parent, self))

    def takes(self, name: str) -> bool:
        """Whether the module of this name, which has a projection of an MLP, is one of those."""
        return not self.names or name in self.names

    def complete(self) -> None:
        """Raise ValueError unless vLLM has asked for all MLPs of this rank; when the model has been made."""
        self._hook.remove()
        left = [name for name in self.here if name not in self.asked]
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise ValueError(
                f"vLLM's model has no MLP of the names that the thresholds are for: {', '.join(left[:3])}{more}"
            )
        if not self.asked:
            raise ValueError(f"vLLM's model has no gated MLP, {NOT_EXACT}")


@register_weight_loader_v2_supported_method
class DenseLinearMethod(UnquantizedLinearMethod):
    """Of a linear layer without thresholds."""

    def __init__(self, adoption: Adoption) -> None:
        super().__init__()
        self.adoption = adoption

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.adoption.complete()
        super().process_weights_after_loading(layer)


@register_weight_loader_v2_supported_method
class MLPLinearMethod(UnquantizedLinearMethod):
    """Of one projection of an MLP with thresholds: the weight stays as it is, that of down_proj laid out by neuron."""

    row_format: RowFormat | None = None  # of packed rows

    def __init__(self, adoption: Adoption, name: str, projection: str) -> None:
        super().__init__()
        self.adoption, self.name, self.projection = adoption, name, projection
        self.parent: Any = lambda: None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        # Not the inherited one, which packs weights on the CPU and removes them.
        self.adoption.complete()
        if self.projection != "down_proj":
            return
        weight = layer.weight
        if self.row_format is None and weight.stride(0) != 1:
            weight.data = weight.data.t().contiguous().t()
        mlp = self.parent()
        if mlp is None:
            raise ValueError(f"{self.name} cannot run sparsely: its down_proj is in no module that was seen being made")
        if not isinstance(mlp, ServedMLP):  # else weights have been loaded again
            name = self.adoption.names.get(self.name, self.name)
            make_served(mlp, self.adoption.checkpoint, name, self.adoption.counting)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if current_platform.is_cpu():  # the inherited one wants packed weights
            return F.linear(x, layer.weight, bias)
        return super().apply(layer, x, bias)


def _note_parent(adoption: Adoption, parent: nn.Module, name: str, child: nn.Module | None) -> None:
    method = getattr(child, "quant_method", None)
    if isinstance(method, MLPLinearMethod) and method.adoption is adoption and name == method.projection:
        method.parent = weakref.ref(parent)
