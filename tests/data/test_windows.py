"""The data of a calibration: texts and token ids as windows, which of them are used, and every error."""

from __future__ import annotations

import pytest
import torch
from support.models import VOCABULARY, CharacterTokenizer, tiny_model, tokens

from cats_ext import calibrate
from cats_ext._inputs import window_bos
from cats_ext.data.windows import collect_windows, sample_windows


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


def test_the_gradient_passes_take_windows_from_all_over_the_data():
    windows = [torch.full((length,), i) for i, length in enumerate([10] * 9 + [4])]

    def taken(budget):
        return [int(window[0]) for window in sample_windows(windows, budget)]

    assert taken(1) == [0] and taken(30) == [0, 2, 5, 7] and taken(94) == taken(1000) == list(range(10))


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


def test_text_needs_a_tokenizer():
    with pytest.raises(TypeError, match="tokenizer must be given when data is text, got None"):
        calibrate(tiny_model(), TEXT, progress=False)


def test_window_bos_only_where_the_tokenizer_adds_one():
    assert window_bos(CharacterTokenizer(bos=True)) == 1
    assert window_bos(CharacterTokenizer(bos=False)) is None
    assert window_bos(None) is None
