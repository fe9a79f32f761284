"""What people put around models and layers: torch.compile, data parallelism, PEFT. Judged without importing them."""

from __future__ import annotations

from torch import nn


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
