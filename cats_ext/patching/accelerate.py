"""accelerate's hooks, which ``device_map`` puts on every module of a model that is spread over devices.

A hook replaces ``forward`` on the instance and keeps the earlier one as ``_old_forward``. One that only moves inputs to
the module's device changes nothing about what is computed. One that offloads leaves weights on the meta device between
calls: such modules cannot be patched, and patched modules that are offloaded later are called instead of bypassed.
Judged by the attributes that accelerate documents, without importing it.
"""

from __future__ import annotations

from types import MethodType

from torch import nn


def only_aligns_devices(module: nn.Module) -> bool:
    """Whether the ``forward`` set on the instance is the class's own behind a hook that offloads nothing."""
    attributes = vars(module)
    hook = attributes.get("_hf_hook")
    return (
        type(hook).__name__ == "AlignDevicesHook"
        and not hook.offload
        and getattr(attributes.get("_old_forward"), "__func__", None) is type(module).forward
    )


def rebind_forward(module: nn.Module) -> None:
    """After the class of ``module`` has changed, let a hook on it call the new class's forward."""
    if "_old_forward" in vars(module):
        module._old_forward = MethodType(type(module).forward, module)
