"""The quantization method ``cats`` of vLLM: dense weights as ever, and each gated MLP with thresholds runs sparsely.

vLLM asks the method for each linear layer, by name, while it makes the model, and calls it again when the weights are
loaded. The MLP to which a projection belongs is learned from PyTorch, which tells when modules are given children.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from cats_ext.integrations.vllm.checkpoint import check_entry, read_checkpoint
from cats_ext.integrations.vllm.mlp import ServedMLP, make_served
from cats_ext.ops.definitions import SPARSE_DTYPES
from cats_ext.patching.detection import MERGED, SEPARATE
from cats_ext.thresholds.config import CatsConfig

PROJECTIONS = {*MERGED, *SEPARATE}


class CatsQuantizationConfig(QuantizationConfig):
    """Made where the engine is configured, and pickled to the workers, each of which reads the thresholds itself."""

    def __init__(self) -> None:
        super().__init__()
        self.source: tuple[str, str | None] | None = None
        self.digest: str | None = None
        self.renames: list[Any] = []
        self._adoption: Adoption | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CatsQuantizationConfig:
        check_entry(config)
        return cls()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        self.source = model_name, revision or getattr(hf_config, "_commit_hash", None)
        _, self.digest = read_checkpoint(*self.source)  # what is wrong with it is seen before a worker starts

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        if hf_to_vllm_mapper not in self.renames:
            self.renames.append(hf_to_vllm_mapper)

    def get_name(self) -> str:
        return "cats"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(SPARSE_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if self._adoption is None:
            self._adoption = Adoption(self, get_current_vllm_config())
        if not isinstance(layer, LinearBase):
            return None
        name, _, projection = prefix.rpartition(".")
        if projection in PROJECTIONS and name in self._adoption.names:
            self._adoption.asked.add(name)
            return MLPLinearMethod(self._adoption, name, projection)
        return DenseLinearMethod(self._adoption)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_adoption": None}


class Adoption:
    """Which MLPs of a worker's model get thresholds, and that each of them does."""

    def __init__(self, quantization: CatsQuantizationConfig, vllm_config: VllmConfig) -> None:
        self.config, digest = read_checkpoint(*quantization.source)
        if digest != quantization.digest:
            raise ValueError(
                f"the thresholds of {quantization.source[0]} are not those that the engine was configured with: every "
                "machine needs the same checkpoint"
            )
        check_supported(vllm_config)
        self.names = {name: name for name in self.config.layers}  # in the config, by vLLM's name
        for mapper in quantization.renames:
            self.names = mapper.apply_dict(self.names)
        self.asked: set[str] = set()
        self.counting = counting(vllm_config)
        check_divisible(self.config, vllm_config.parallel_config.tensor_parallel_size)
        self.here = self._on_this_rank(quantization.source[0], vllm_config)
        self._hook = register_module_module_registration_hook(partial(_note_parent, self))

    def complete(self) -> None:
        """Raise ValueError unless vLLM has asked for all MLPs of this rank; when the model has been made."""
        self._hook.remove()
        left = [name for name in self.here if name not in self.asked]
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise ValueError(
                f"vLLM's model has no MLP of the names that the thresholds are for: {', '.join(left[:3])}{more}"
            )

    def _on_this_rank(self, model: str, vllm_config: VllmConfig) -> list[str]:
        """The MLPs of this rank's layers under pipeline parallelism; a draft model has all of them on one rank."""
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size == 1 or model != vllm_config.model_config.model:
            return list(self.names)
        own = range(*vllm_config.model_config.get_layers_start_end_indices(parallel))
        return [name for name in self.names if extract_layer_index(name) in own]


def check_supported(vllm_config: VllmConfig) -> None:
    """Raise ValueError for a setting of vLLM under which CATS checkpoints are not served."""
    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        raise ValueError(f"CATS checkpoints are served on CUDA and CPUs, not on {current_platform.device_name}")
    if envs.VLLM_BATCH_INVARIANT:
        raise ValueError("VLLM_BATCH_INVARIANT=1 is not supported: few tokens are computed by another kernel than many")
    if _offloads(vllm_config):
        raise ValueError("offloading weights to the CPU is not supported for CATS checkpoints")
    if counting(vllm_config) and vllm_config.lora_config is not None:
        raise ValueError("counting neurons (additional_config) is not supported together with LoRA adapters")


def check_divisible(config: CatsConfig, ranks: int) -> None:
    """Raise ValueError unless the neurons of each MLP can be divided among the ranks of tensor parallelism."""
    for name, layer in config.layers.items():
        if layer.intermediate_size % ranks:
            raise ValueError(
                f"tensor_parallel_size must divide the {layer.intermediate_size} neurons of {name}, got {ranks}"
            )


def counting(vllm_config: VllmConfig) -> bool:
    """Whether ``additional_config={"cats": {"count": True}}`` was given."""
    extra = vllm_config.additional_config
    settings = extra.get("cats", {}) if isinstance(extra, dict) else {}
    if settings not in ({}, {"count": False}, {"count": True}):
        raise ValueError(f"additional_config['cats'] must be {{'count': True}} or left out, got {settings!r:.80}")
    return settings.get("count", False)


def _offloads(vllm_config: VllmConfig) -> bool:
    offload = vllm_config.offload_config
    return offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0


class DenseLinearMethod(UnquantizedLinearMethod):
    """Of a linear layer without thresholds."""

    def __init__(self, adoption: Adoption) -> None:
        super().__init__()
        self.adoption = adoption

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.adoption.complete()
        super().process_weights_after_loading(layer)


class MLPLinearMethod(UnquantizedLinearMethod):
    """Of one projection of an MLP with thresholds: the weight stays as it is, that of down_proj laid out by neuron."""

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
        if weight.stride(0) != 1:
            weight.data = weight.data.t().contiguous().t()
        mlp = self.parent()
        if mlp is None:
            raise ValueError(f"{self.name} cannot run sparsely: its down_proj is in no module that was seen being made")
        if not isinstance(mlp, ServedMLP):  # else weights have been loaded again
            config = self.adoption.config
            make_served(mlp, config, self.adoption.names[self.name], self.adoption.counting)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if current_platform.is_cpu():  # the inherited one wants packed weights
            return F.linear(x, layer.weight, bias)
        return super().apply(layer, x, bias)


for _method in (DenseLinearMethod, MLPLinearMethod):
    register_weight_loader_v2_supported_method(_method)


def _note_parent(adoption: Adoption, parent: nn.Module, name: str, child: nn.Module | None) -> None:
    method = getattr(child, "quant_method", None)
    if isinstance(method, MLPLinearMethod) and method.adoption is adoption and name == method.projection:
        method.parent = weakref.ref(parent)
