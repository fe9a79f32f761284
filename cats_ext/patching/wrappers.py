"""What is put around models and layers: torch.compile, data parallelism, PEFT, accelerate. None of them is imported.

With ``device_map``, accelerate puts a hook on every module of a model that is spread over devices: it replaces
``forward`` on the instance and keeps the earlier one as ``_old_forward``. A hook that only moves inputs to the module's
device changes nothing about what is computed. One that offloads leaves weights on the meta device between calls: such
modules cannot be patched, and patched modules that are offloaded later are called instead of bypassed. Hooks are
recognised by the attributes that accelerate documents.
"""

from __future__ import annotations

from types import MethodType

from torch import is_grad_enabled, nn
from torch.nn.modules import module as _torch

# Hooks for all modules at once (register_module_forward_hook and the like): dictionaries that torch fills and empties.
FORWARD_PRE_HOOKS, FORWARD_HOOKS = _torch._global_forward_pre_hooks, _torch._global_forward_hooks
BACKWARD_PRE_HOOKS, BACKWARD_HOOKS = _torch._global_backward_pre_hooks, _torch._global_backward_hooks


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of wrappers that only put a prefix before the names of its modules."""
    while isinstance(model, nn.Module):
        if "_orig_mod" in model._modules:  # torch.compile
            model = model._modules["_orig_mod"]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif "base_model" in model._modules and hasattr(model, "get_base_model"):  # peft.PeftModel
            model = model.get_base_model()
        else:
            break
    return model


def under_idle_adapter(module: nn.Module) -> nn.Module | None:
    """The layer inside a PEFT adapter, if calling the adapter is the same as calling that layer; None otherwise.

    So it is with an adapter that is merged or disabled. One that is both unmerges itself when it is called.
    """
    base = module._modules.get("base_layer")
    if base is None or not hasattr(module, "adapter_layer_names") or module._forward_hooks or module._forward_pre_hooks:
        return None
    return base if bool(module.merged) != bool(module.disable_adapters) else None


def is_observed(module: nn.Module) -> bool:
    """Whether a hook, on ``module`` or for all modules, has to see that it is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or FORWARD_HOOKS
        or FORWARD_PRE_HOOKS
        or (
            is_grad_enabled()
            and (module._backward_hooks or module._backward_pre_hooks or BACKWARD_HOOKS or BACKWARD_PRE_HOOKS)
        )
    )


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
