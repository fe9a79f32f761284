"""Rules of others for quality.compare: sparse inputs of linear layers, by thresholds on calibrated quantiles.

A linear layer reads the columns of the inputs that are kept. Criteria: TEAL |x_i|; WINA |x_i| norm(W_i); LaRoSA |z_i|
with z = Q' x in the basis of the inputs' principal components (the down projection's input stays as it is). All take
one threshold a layer here, also where the paper takes the k largest of each token: the bytes are equal on average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bench.quality.compare_rules import quantile
from cats_ext.thresholds.allocation import allocate

_OPTIONS = [i / 20 for i in range(17)]


@dataclass(frozen=True)
class Peer:
    """Attributes:
    criterion: teal, wina, larosa.
    share: of the MLPs' bytes that CATS would read for the same bytes of the whole model.
    scope: which linear layers of the blocks.
    allocation: uniform, or gradient: by the estimated divergence, as the package's search.
    """

    name: str
    criterion: str
    share: float = 2 / 3
    scope: str = "all"
    allocation: str = "uniform"
    tasks: int = 0


@dataclass
class SparseInput:
    threshold: Tensor
    weight: Tensor | float = 1.0
    basis: Tensor | None = None
    seen: list = field(default_factory=lambda: [0, 0, 0])  # inputs, kept

    def score(self, x: Tensor) -> Tensor:
        return ((x if self.basis is None else x @ self.basis) * self.weight).abs()

    def __call__(self, x: Tensor) -> Tensor:
        z = x if self.basis is None else x @ self.basis
        mask = (z * self.weight).abs() >= self.threshold
        self.seen[0], self.seen[1] = self.seen[0] + mask.numel(), self.seen[1] + mask.sum()
        z = torch.where(mask, z, 0)
        return z if self.basis is None else z @ self.basis.T


def linears(layers: list[nn.Module], scope: str) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by name; scope is all, mlp, attention or gate."""
    return {
        f"{i}.{name}": module
        for i, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and in_scope(f".{name}", scope)
    }


def in_scope(name: str, scope: str) -> bool:
    return {"all": True, "mlp": ".mlp." in name, "attention": ".mlp." not in name, "gate": "gate" in name}[scope]


@contextmanager
def sparse_inputs(found: dict[str, nn.Linear], rules: dict[str, SparseInput]) -> Iterator[None]:
    hooks = [
        module.register_forward_pre_hook(lambda _, args, rule=rules[name]: (rule(args[0]),))
        for name, module in found.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def watched(found: dict[str, nn.Linear], keep: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Hands each layer's input and the gradient at its output to ``keep``, in the backward pass."""

    def forward(name: str) -> Callable:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x, output = args[0].detach(), output if output.requires_grad else output.detach().requires_grad_()
            output.register_hook(lambda g: keep(name, x, g))
            return output

        return hook

    hooks = [module.register_forward_hook(forward(name)) for name, module in found.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class PeerData:
    """Inputs of the linear layers and gradients at their outputs, ``[N, in]`` and ``[N, out]``."""

    def __init__(self, found: dict[str, nn.Linear]) -> None:
        self.found = found
        self.x: dict[str, list[Tensor]] = {name: [] for name in found}
        self.g: dict[str, list[Tensor]] = {name: [] for name in found}

    def keep(self, name: str, x: Tensor, g: Tensor) -> None:
        self.x[name].append(x.flatten(0, -2))
        self.g[name].append(g.flatten(0, -2))

    @torch.no_grad()
    def rules(self, peer: Peer, sparsity: float) -> dict[str, SparseInput]:
        found = {n: m for n, m in self.found.items() if in_scope(n, peer.scope)}
        made, scores, rows = {}, {}, []
        bases: dict[int, Tensor] = {}  # of an input that several layers share
        for name, module in found.items():
            x, weight = torch.cat(self.x[name]), module.weight.detach()
            rule = SparseInput(torch.zeros((), device=x.device))
            if peer.criterion == "wina":
                rule.weight = weight.norm(dim=0)
            elif peer.criterion == "larosa" and "down" not in name:
                at = self.x[name][0].data_ptr()
                if at not in bases:
                    bases[at] = torch.linalg.eigh(x.T @ x / len(x)).eigenvectors
                rule.basis = bases[at]
                rule.weight = weight.new_ones(())
            made[name] = rule
            if peer.allocation == "gradient":
                some, r = x[::2], torch.cat(self.g[name])[::2] @ weight
                z, r = (some, r) if rule.basis is None else (some @ rule.basis, r @ rule.basis)
                score, product = (z * rule.weight).abs(), z * r
                scores[name] = [quantile(score, s) for s in _OPTIONS]
                loss = [torch.where(score < t, product, 0).sum(-1).square().mean() / 2 for t in scores[name]]
                rows.append(torch.stack(loss))
            else:
                rule.threshold = quantile(rule.score(x), sparsity)
        if peer.allocation == "gradient":
            sizes = torch.tensor([module.weight.numel() for module in found.values()], dtype=torch.float64)
            costs = (sizes / sizes.sum())[:, None] * (1 - torch.tensor(_OPTIONS, dtype=torch.float64))
            for name, option in zip(found, allocate(torch.stack(rows), costs, 1 - sparsity), strict=True):
                made[name].threshold = scores[name][option]
        return made
