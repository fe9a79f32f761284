"""The quantization method ``cats`` of vLLM: dense layers as ever, and each gated MLP of the checkpoint runs sparsely.

vLLM asks the method for each linear layer, by name, while it makes the model, and calls it again when the weights are
loaded. The MLP to which a projection belongs is learned from PyTorch, which tells when modules are given children.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from cats_ext.integrations.vllm.checkpoint import check_entry, read_checkpoint
from cats_ext.integrations.vllm.linear import Adoption, DenseLinearMethod, MLPLinearMethod
from cats_ext.integrations.vllm.packed import PackedMLPLinearMethod, UnpackedLinearMethod, entry_of
from cats_ext.ops.definitions import SPARSE_DTYPES
from cats_ext.ops.dispatch import KERNEL
from cats_ext.patching.detection import MERGED, SEPARATE
from cats_ext.rows import RowFormat
from cats_ext.thresholds.config import LayerConfig

PROJECTIONS = {*MERGED, *SEPARATE}
COUNTING = (False, True, KERNEL)
DRAFT = "draft_model."  # before the names of layers of a draft model (speculative decoding)


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
        self.digest = read_checkpoint(*self.source).digest  # what is wrong with it is seen before a worker starts

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
            self._adoption = adopt(self, get_current_vllm_config())
        prefix = prefix.removeprefix(DRAFT)
        adoption, (name, _, projection) = self._adoption, prefix.rpartition(".")
        entry = entry_of(adoption.checkpoint.rows, prefix, self.packed_modules_mapping)
        if entry is not None and not isinstance(layer, LinearBase | ParallelLMHead):
            raise ValueError(f"{prefix} ({type(layer).__name__}) cannot have packed rows under vLLM")
        row_format = entry and RowFormat.parse(entry["format"])
        if isinstance(layer, LinearBase):
            merged = self.packed_modules_mapping.get(projection) == list(SEPARATE[:2])
            if (merged or projection in PROJECTIONS) and adoption.takes(name):
                adoption.asked.add(name)
                if row_format is None:
                    return MLPLinearMethod(adoption, name, projection)
                options = {"row_format": row_format, "input_rows": entry["input_rows"]}
                return PackedMLPLinearMethod(adoption, name, projection, **options)
            if row_format is None:
                return DenseLinearMethod(adoption)
        return row_format and UnpackedLinearMethod(adoption, row_format)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_adoption": None}


def adopt(quantization: CatsQuantizationConfig, vllm_config: VllmConfig) -> Adoption:
    """What is to be adopted in the model that vLLM is about to make.

    Raises:
        ValueError: vLLM's settings or another checkpoint on this machine do not allow it.
    """
    checkpoint = read_checkpoint(*quantization.source)
    if checkpoint.digest != quantization.digest:
        raise ValueError(
            f"the thresholds of {quantization.source[0]} are not those that the engine was configured with: every "
            "machine needs the same checkpoint"
        )
    check_supported(vllm_config)
    layers = {} if checkpoint.config is None else checkpoint.config.layers
    check_divisible(layers, vllm_config.parallel_config.tensor_parallel_size)
    names, rows = {name: name for name in layers}, checkpoint.rows
    for mapper in quantization.renames:
        names, rows = mapper.apply_dict(names), mapper.apply_dict(rows)
    here = _on_this_rank(names, quantization.source[0], vllm_config)
    return Adoption(replace(checkpoint, rows=rows), names, here, counting(vllm_config))


def _on_this_rank(names: Iterable[str], model: str, vllm_config: VllmConfig) -> list[str]:
    """The MLPs of this rank's layers under pipeline parallelism; a draft model has all of them on one rank."""
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size == 1 or model != vllm_config.model_config.model:
        return list(names)
    own = range(*vllm_config.model_config.get_layers_start_end_indices(parallel))
    return [name for name in names if extract_layer_index(name) in own]


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


def check_divisible(layers: dict[str, LayerConfig], ranks: int) -> None:
    """Raise ValueError unless the neurons of each MLP can be divided among the ranks of tensor parallelism."""
    for name, layer in layers.items():
        if layer.intermediate_size % ranks:
            raise ValueError(
                f"tensor_parallel_size must divide the {layer.intermediate_size} neurons of {name}, got {ranks}"
            )


def counting(vllm_config: VllmConfig) -> str | bool:
    """``additional_config={"cats": {"count": ...}}``: True, False, or ``KERNEL`` for only where the kernel runs."""
    extra = vllm_config.additional_config
    settings = extra.get("cats", {}) if isinstance(extra, dict) else {}
    if settings and not (isinstance(settings, dict) and settings.keys() == {"count"} and settings["count"] in COUNTING):
        raise ValueError(
            f"additional_config['cats'] must be {{'count': True}} or {{'count': '{KERNEL}'}}, got {settings!r:.80}"
        )
    return settings.get("count", False)


def _offloads(vllm_config: VllmConfig) -> bool:
    offload = vllm_config.offload_config
    return offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0
