"""vLLM serves CATS checkpoints: its plugin, and what can be asked of a running engine.

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins`` and calls it in each process, for
every model. Nothing here imports vLLM before that.
"""

from __future__ import annotations

from cats_ext.integrations.vllm.control import reset_sparsity, set_sparsity, sparsity_report
from cats_ext.integrations.vllm.versions import SUPPORTED, unsupported

__all__ = ["SUPPORTED", "register", "reset_sparsity", "set_sparsity", "sparsity_report"]


def register() -> None:
    """Make ``cats`` a quantization method of vLLM. In a version that is not supported, one that says so when used."""
    from vllm import __version__
    from vllm.model_executor.layers.quantization import register_quantization_config

    from cats_ext.integrations.vllm.versions import refusing

    reason = unsupported(__version__)
    if reason is None:
        try:
            from cats_ext.integrations.vllm.quantization import CatsQuantizationConfig as method
            from cats_ext.integrations.vllm.worker import add_to_workers

            add_to_workers()
        except (ImportError, AttributeError) as error:  # vLLM has changed; its other models are to be served as ever
            reason = f"cats_ext does not fit vLLM {__version__} ({error}): it supports {SUPPORTED}"
    if reason is not None:
        method = refusing(reason)
    register_quantization_config("cats")(method)
