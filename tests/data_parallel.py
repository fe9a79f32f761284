"""One process of a data-parallel step on a patched MLP; without transformers, whose import takes seconds."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cats_ext import apply_cats, calibrate
from cats_ext.patching import sparse_mlps

HIDDEN, INTERMEDIATE, BATCH = 16, 40, 6


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, INTERMEDIATE, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(INTERMEDIATE, HIDDEN, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Embedding(32, HIDDEN), MLP()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return x + self.mlp(x)


def patched_network() -> Network:
    torch.manual_seed(0)
    network = Network()
    data = torch.randint(32, (256,))
    return apply_cats(network, calibrate(network, data, sparsity=0.5, progress=False))


def gradients(network: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    network(ids).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def batch() -> torch.Tensor:
    return torch.randint(32, (BATCH, 9), generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    rank, store, result = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    network = DistributedDataParallel(patched_network())
    assert sparse_mlps(network)
    found = gradients(network, batch()[rank::2])
    if rank == 0:
        torch.save({name.removeprefix("module."): value for name, value in found.items()}, result)
    dist.destroy_process_group()
