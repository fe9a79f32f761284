"""Accuracy on tasks whose requests are token ids already (quality.task_requests), with any causal model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_POSITIONS = 2048  # of which logits exist at a time: 400 MB of float32 at a vocabulary of 49k


@torch.no_grad()
def scores(
    model: nn.Module, requests: list[tuple[list[int], list[int]]], batch_tokens: int
) -> tuple[list[float], list[bool]]:
    """Log-likelihood of each continuation and whether it is the greedy one; batches sorted by length."""
    device = next(model.parameters()).device
    order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i])))
    score, greedy = [0.0] * len(requests), [False] * len(requests)
    start = 0
    while start < len(order):
        longest = sum(map(len, requests[order[start]])) - 1
        some = order[start : start + max(1, batch_tokens // longest)]
        start += len(some)
        ids = torch.zeros(len(some), longest, dtype=torch.long)
        rows, positions, targets = [], [], []
        for row, i in enumerate(some):
            context, continuation = requests[i]
            whole = (context + continuation)[:-1]
            ids[row, : len(whole)] = torch.tensor(whole)
            rows += [row] * len(continuation)
            positions += range(len(context) - 1, len(whole))
            targets += continuation
        hidden = model.model(input_ids=ids.to(device), use_cache=False).last_hidden_state
        at, wanted = torch.tensor(rows, device=device), torch.tensor(targets, device=device)
        kept = hidden[at, torch.tensor(positions, device=device)].to(model.lm_head.weight.dtype)
        sums, errors = torch.zeros(2, len(some), device=device)
        pieces = (kept.split(_POSITIONS), wanted.split(_POSITIONS), at.split(_POSITIONS))
        for states, tokens, row in zip(*pieces, strict=True):
            log_p = model.lm_head(states).float().log_softmax(-1)
            sums.index_add_(0, row, log_p.gather(1, tokens[:, None])[:, 0])
            errors.index_add_(0, row, (log_p.argmax(-1) != tokens).float())
        for i, value, wrong in zip(some, sums.tolist(), errors.tolist(), strict=True):
            score[i], greedy[i] = value, wrong == 0
    return score, greedy


def answers(model: nn.Module, tasks: dict[str, list[dict[str, Any]]], batch_tokens: int) -> dict[str, list[bool]]:
    """Whether each item of each task is answered right: the likeliest choice, or the greedy continuation."""
    result = {}
    for name, items in tasks.items():
        score, greedy = scores(model, [request for item in items for request in item["requests"]], batch_tokens)
        right, at = [], 0
        for item in items:
            mine = range(at, at + len(item["requests"]))
            at += len(item["requests"])
            if item["answer"] is None:
                right.append(greedy[mine[0]])
            else:
                right.append(max(mine, key=lambda i: score[i]) - mine[0] == int(item["answer"]))
        result[name] = right
    return result
