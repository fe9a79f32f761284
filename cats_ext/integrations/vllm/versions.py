"""The versions of vLLM that are supported, and what a CATS checkpoint meets in others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from packaging.version import InvalidVersion, Version

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

OLDEST, NEWEST = "0.23", "0.32"  # tested is the newest, in .ci/vllm; what is used of vLLM is there in 0.23 too
SUPPORTED = f"vLLM {OLDEST} to {NEWEST}"


def unsupported(version: str) -> str | None:
    """Why this version of vLLM cannot serve CATS checkpoints; None if it can.

    Builds of vLLM's sources have no version that says how old they are, and are tried.
    """
    try:
        parsed = Version(version)
    except InvalidVersion:
        return None
    release = parsed.release[:2]
    if parsed.is_devrelease or Version(OLDEST).release <= release <= Version(NEWEST).release:
        return None
    return f"CATS checkpoints need {SUPPORTED}, found vLLM {version}"


def refusing(reason: str) -> type[QuantizationConfig]:
    """A quantization method that raises RuntimeError with this reason when a checkpoint asks for it."""
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError(reason)

    abstract = dict.fromkeys(QuantizationConfig.__abstractmethods__, refuse)
    return type("UnsupportedCatsConfig", (QuantizationConfig,), abstract | {"from_config": staticmethod(refuse)})
