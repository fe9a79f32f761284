"""The fused step of a model whose linear layers are QuantizedLinear computes what these layers compute as modules."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import tiny_model, tokens
from torch import Tensor, nn

import cats_ext
from cats_ext.decode import fused as decode_fused
from cats_ext.decode.engine import DecodeEngine
from cats_ext.decode.fused import FusedStep, NotFusableError
from cats_ext.ops.plan import packed_linear_supported
from cats_ext.rows import FORMATS, QuantizedLinear, RowFormat

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FAMILIES = ["llama", "llama-bias", "qwen2", "qwen3", "phi3", "smollm3"]
SIZES = {"hidden_size": 128, "intermediate_size": 384}
PROMPT, LENGTH = 20, 32
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}  # of logits, relative

pytestmark = pytest.mark.usefixtures("one_thread")


def quantised(model: nn.Module, name: str, *, scope: str = "all", head: str = "int8_g64") -> nn.Module:
    """``model`` with QuantizedLinear in the place of its linear layers; scope: all, mlp or attention."""
    for path, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or (scope not in ("all", "mlp") and ".mlp." in path):
            continue
        if scope == "mlp" and ".mlp." not in path:
            continue
        form = RowFormat.parse(head if path == "lm_head" else name)
        made = QuantizedLinear.from_linear(linear, form, input_rows=path.endswith("down_proj"))
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, made)
    return model


@torch.no_grad()
def fused_logits(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the fused step for each token but the first, and those of the model itself."""
    layers, config = model.config.num_hidden_layers, model.config
    head_dim = model.model.layers[0].self_attn.head_dim
    caches = [
        [torch.zeros(config.num_key_value_heads, LENGTH, head_dim, dtype=model.dtype, device=model.device)] * 1
        for _ in range(2 * layers)
    ]
    keys, values = [c[0] for c in caches[:layers]], [c[0] for c in caches[layers:]]
    step = FusedStep(model, keys, values)
    ids = ids.to(model.device)
    logits = [step(ids[0, i : i + 1], torch.tensor([i], device=model.device)).clone() for i in range(ids.shape[1])]
    return torch.stack(logits), model(ids).logits[0]


def assert_same_logits(model: nn.Module, tolerance: float = 1.0) -> None:
    """Up to ``tolerance`` times ``TOLERANCE``."""
    got, expected = fused_logits(model, tokens(PROMPT)[None])
    error = (got.float() - expected.float()).norm() / expected.float().norm()
    assert error <= tolerance * TOLERANCE[model.dtype], f"relative error {error:.1e}"


def half_on(device: str, dtype: torch.dtype) -> torch.dtype:
    """The kernels on CUDA take half precision only."""
    return torch.bfloat16 if device == "cuda" and dtype == torch.float32 else dtype


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name, dtype, device):
    model = quantised(tiny_model(dtype=half_on(device, dtype), **SIZES).to(device), name)
    assert_same_logits(model)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scope", ["all", "attention", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_mixtures_with_dense_layers(family, scope, device):
    dtype = half_on(device, torch.float32)
    model = quantised(tiny_model(family, dtype=dtype, **SIZES).to(device), "int4_g64_zp", scope=scope)
    assert_same_logits(model)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tied", [False, True])
def test_sizes_that_are_no_multiple_of_128_and_tied_heads(tied, device):
    sizes = {"hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 352, "tie_word_embeddings": tied}
    model = tiny_model(dtype=half_on(device, torch.float32), **sizes).to(device)
    model = quantised(model, "int4_g32", scope="all" if not tied else "attention")
    if tied:
        model.lm_head = nn.Linear(192, model.config.vocab_size, bias=False, device=device, dtype=model.dtype)
        model.tie_weights()
    assert_same_logits(model)


@pytest.mark.parametrize("device", DEVICES)
def test_projections_of_different_formats(device):
    model = tiny_model("qwen2", dtype=half_on(device, torch.float32), **SIZES).to(device)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_proj = QuantizedLinear.from_linear(attention.q_proj, FORMATS["int4_g32"])
        attention.v_proj = QuantizedLinear.from_linear(attention.v_proj, FORMATS["int8_g64"])
    assert_same_logits(model)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_patched(family, device, monkeypatch):
    model, calls = quantised(tiny_model(family, dtype=half_on(device, torch.float32), **SIZES), "int4_g64"), []
    model = model.to(device)
    config = cats_ext.calibrate(model, [tokens(256)], sparsity=0.5, progress=False)
    cats_ext.apply_cats(model, config)
    op = decode_fused.sparse_mlp_packed_step
    monkeypatch.setattr(decode_fused, "sparse_mlp_packed_step", lambda *args: calls.append(args) or op(*args))
    assert_same_logits(model)
    assert {args[8] for args in calls} == {"int4_g64"} and all((args[10] > 0).all() for args in calls)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_reaches_the_logits(device):
    model = quantised(tiny_model(dtype=half_on(device, torch.float32), **SIZES).to(device), "int4_g64")
    model.model.layers[1].self_attn.o_proj.weight[3, :2] = 0x7F  # a scale
    got, expected = fused_logits(model, tokens(3)[None])
    assert got.isnan().all() and expected.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_same_tokens_as_generate(device):
    model = quantised(tiny_model(dtype=half_on(device, torch.float32), **SIZES).to(device), "int8_g64")
    ids = tokens(PROMPT)[None].to(device)
    engine = DecodeEngine(model, fused=True)
    out = engine.generate(ids, max_new_tokens=8)
    assert engine.fused_active
    if device == "cpu":  # in half precision two almost equally likely tokens can change places
        assert torch.equal(out, model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("family", ["llama", "llama-bias", "phi3", "llama-tied"])
def test_quantize_all_then_patch(family, weights, device):
    family, tied = family.removesuffix("-tied"), family.endswith("tied")
    model = tiny_model(family, dtype=half_on(device, torch.float32), **SIZES, tie_word_embeddings=tied).to(device)
    cats_ext.quantize(model, weights, scope="all", progress=False)
    assert_same_logits(model)
    ids = tokens(PROMPT)[None].to(device)
    engine = DecodeEngine(model, fused=True)
    for sparsity in (None, 0.3, 0.7):  # dense, patched, and changed in place
        if sparsity == 0.3:
            cats_ext.apply_cats(model, cats_ext.calibrate(model, [tokens(256)], sparsity=0.5, progress=False))
        if sparsity is not None:
            cats_ext.set_sparsity(model, sparsity)
            # Rounding to bfloat16 carries neurons over their thresholds: the prompt is computed another way. A wrong
            # mask gives 0.5 and more.
            assert_same_logits(model, 1 if device == "cpu" else 3)
        out = engine.generate(ids, max_new_tokens=8)
        assert engine.fused_active
        if device == "cpu":
            assert torch.equal(out, model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8))


@pytest.mark.parametrize("path", ["self_attn.q_proj", "mlp.down_proj", "mlp.gate_proj"])
@pytest.mark.parametrize("change", ["in place", "data", "module", "format"])
def test_changed_rows_are_noticed(path, change):
    model, ids = quantised(tiny_model(**SIZES), "int4_g64"), tokens(PROMPT)[None]
    engine = DecodeEngine(model, fused=True)
    engine.generate(ids, max_new_tokens=4)
    layer = model.model.layers[1]
    linear = layer.get_submodule(path)
    other = tiny_model(seed=7, **SIZES).model.layers[1].get_submodule(path)
    form = FORMATS["int4_g128_zp" if change == "format" else "int4_g64"]  # their rows have the same bytes
    made = QuantizedLinear.from_linear(other, form, input_rows=path == "mlp.down_proj")
    if change == "module":
        parent, _, child = path.rpartition(".")
        setattr(layer.get_submodule(parent), child, made)
    elif change == "data":
        linear.weight.data = made.weight.data
    else:
        linear.weight.copy_(made.weight)
        linear.row_format = made.row_format
    out = engine.generate(ids, max_new_tokens=12)
    assert torch.equal(out, DecodeEngine(copy.deepcopy(model), fused=True).generate(ids, max_new_tokens=12))


def test_refusals():
    model = quantised(tiny_model(**SIZES), "int4_g64")
    form = FORMATS["int4_g64"]
    model.model.layers[1].self_attn.o_proj = QuantizedLinear(128, 128, form, input_rows=True)
    with pytest.raises(NotFusableError, match=r"layers\.1\.self_attn\.o_proj has packed rows of inputs"):
        decode_fused.check_fusable(model)


@pytest.mark.gpu
def test_what_the_kernel_takes():
    weight = torch.empty(0, device="cuda")
    assert packed_linear_supported(weight, 4096, torch.bfloat16)
    assert not packed_linear_supported(weight, 4096, torch.float32)
    assert not packed_linear_supported(weight, 20, torch.bfloat16)
    model = quantised(tiny_model(**SIZES).cuda(), "int4_g64")
    with pytest.raises(NotFusableError, match=r"has packed rows of 128 columns, and its dtype is torch.float32"):
        decode_fused.check_fusable(model)


@pytest.mark.parametrize("weights", ["dense", "packed"])
def test_a_hook_on_the_activation_is_called(weights):
    model = tiny_model(**SIZES)
    model = quantised(model, "int8_g64") if weights == "packed" else model
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda _, args, y: 2 * y if args[0].dim() > 1 else None)
    assert_same_logits(model)
