"""calibrate: thresholds against exact quantiles of the activations, every form of data, and every error."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support.models import HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, CharacterTokenizer, tiny_model, tokens

from cats_ext import (
    CatsConfig,
    SparsityDriftWarning,
    apply_cats,
    calibrate,
    remove_cats,
    sparsity_report,
    track_sparsity,
)
from cats_ext.calibration.data import collect_windows
from cats_ext.ops.reference import ACTIVATIONS
from cats_ext.patching.detection import find_gated_mlps
from cats_ext.thresholds.rules import sparsity_split

BUCKET = 2**-9


def gate_and_up(model, ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Exact |act(gate)| and up of every MLP, [tokens, I], found by running the model's own MLP inputs again."""
    inputs, result = {}, {}
    mlps = find_gated_mlps(model)
    with contextlib.ExitStack() as stack:
        for mlp in mlps:
            keep = lambda module, args, name=mlp.name: inputs.__setitem__(name, args[0])  # noqa: E731
            stack.callback(mlp.module.register_forward_pre_hook(keep).remove)
        with torch.no_grad():
            model(input_ids=ids)
            for mlp in mlps:
                x = inputs[mlp.name].reshape(-1, HIDDEN)
                module = mlp.module
                outputs = {
                    n: getattr(module, n)(x) for n in ("gate_proj", "up_proj", "gate_up_proj") if hasattr(module, n)
                }
                gate, up = mlp.gate_and_up(outputs)
                result[mlp.name] = (ACTIVATIONS[mlp.activation](gate.float()).abs(), up.float())
    return result


def exact_quantile(values: torch.Tensor, q: float) -> float:
    return float(values.detach().flatten().sort().values[int(q * values.numel())])


def assert_in_bucket(got: float, exact: float) -> None:
    """Up to the rounding of a batch of another size, which may cross a bucket's edge."""
    assert got == pytest.approx(exact, rel=BUCKET + 1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "llama-bias"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
def test_plain_threshold_is_the_quantile_of_the_gate(family, sparsity):
    model, ids = tiny_model(family), tokens(600)
    config = calibrate(model, ids, rule="plain", sparsity=sparsity, sequence_length=200, batch_size=2, progress=False)
    exact = gate_and_up(model, ids.view(3, 200))
    assert list(config.thresholds) == list(exact)
    for name, (v, _) in exact.items():
        assert config.thresholds[name].shape == ()
        assert_in_bucket(float(config.thresholds[name]), exact_quantile(v, sparsity))
        assert config.statistics[name].gate.total == 600 * INTERMEDIATE
    assert config.down_thresholds == {}
    assert config.bytes_share == pytest.approx(1 - 2 * sparsity / 3)
    assert config.calibration["tokens"] == 600 and config.calibration["windows"] == 3


@pytest.mark.parametrize("weighted", [False, True])
def test_two_thresholds(weighted):
    model, ids = tiny_model(), tokens(600)
    powers = dict(gate_power=int(weighted), last_gate_power=int(weighted), importance="norm")
    config = calibrate(model, ids, rule="two_threshold", **powers, sequence_length=200, batch_size=3, progress=False)
    modules = dict(model.named_modules())
    for name, (v, u) in gate_and_up(model, ids.view(3, 200)).items():
        norm = modules[name].down_proj.weight.detach().norm(dim=0)
        weight = u.square().mean(0).sqrt() * norm if weighted else torch.ones(INTERMEDIATE)
        gate_cut = exact_quantile(v * weight, 0.375)
        for j in (0, 7, INTERMEDIATE - 1):
            threshold = config.thresholds[name][j] if weighted else config.thresholds[name]
            assert_in_bucket(float(threshold), gate_cut / float(weight[j]))
        contribution = torch.where(v >= config.thresholds[name], v * u.abs() * norm, 0)
        down_cut = exact_quantile(contribution, 0.625)
        assert config.down_thresholds[name].shape == (INTERMEDIATE,)
        for j in (0, 7, INTERMEDIATE - 1):
            assert_in_bucket(float(config.down_thresholds[name][j]), down_cut / float(norm[j]))
        assert (config.layers[name].up_sparsity, config.layers[name].down_sparsity) == (0.375, 0.625)
    assert config.bytes_share == pytest.approx(2 / 3)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
@pytest.mark.parametrize(
    ("rule", "power", "importance"),
    [
        ("plain", 0, "norm"),
        ("weighted", 1, "norm"),
        ("two_threshold", 0, "norm"),
        ("two_threshold", 0.5, "norm"),
        ("two_threshold", 0.5, "gradient"),
    ],
)
def test_first_layer_reaches_its_target_on_the_same_text(family, rule, power, importance):
    # Later layers see inputs changed by the earlier masks; on a random network that moves their sparsity.
    model, ids = tiny_model(family), tokens(900)
    arguments = dict(rule=rule, gate_power=power, importance=importance, sequence_length=300, progress=False)
    config = calibrate(model, ids, sparsity=0.6, **arguments)
    apply_cats(model, config)
    with track_sparsity(model), torch.no_grad():
        model(input_ids=ids.view(3, 300))
    layer = sparsity_report(model).layers[0]
    # A bucket holds up to 2 % of the values where |silu| turns back (see test_histogram.py), else less than 0.5 %.
    assert layer.up_sparsity == pytest.approx(layer.up_target, abs=0.01)
    assert layer.down_sparsity == pytest.approx(layer.down_target, abs=0.01)
    assert layer.up_target + layer.down_target == pytest.approx(1.2)


def test_sparsity_zero_sets_thresholds_of_zero():
    for rule in ("plain", "weighted", "two_threshold"):
        config = calibrate(tiny_model(), tokens(200), sparsity=0, rule=rule, progress=False)
        assert all((t == 0).all() for t in (*config.thresholds.values(), *config.down_thresholds.values()))


def test_exact_zeros_of_relu_are_skipped():
    model = tiny_model("llama-relu")
    config = calibrate(model, tokens(400), sparsity=0.2, sequence_length=200, progress=False)
    zeros = gate_and_up(model, tokens(400).view(2, 200))
    for name, threshold in config.thresholds.items():
        assert (zeros[name][0] == 0).float().mean() > 0.3  # more than asked for, and dropping them changes nothing
        assert ((threshold > 0) & (threshold < 1e-30)).all()


def test_a_neuron_without_a_down_row_is_dropped():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 5] = 0
    config = calibrate(model, tokens(300), rule="two_threshold", gate_power=1, progress=False)
    name = "model.layers.1.mlp"
    assert config.thresholds[name][5] == config.down_thresholds[name][5] == torch.inf
    assert config.thresholds[name].isfinite().sum() == INTERMEDIATE - 1
    apply_cats(model, config)
    with torch.no_grad():
        assert model(input_ids=tokens(9)[None]).logits.isfinite().all()


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, tokens(200), progress=False)
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError):
        calibrate(model, tokens(20), progress=False)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    config = calibrate(
        tiny_model(dtype=dtype), tokens(300), rule="two_threshold", gate_power=1, importance="norm", progress=False
    )
    assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in config.thresholds.values())
    exact = calibrate(tiny_model(), tokens(300), rule="two_threshold", gate_power=1, importance="norm", progress=False)
    for name in config.thresholds:
        torch.testing.assert_close(config.thresholds[name], exact.thresholds[name], rtol=0.05, atol=0)


def test_progress_has_a_bar_for_each_pass_on_standard_error(capsys):
    calibrate(tiny_model(), tokens(200), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert all(f"pass {number} of 4" in err for number in (1, 2, 3, 4))
    calibrate(tiny_model(), tokens(200), progress=False)
    assert capsys.readouterr().err == ""


def test_windows_are_no_longer_than_the_model_has_positions():
    config = calibrate(tiny_model(), tokens(1200), progress=False)
    assert config.calibration["sequence_length"] == 512 and config.calibration["windows"] == 3


# --- how sparsity is shared -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.3, 0.5, 0.9, 0.99])
def test_both_rules_read_the_same_bytes(sparsity):
    up, down = sparsity_split(sparsity, "two_threshold")
    assert 0 <= up <= down < 1
    assert up + down == pytest.approx(2 * sparsity)
    assert sparsity_split(sparsity, "plain") == (sparsity, sparsity)


def test_explicit_down_sparsity():
    assert sparsity_split(0.5, "two_threshold", 0.7) == pytest.approx((0.3, 0.7))
    for down in (0.4, 0.95):
        with pytest.raises(ValueError, match=f"down_sparsity must be in .*0.45, 0.9.* got {down}"):
            sparsity_split(0.45, "two_threshold", down)


# --- data -----------------------------------------------------------------------------------------------------------


def windows(data, tokenizer=None, sequence_length=100, max_tokens=10**6, seed=0) -> list[list[int]]:
    return [w.tolist() for w in collect_windows(data, tokenizer, sequence_length, max_tokens, seed)]


TEXT = "".join(chr(97 + (i * i) % 26) for i in range(730))
IDS = CharacterTokenizer()(TEXT)["input_ids"]


def test_text_is_joined_and_cut():
    expected = [IDS[i : i + 100] for i in range(0, 730, 100)]
    assert windows(TEXT, CharacterTokenizer()) == expected
    assert windows([TEXT[:130], TEXT[130:131], "", TEXT[131:]], CharacterTokenizer()) == expected
    assert windows((TEXT[i : i + 9] for i in range(0, 730, 9)), CharacterTokenizer()) == expected


def test_every_window_starts_with_bos_if_the_tokenizer_adds_it():
    got = windows(TEXT, CharacterTokenizer(bos=True))
    assert all(len(w) <= 100 and w[0] == 1 for w in got)
    assert [i for w in got for i in w[1:]] == IDS


@pytest.mark.parametrize(
    "data",
    [
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32)[None],
        [torch.tensor(IDS[:500]), torch.tensor(IDS[500:])],
        iter([{"input_ids": torch.tensor(IDS)}]),
        {"input_ids": torch.tensor([IDS]), "attention_mask": torch.ones(1, 730)},
    ],
    ids=["1d", "2d", "list", "iterator of dicts", "dict"],
)
def test_token_ids(data):
    assert windows(data) == [IDS[i : i + 100] for i in range(0, 730, 100)]


def test_short_sequences_stay_apart_and_padding_is_left_out():
    ids = torch.tensor([IDS[:60], IDS[60:120], IDS[120:180]])
    mask = torch.ones(3, 60, dtype=torch.long)
    mask[0, :20] = 0  # left
    mask[1, 45:] = 0  # right
    mask[2] = 0
    more = torch.tensor([IDS[200:290]])
    got = windows([{"input_ids": ids, "attention_mask": mask}, more])
    assert got == [IDS[20:60], IDS[60:105], IDS[200:290]]


def assert_equal(one: CatsConfig, other: CatsConfig) -> None:
    for left, right in ((one.thresholds, other.thresholds), (one.down_thresholds, other.down_thresholds)):
        assert list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_padding_does_not_change_thresholds():
    model, ids = tiny_model(), tokens(150)
    padded = torch.zeros(1, 190, dtype=torch.long)
    padded[0, 40:] = ids
    mask = (torch.arange(190) >= 40).long()[None]
    without = calibrate(model, ids, progress=False)
    with_padding = calibrate(model, [{"input_ids": padded, "attention_mask": mask}], progress=False)
    assert_equal(with_padding, without)
    assert with_padding.calibration["tokens"] == 150


def test_max_tokens_is_exact_and_the_seed_chooses():
    everything = windows(TEXT, CharacterTokenizer(), max_tokens=730)
    some = windows(TEXT, CharacterTokenizer(), max_tokens=250, seed=1)
    assert sum(map(len, some)) == 250
    assert all(any(w == e[: len(w)] for e in everything) for w in some)
    assert some == windows(TEXT, CharacterTokenizer(), max_tokens=250, seed=1)
    chosen = [windows(TEXT, CharacterTokenizer(), max_tokens=250, seed=s) for s in range(6)]
    assert len({str(c) for c in chosen}) > 3


def test_an_iterator_is_read_in_order_and_no_further_than_needed():
    read = []

    def endless():
        while True:
            read.append(1)
            yield torch.tensor(IDS[:90])

    assert windows(endless(), max_tokens=200) == [IDS[:90], IDS[:90], IDS[:20]]
    assert len(read) == 3


def test_equal_arguments_give_equal_thresholds_and_batches_do_not_matter():
    model = tiny_model()
    text = "".join(map(chr, torch.randint(32, 127, (3000,), generator=torch.Generator().manual_seed(0)).tolist()))
    arguments = dict(tokenizer=CharacterTokenizer(), max_tokens=600, sequence_length=120, progress=False)
    first, again, other = (calibrate(model, text, seed=seed, **arguments) for seed in (3, 3, 4))
    assert_equal(first, again)
    assert not torch.equal(*(next(iter(config.thresholds.values())) for config in (first, other)))
    batched = calibrate(model, text, seed=3, batch_size=4, **arguments)
    for name, threshold in first.thresholds.items():
        torch.testing.assert_close(batched.thresholds[name], threshold, rtol=2 * BUCKET, atol=0)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(sparsity=1.0), ValueError, r"sparsity must be in \[0, 1\), got 1.0"),
        (dict(sparsity=-0.1), ValueError, r"sparsity must be in \[0, 1\), got -0.1"),
        (dict(sparsity=float("nan")), ValueError, r"sparsity must be in \[0, 1\), got nan"),
        (dict(sparsity="0.5"), TypeError, r"sparsity must be a number in \[0, 1\), got '0.5'"),
        (dict(rule="best"), ValueError, "rule must be one of plain, weighted, two_threshold, got 'best'"),
        (
            dict(rule="plain", down_sparsity=0.6),
            ValueError,
            "down_sparsity is for the rule 'two_threshold', got 0.6 with 'plain'",
        ),
        (dict(rule="two_threshold", down_sparsity=1.2), ValueError, r"down_sparsity must be in \[0, 1\), got 1.2"),
        (dict(max_tokens=0), ValueError, "max_tokens must be a positive integer, got 0"),
        (dict(max_tokens=100), ValueError, r"at least 128 tokens.* got 100 \(max_tokens is 100\)"),
        (dict(sequence_length=-1), ValueError, "sequence_length must be a positive integer, got -1"),
        (dict(batch_size=1.5), ValueError, "batch_size must be a positive integer, got 1.5"),
    ],
)
def test_argument_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        calibrate(tiny_model(), tokens(300), **{"sequence_length": 100, **arguments}, progress=False)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("", ValueError, "at least 128 tokens, and better some thousands, got 0"),
        ([], ValueError, "at least 128 tokens.* got 0"),
        ("short text", ValueError, "at least 128 tokens.* got 10"),
        (tokens(127), ValueError, "got 127"),
        (17, TypeError, "data must be a text, or an iterable .* got int"),
        ([[1, 2, 3]], TypeError, "data must be an integer tensor of token ids, got list"),
        ([torch.rand(200)], TypeError, "data must be an integer tensor of token ids, got torch.float32"),
        ([{"text": "a"}], TypeError, "mapping without input_ids; its keys are text"),
        (torch.ones(2, 3, 4, dtype=torch.long), ValueError, r"shape \[T\] or \[B, T\], got \[2, 3, 4\]"),
        (
            {"input_ids": tokens(200), "attention_mask": torch.ones(3)},
            ValueError,
            r"attention_mask in the shape of input_ids \[200\], got \[3\]",
        ),
        (
            torch.full((200,), VOCABULARY),
            ValueError,
            f"token id {VOCABULARY}, but the model's vocabulary has {VOCABULARY}",
        ),
        (torch.full((200,), -100), ValueError, "token id -100"),
    ],
    ids=lambda value: None,
)
def test_data_errors(data, error, message):
    with pytest.raises(error, match=message):
        calibrate(tiny_model(), data, tokenizer=CharacterTokenizer(), progress=False)


def test_the_tokenizer_of_another_model_is_refused():
    class Other(CharacterTokenizer):
        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            return {"input_ids": [VOCABULARY + i for i in super().__call__(text, **options)["input_ids"]]}

    with pytest.raises(ValueError, match=rf"token id \d+, but the model's vocabulary has {VOCABULARY}"):
        calibrate(tiny_model(), TEXT, tokenizer=Other(), progress=False)


def test_without_gradients_norms_are_the_weights():
    whole = tiny_model()
    assert calibrate(whole, tokens(300), progress=False).importance == "gradient"
    without = calibrate(whole.model, tokens(300), progress=False)
    assert without.importance == "norm" and "search" not in without.calibration and without.sparsity == 0.5
    with pytest.raises(ValueError, match=r"without an output layer .* got 'gradient' and 'uniform'"):
        calibrate(whole.model, tokens(300), importance="gradient", progress=False)
    with pytest.raises(ValueError, match=r"without an output layer .* got 'norm' and 'search'"):
        calibrate(whole.model, tokens(300), budget=0.6, progress=False)
    with torch.inference_mode():
        inside = calibrate(whole, tokens(300), progress=False)
        assert inside.importance == "gradient"
        assert calibrate(tiny_model(), tokens(300), progress=False).importance == "norm"


def test_text_needs_a_tokenizer():
    with pytest.raises(TypeError, match="tokenizer must be given when data is text, got None"):
        calibrate(tiny_model(), TEXT, progress=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", ["plain", "two_threshold"])
def test_not_finite_activations_name_the_layer(bad, rule):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.gate_proj.weight[3] = bad
    with pytest.raises(ValueError, match=r"activations of model.layers.2.mlp: \d+ of \d+ values are NaN or infinite"):
        calibrate(model, tokens(200), rule=rule, progress=False)
    assert all(not module._forward_hooks for module in model.modules())


def test_all_zero_layer_is_named():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.zero_()
    with pytest.raises(ValueError, match=r"all gate activations of model.layers.1.mlp are zero"):
        calibrate(model, tokens(200), progress=False)


def test_all_equal_layer_is_kept_whole_and_warned_of():
    model = tiny_model("llama-bias")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.zero_()
        model.model.layers[1].mlp.gate_proj.bias.fill_(1.5)
    message = r"gate activations of model\.layers\.1\.mlp are equal that its threshold drops 0\.0% of them, not 50\.0%"
    with pytest.warns(SparsityDriftWarning, match=message):
        config = calibrate(model, tokens(200), rule="plain", progress=False)
    apply_cats(model, config)
    with track_sparsity(model), torch.no_grad():
        model(input_ids=tokens(50)[None])
    assert sparsity_report(model).layers[1].up_sparsity == 0


def test_a_layer_that_no_token_reaches_is_named():
    model = tiny_model()
    model.model.layers = model.model.layers[:2]
    model.unused = torch.nn.ModuleDict({"mlp": tiny_model(seed=1).model.layers[0].mlp})
    for rule, importance in (("plain", "norm"), ("weighted", "norm"), ("two_threshold", "gradient")):
        with pytest.raises(ValueError, match=r"no token of the data reached unused.mlp"):
            calibrate(model, tokens(200), rule=rule, importance=importance, progress=False)


def test_patched_model_is_refused():
    model = tiny_model()
    apply_cats(model, calibrate(model, tokens(200), progress=False))
    with pytest.raises(ValueError, match="LlamaForCausalLM is patched already: call remove_cats first"):
        calibrate(model, tokens(200), progress=False)
    remove_cats(model)
    assert len(calibrate(model, tokens(200), progress=False).thresholds) == LAYERS
