"""Training patched models: gradients of the masked formula, what is saved for backward, and how people train."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from types import MethodType

import pytest
import torch
from support.data_parallel import batch, patched_network, train
from support.models import HIDDEN, INTERMEDIATE, tiny_model
from support.patched import config_for, few, layers_of, many

from cats_ext import apply_cats, functional, ops
from cats_ext.ops import reference
from cats_ext.ops.definitions import masked_product

pytestmark = pytest.mark.usefixtures("one_thread")


def plain_forward(mlp, x):
    """The MLP by its formula, in PyTorch operations that autograd knows."""
    if "gate_up_proj" in mlp._modules:
        gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    v = reference.ACTIVATIONS[mlp.forward_settings.activation](gate)
    h = v * up
    keep = v.detach().abs() >= mlp.threshold
    if mlp.down_threshold is not None:
        keep &= h.detach().abs() >= mlp.down_threshold
    return mlp.down_proj(h * keep)


def patched_and_plain(family="llama", rule="two_threshold", dtype=torch.float64):
    model = tiny_model(family).to(dtype)
    apply_cats(model, config_for(model, rule=rule))
    plain = copy.deepcopy(model)
    for mlp in layers_of(plain):
        mlp.forward = MethodType(plain_forward, mlp)
    return model, plain


def step(model, ids, **named):
    """The loss and every parameter's gradient, by name."""
    loss = model(input_ids=ids, labels=ids, use_cache=False, **named).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(got, want, **tolerance):
    torch.testing.assert_close(got[0], want[0], **tolerance)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        torch.testing.assert_close(got[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("ids", [few(), many()], ids=["few", "many"])  # few run on the kernel without gradients
@pytest.mark.parametrize(("family", "rule"), [("llama", "plain"), ("phi3", "two_threshold"), ("gemma", "weighted")])
def test_gradients_are_those_of_the_plain_formula(family, rule, ids):
    model, plain = patched_and_plain(family, rule)
    got, want = step(model.train(), ids), step(plain.train(), ids)
    assert_same_step(got, want)
    assert all(gradient.any() for gradient in got[1].values())


def test_a_step_changes_the_weights_that_the_kernel_reads(called):
    model = tiny_model()
    apply_cats(model, config_for(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss, _ = step(model, many())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(mlp.down_proj.weight.t().is_contiguous() for mlp in layers_of(model))
    called.clear()
    with torch.no_grad():
        sparse = model(input_ids=few()).logits
        assert set(called) == {"sparse_mlp"}
        for mlp in layers_of(model):
            mlp.forward = MethodType(plain_forward, mlp)
        torch.testing.assert_close(sparse, model(input_ids=few()).logits, rtol=1e-4, atol=1e-4)


def test_no_gradient_for_thresholds():
    gate, up = (torch.randn(3, 7, requires_grad=True) for _ in range(2))
    thresholds = [torch.full((7,), 0.1, requires_grad=True) for _ in range(2)]
    ops.gated_threshold(gate, up, *thresholds).sum().backward()
    assert gate.grad.any() and up.grad.any() and all(threshold.grad is None for threshold in thresholds)
    assert not any("threshold" in name for name, _ in tiny_patched().named_parameters())


def test_the_op_that_is_for_inference_warns_that_it_has_no_gradient():
    x, weights = torch.randn(1, 8, requires_grad=True), [torch.randn(6, 8) for _ in range(3)]
    with pytest.warns(UserWarning, match=r"cats::sparse_mlp: an autograd kernel was not registered"):
        ops.sparse_mlp(x, *weights, torch.tensor(0.1)).sum().backward()
    assert x.grad is None
    functional.sparse_mlp(x, *weights, torch.tensor(0.1)).sum().backward()
    assert x.grad.any()


def test_a_second_derivative_is_refused():
    gate, up = (torch.randn(3, 7, requires_grad=True) for _ in range(2))
    threshold = torch.tensor(0.1)
    for h in (ops.gated_threshold(gate, up, threshold), masked_product(gate, up, threshold, None, "silu")):
        first = torch.autograd.grad(h.square().sum(), (gate, up), create_graph=True)
        assert all(gradient.any() for gradient in first)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            sum(gradient.sum() for gradient in first).backward()


def tiny_patched(rule="two_threshold", dtype=torch.float32):
    model = tiny_model(dtype=dtype)
    return apply_cats(model, config_for(model, rule=rule))


def saved_bytes(mlp, x) -> int:
    """Bytes kept for backward besides parameters and buffers, each memory counted once."""
    own = {t.untyped_storage().data_ptr() for t in (*mlp.parameters(), *mlp.buffers())}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp(x)
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["plain", "two_threshold"])
@pytest.mark.parametrize("trained", ["all", "gate and up"])
def test_no_more_is_saved_for_backward_than_without_patching(rule, trained, dtype):
    dense, patched = tiny_model(dtype=dtype).model.layers[0].mlp, layers_of(tiny_patched(rule, dtype))[0]
    x = torch.randn(2, 50, HIDDEN, dtype=dtype, requires_grad=True)
    for mlp in (dense, patched):
        mlp.down_proj.weight.requires_grad_(trained == "all")
    element = x.element_size() * 100 * INTERMEDIATE
    before, after = saved_bytes(dense, x), saved_bytes(patched, x)
    # Dense: x, gate, act(gate), up, and h for the down projection. Patched: the same without act(gate).
    assert before - after == element and after == x.nbytes + (3 if trained == "all" else 2) * element


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing(reentrant):
    model, plain = patched_and_plain()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same_step(step(model.train(), many()), step(plain.train(), many()))


def test_autocast():
    model, plain = patched_and_plain(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = step(model, many()), step(plain, many())
    assert all(gradient.dtype == torch.float32 for gradient in got[1].values())
    for name, gradient in want[1].items():  # a value next to its threshold may be rounded to either side
        assert (got[1][name] - gradient).norm() < 0.2 * gradient.norm(), name


def test_compiled_step():
    model, plain = patched_and_plain()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss, _ = step(compiled, many())
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_step((loss, found), step(plain, many()))


def test_lora_with_a_frozen_base():
    from peft import LoraConfig, get_peft_model

    steps = []
    for model in patched_and_plain():
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
        steps.append(step(adapted.to(torch.float64), many()))
    assert_same_step(*steps)
    assert all("lora_" in name for name in steps[0][1])


@pytest.mark.slow  # two processes that import torch
@pytest.mark.parametrize("method", ["ddp", "fsdp"])
def test_two_processes(method, tmp_path):
    """With half a batch each they train as one with all of it."""
    script = [sys.executable, str(Path(__file__).parents[1] / "support" / "data_parallel.py")]
    arguments = [method, str(tmp_path / "store"), str(tmp_path / "weights")]
    processes = [subprocess.Popen([*script, str(rank), *arguments]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    network = patched_network()
    start, found = copy.deepcopy(network.state_dict()), torch.load(tmp_path / "weights")
    for name, weight in train(network, batch()).items():
        torch.testing.assert_close(found[name], weight)
        assert (weight - start[name]).abs().max() > 1e-3
