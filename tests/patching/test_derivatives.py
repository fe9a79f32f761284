"""torch.func and forward-mode derivatives of patched models are those of the formula, for few and many tokens."""

from __future__ import annotations

import pytest
import torch
from support.models import HIDDEN, tiny_model, tokens
from support.patched import config_for, few, layers_of, many
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from cats_ext import apply_cats, masking_disabled, track_sparsity

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["llama", "phi3", "llama-bias"])
def mlp(request):
    model = tiny_model(request.param).double()
    return layers_of(apply_cats(model, config_for(model)))[0].float()


def by_gradients(mlp, x):
    """The Jacobian by reverse mode, which test_training.py compares with the formula."""
    return torch.autograd.functional.jacobian(mlp, x)


@pytest.mark.parametrize("count", [1, 40])
def test_module(mlp, count):
    x, v = torch.randn(2, count, HIDDEN)
    jacobian = by_gradients(mlp, x)
    tangent, cotangent = torch.tensordot(jacobian, v, 2), torch.tensordot(v, jacobian, 2)
    assert tangent.any()
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(jvp(mlp, (x,), (v,))[1], tangent, **close)
    torch.testing.assert_close(vjp(mlp, x)[1](v)[0], cotangent, **close)
    torch.testing.assert_close(grad(lambda x: (mlp(x) * v).sum())(x), cotangent, **close)
    for transform in (jacfwd, jacrev):
        torch.testing.assert_close(transform(mlp)(x), jacobian, **close)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(mlp(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(got, tangent, **close)
    with torch.no_grad(), forward_ad.dual_level():
        got = forward_ad.unpack_dual(mlp(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(got, tangent, **close)


@pytest.mark.parametrize("count", [1, 40])
def test_weights(mlp, count):
    mlp.requires_grad_()
    x = torch.randn(count, HIDDEN)
    mlp(x).square().sum().backward()
    weights = {name: p.detach() for name, p in mlp.named_parameters()}
    got = grad(lambda w: functional_call(mlp, w, (x,)).square().sum())(weights)
    for name, p in mlp.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-4)


def test_an_ensemble():
    models = [layers_of(apply_cats(m, config_for(m)))[0] for m in (tiny_model(), tiny_model())]
    with torch.no_grad():
        models[1].gate_proj.weight.mul_(2)
    x = torch.randn(3, HIDDEN)
    parameters, buffers = stack_module_state(models)
    got = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(got, torch.stack([m(x) for m in models]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("ids", [few()[:, :1], many()], ids=["one", "many"])
def test_whole_models(family, ids):
    """In float64, where no neuron of one way of computing is on the other side of its threshold in another."""
    model = tiny_model(family, torch.float64)
    model.set_attn_implementation("eager")  # torch's kernels of attention and experts have no forward mode
    if family == "mixtral":
        model.set_experts_implementation("eager")
    apply_cats(model, config_for(model))
    embedded = model.get_input_embeddings()(ids).detach()
    direction = torch.randn_like(embedded)

    def loss(x):
        return model(inputs_embeds=x, use_cache=False).logits.square().mean()

    x = embedded.clone().requires_grad_()
    loss(x).backward()
    (slope,) = jvp(loss, (embedded,), (direction,))[1:]
    torch.testing.assert_close(slope, (x.grad * direction).sum(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(grad(loss)(embedded), x.grad, rtol=1e-3, atol=1e-6)
    with masking_disabled(model):
        assert not torch.allclose(jvp(loss, (embedded,), (direction,))[1], slope, rtol=1e-4)


def test_tokens_without_tangents_still_take_the_kernel(called):
    model = tiny_model()
    apply_cats(model, config_for(model))
    with torch.no_grad():
        model(input_ids=tokens(1)[None])
    assert set(called) == {"sparse_mlp"}


@pytest.mark.parametrize("count", [1, 40])
def test_counting_inside_a_transform_is_refused_by_name(mlp, count):
    x = torch.randn(count, HIDDEN)
    for transform in (
        lambda: vmap(mlp)(x[None]),
        lambda: jvp(mlp, (x,), (x,)),
        lambda: grad(lambda x: mlp(x).sum())(x),
    ):
        with track_sparsity(mlp), pytest.raises(RuntimeError, match=r"^neurons cannot be counted inside torch.func's"):
            transform()
        transform()
