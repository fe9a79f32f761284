"""What the tests of patched models share: configs, short and long inputs, and snapshots of a model."""

from __future__ import annotations

import sys

import torch
from support.models import tokens
from torch import Tensor, nn

from cats_ext import CatsConfig, calibrate
from cats_ext.functional import MAX_KERNEL_TOKENS

# Models whose gate three_threshold refuses, and what the error calls it.
GATES_NOT_BY_COLUMNS = {
    "phi3": "gate_up_proj, which is gate and up in one",
    "mixtral": "the experts of a mixture",
    "quantised": "packed rows",
}


def config_for(model, sparsity=0.5, rule="two_threshold", **arguments) -> CatsConfig:
    return calibrate(model, tokens(300), sparsity=sparsity, rule=rule, sequence_length=150, progress=False, **arguments)


def layers_of(model) -> list[nn.Module]:
    return [layer.mlp for layer in model.model.layers]


def few(seed=5):
    """As many tokens as the kernel takes."""
    return tokens(MAX_KERNEL_TOKENS["cpu"], seed)[None]


def many(seed=6):
    return tokens(40, seed)[None]


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def few_and_many(model: nn.Module) -> list[Tensor]:
    """Logits of one token, which the sparse kernel computes, and of 24, which masked products do."""
    with torch.no_grad():
        return [model(tokens(count)[None]).logits for count in (1, 24)]


def snapshot(model) -> dict:
    return {
        "state": {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()},
        "parameters": [(name, id(p)) for name, p in model.named_parameters()],
        "buffers": [name for name, _ in model.named_buffers()],
        "modules": [(name, id(m), type(m)) for name, m in model.named_modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "training": [m.training for m in model.modules()],
        "config": vars(model).get("config") and model.config.to_dict(),
        "non-persistent": [sorted(m._non_persistent_buffers_set) for m in model.modules()],
    }


def assert_unchanged(model, before) -> None:
    after = snapshot(model)
    state, state_before = after.pop("state"), before["state"]
    assert after == {name: value for name, value in before.items() if name != "state"}
    assert list(state) == list(state_before)
    for name, (value, stride) in state.items():
        assert stride == state_before[name][1], name
        assert torch.equal(value, state_before[name][0]), name


class InterruptAt:
    """Raises ``error`` when the n-th line of one of ``functions`` is about to run."""

    def __init__(self, line: int, functions: list, error: type[BaseException]) -> None:
        self.left, self.codes, self.error = line, {function.__code__ for function in functions}, error

    def trace(self, frame, event, argument):
        if frame.f_code not in self.codes:
            return None
        if event == "line":
            self.left -= 1
            if self.left < 0:
                sys.settrace(None)  # once only: what cleans up is not interrupted
                raise self.error
        return self.trace

    def __enter__(self):
        sys.settrace(self.trace)

    def __exit__(self, *exception):
        sys.settrace(None)
