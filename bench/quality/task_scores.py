"""Accuracy on tasks whose requests are token ids already (quality.task_requests), with any causal model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_POSITIONS = 2048  # of which logits exist at a time: 400 MB of float32 at a vocabulary of 49k
Request = tuple[list[int], list[int]]  # context, continuation


@torch.no_grad()
def continuations(
    model: nn.Module, requests: list[Request], batch_tokens: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of requests of like length; for each token of a continuation: its request, itself, the state before it.

    States are ``[N, H]``, what the model's ``lm_head`` takes.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i])))
    while order:
        longest = sum(map(len, requests[order[0]])) - 1
        count = max(1, batch_tokens // longest)
        some, order = order[:count], order[count:]
        ids = torch.zeros(len(some), longest, dtype=torch.long)
        rows, positions, targets = [], [], []
        for row, i in enumerate(some):
            context, continuation = requests[i]
            whole = (context + continuation)[:-1]
            ids[row, : len(whole)] = torch.tensor(whole)
            rows += [row] * len(continuation)
            positions += range(len(context) - 1, len(whole))
            targets += continuation
        states = model.model(input_ids=ids.to(device), use_cache=False).last_hidden_state
        at = torch.tensor(rows)
        yield torch.tensor(some)[at].to(device), torch.tensor(targets, device=device), states[rows, positions]


@torch.no_grad()
def scores(model: nn.Module, requests: list[Request], batch_tokens: int) -> tuple[list[float], list[bool]]:
    """Log-likelihood of each continuation and whether it is the greedy one."""
    score, errors = torch.zeros(2, len(requests), device=next(model.parameters()).device)
    for batch in continuations(model, requests, batch_tokens):
        for items, wanted, states in zip(*(tensor.split(_POSITIONS) for tensor in batch), strict=True):
            log_p = model.lm_head(states.to(model.lm_head.weight.dtype)).float().log_softmax(-1)
            score.index_add_(0, items, log_p.gather(1, wanted[:, None])[:, 0])
            errors.index_add_(0, items, (log_p.argmax(-1) != wanted).float())
    return score.tolist(), (errors == 0).tolist()


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
