"""Runs over the dense model: what they put on it is off again, whatever ends them."""

from __future__ import annotations

import pytest
from torch import nn

from cats_ext._inputs import hooked


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_an_interrupt_right_after_a_hook_was_registered_leaves_none(kind):
    """Then nobody has its handle."""
    module = nn.Linear(2, 2)

    def register(module: nn.Module, hook, **options) -> None:
        getattr(nn.Module, f"register_{kind}")(module, hook, **options)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), hooked(register, {module: lambda *_: None}, with_kwargs=True):
        pass
    assert not (module._forward_hooks or module._forward_pre_hooks)
    assert not (module._forward_hooks_with_kwargs or module._forward_pre_hooks_with_kwargs)


def test_hooks_of_others_stay():
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: None)
    with hooked(nn.Module.register_forward_hook, {module: lambda *_: None}):
        assert len(module._forward_hooks) == 2
    assert len(module._forward_hooks) == 1
