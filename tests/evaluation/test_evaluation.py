"""Perplexity against the definition, window by window."""

from __future__ import annotations

import math

import pytest
import torch
from support.models import VOCABULARY, tiny_model, tokens

from cats_ext import apply_cats, calibrate, masking_disabled, remove_cats
from cats_ext.evaluation.comparison import compare, perplexity


@torch.no_grad()
def by_definition(model, windows) -> tuple[float, int]:
    total, count = 0.0, 0
    for ids in windows:
        logp = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        total -= sum(logp[i, ids[i + 1]].item() for i in range(len(ids) - 1))
        count += len(ids) - 1
    return total / count, count


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("length", [2, 50, 101, 320])
def test_mean_over_predicted_tokens(family, length):
    model, ids = tiny_model(family), tokens(length)
    windows = [w for w in ids.split(50) if len(w) > 1]
    nll, count = by_definition(model, windows)
    for shape in (ids, ids[None]):
        got = perplexity(model, shape, window=50, progress=False)
        assert got.nll == pytest.approx(nll, rel=1e-5)
        assert got.ppl == pytest.approx(math.exp(nll), rel=1e-4)
        assert (got.tokens, got.windows) == (count, len(windows))


def test_windows_longer_than_a_chunk_of_positions():
    model, ids = tiny_model(), tokens(700)
    nll, count = by_definition(model, ids.split(400))
    got = perplexity(model, ids, window=400, progress=False)
    assert got.nll == pytest.approx(nll, rel=1e-5) and got.tokens == count == 698


def test_windows_in_batches():
    model, ids = tiny_model(), tokens(330)
    one, many = (perplexity(model, ids, window=50, batch_size=size, progress=False) for size in (1, 4))
    assert many.nll == pytest.approx(one.nll, rel=1e-6) and (many.tokens, many.windows) == (one.tokens, one.windows)


def test_bos_before_each_window():
    model, ids = tiny_model(), tokens(90)
    nll, count = by_definition(model, [torch.cat([torch.tensor([1]), w]) for w in ids.split(39)])
    got = perplexity(model, ids, window=40, bos_token_id=1, progress=False)
    assert got.nll == pytest.approx(nll, rel=1e-5) and got.tokens == count == 90


def test_max_windows():
    model, ids = tiny_model(), tokens(200)
    assert perplexity(model, ids, window=50, max_windows=2, progress=False) == perplexity(
        model, ids[:100], window=50, progress=False
    )


def test_uniform_model_has_the_vocabulary_as_perplexity():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, tokens(100), progress=False).ppl == pytest.approx(VOCABULARY, rel=1e-5)


def test_low_precision_logits_are_summed_in_float32():
    model, ids = tiny_model(), tokens(400)
    exact = perplexity(model, ids, progress=False).nll
    assert perplexity(model.to(torch.bfloat16), ids, progress=False).nll == pytest.approx(exact, rel=0.02)


def test_sparse_model_differs_and_mode_is_kept():
    model, ids = tiny_model().train(), tokens(300)
    dense = perplexity(model, ids, progress=False)
    assert model.training and all(p.grad is None for p in model.parameters())
    apply_cats(model, calibrate(model, ids, sparsity=0.8, progress=False))
    sparse = perplexity(model, ids, progress=False)
    assert sparse.nll != dense.nll and sparse.tokens == dense.tokens


def test_progress(capsys):
    perplexity(tiny_model(), tokens(100), window=50)
    out, err = capsys.readouterr()
    assert out == "" and "perplexity" in err and "2/2" in err


@pytest.mark.parametrize(
    ("ids", "arguments", "error", "message"),
    [
        (torch.tensor([], dtype=torch.long), {}, ValueError, "input_ids must have at least two tokens, got 0"),
        (tokens(1), {}, ValueError, "input_ids must have at least two tokens, got 1"),
        (tokens(10).view(2, 5), {}, ValueError, r"shape \[T\] or \[1, T\], got \[2, 5\]"),
        (tokens(10).float(), {}, TypeError, "input_ids must be an integer tensor of token ids, got torch.float32"),
        ([1, 2, 3], {}, TypeError, "got list"),
        (tokens(10) + VOCABULARY, {}, ValueError, "input_ids has token id"),
        (tokens(10), dict(window=1), ValueError, "window must be an integer of at least 2, got 1"),
        (tokens(10), dict(max_windows=0), ValueError, "max_windows must be a positive integer, got 0"),
        (tokens(10), dict(batch_size=0), ValueError, "batch_size must be a positive integer, got 0"),
    ],
)
def test_errors(ids, arguments, error, message):
    with pytest.raises(error, match=message):
        perplexity(tiny_model(), ids, **arguments, progress=False)


# --- dense and sparse side by side ----------------------------------------------------------------------------------


@torch.no_grad()
def log_p(model, ids):
    return model(input_ids=ids[None]).logits[0].double().log_softmax(-1)


def test_compare_by_definition():
    model, ids = tiny_model(), tokens(650)
    config = calibrate(model, tokens(300, seed=1), sparsity=0.6, progress=False)
    windows = ids.split(300)
    dense = [log_p(model, w) for w in windows]
    apply_cats(model, config)
    sparse = [log_p(model, w) for w in windows]
    got = compare(model, ids, window=300, progress=False)
    assert got.sparse.ppl == pytest.approx(perplexity(model, ids, window=300, progress=False).ppl, rel=1e-5)
    remove_cats(model)
    assert got.dense.ppl == pytest.approx(perplexity(model, ids, window=300, progress=False).ppl, rel=1e-5)
    assert got.nll_increase == pytest.approx(got.sparse.nll - got.dense.nll, rel=1e-6)
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(dense, sparse, strict=True)])
    agree = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in zip(dense, sparse, strict=True)]).double()
    assert got.kl == pytest.approx(kl.mean().item(), rel=1e-4) and got.kl > 0.001
    assert got.top1 == pytest.approx(agree.mean().item(), abs=1e-6) and got.top1 < 1


def test_standard_error_over_windows_of_equal_length():
    model, ids = tiny_model(), tokens(480)
    apply_cats(model, calibrate(model, ids, progress=False))
    got = compare(model, ids, window=60, progress=False)
    each = [compare(model, w, window=60, progress=False) for w in ids.split(60)]
    for name in ("nll_increase", "kl", "top1"):
        values = torch.tensor([getattr(one, name) for one in each], dtype=torch.float64)
        assert getattr(got, name) == pytest.approx(values.mean().item(), rel=1e-6)
        assert getattr(got, f"{name}_se") == pytest.approx((values.std() / 8**0.5).item(), rel=1e-6)
        assert math.isnan(getattr(each[0], f"{name}_se"))


def test_thresholds_of_zero_change_nothing():
    model = tiny_model()
    apply_cats(model, calibrate(model, tokens(200), sparsity=0, progress=False))
    got = compare(model, tokens(200), window=100, progress=False)
    assert got.kl == pytest.approx(0, abs=1e-6) and got.top1 == 1 and got.nll_increase == pytest.approx(0, abs=1e-6)


def test_masking_is_live_and_can_be_switched_off():
    model, ids = tiny_model(), tokens(20)
    before = log_p(model, ids)
    apply_cats(model, calibrate(model, tokens(300), sparsity=0.7, progress=False))
    sparse = log_p(model, ids)
    assert (sparse - before).abs().max() > 0.05
    with pytest.raises(KeyError, match="inside"), masking_disabled(model):
        torch.testing.assert_close(log_p(model, ids), before)
        raise KeyError("inside")
    assert torch.equal(log_p(model, ids), sparse)


def test_compare_needs_a_patched_model():
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched: call apply_cats first"):
        compare(tiny_model(), tokens(100), progress=False)
