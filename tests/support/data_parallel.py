"""One process of two that train a patched MLP, with DDP or FSDP2; without transformers, whose import takes seconds."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cats_ext import apply_cats, calibrate
from cats_ext.patching.apply import sparse_mlps

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


def patched_network(neuron_rows: bool = True) -> Network:
    torch.manual_seed(0)
    network = Network()
    data = torch.randint(32, (256,))
    config = calibrate(network, data, sparsity=0.5, progress=False)
    return apply_cats(network, config, neuron_rows=neuron_rows)


def train(network: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two steps; the weights after them."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(2):
        network(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def batch() -> torch.Tensor:
    return torch.randint(32, (BATCH, 9), generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    rank, way, store, result = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    network = patched_network(neuron_rows=way == "ddp")
    if way == "ddp":
        network = DistributedDataParallel(network)
    else:
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(network.mlp, mesh=mesh)
        fully_shard(network, mesh=mesh)
    assert sparse_mlps(network)
    found = train(network, batch()[rank::2])
    found = {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in found.items()}
    if rank == 0:
        torch.save({name.removeprefix("module."): value for name, value in found.items()}, result)
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo may still drop tensors, which aborts while Python ends (pytorch/pytorch#190489)
