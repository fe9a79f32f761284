"""Tensor parallelism of transformers: what it makes of the layers of an MLP, and what the ranks tell each other."""
