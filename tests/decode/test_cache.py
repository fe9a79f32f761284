"""The decode engine's key-value cache: its name among the arguments of a forward, its memory, what it gives out."""

from __future__ import annotations

import inspect

import pytest
import torch
from support.models import tiny_model
from torch import nn

from cats_ext.decode.cache import DecodeCache, cache_argument


class Old(nn.Module):
    def forward(self, input_ids=None, past_key_values=None, cache_position=None):
        pass


class New(nn.Module):
    def forward(self, input_ids=None, cache=None):
        pass


@pytest.mark.parametrize(("kind", "name"), [(Old, "past_key_values"), (New, "cache")])
def test_the_name_of_the_cache(kind, name):
    assert cache_argument(kind()) == name


def test_the_name_of_the_cache_in_transformers():
    model = tiny_model()
    assert cache_argument(model) in inspect.signature(model.forward).parameters


def test_prompts_get_the_filled_part_and_steps_all_of_it():
    cache = DecodeCache(layers=1, max_length=8)
    keys, values = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 5)
    assert cache.nbytes() == 0
    for got, given in zip(cache.update(keys, values, 0), (keys, values), strict=True):
        assert torch.equal(got, given)
    cache.length = 3
    assert cache.get_seq_length() == 3 and cache.nbytes() == 2 * 8 * (4 + 5) * 4
    cache.position = torch.tensor([5])
    all_keys, all_values = cache.update(keys[:, :, :1], values[:, :, :1], 0)
    assert all_keys.shape[2] == all_values.shape[2] == 8
    assert torch.equal(all_keys[:, :, :3], keys) and torch.equal(all_values[:, :, 5], values[:, :, 0])
