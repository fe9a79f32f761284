"""CUDA graph capture."""

from __future__ import annotations

from collections.abc import Callable

import torch

Run = Callable[[], object]


class Captured:
    """A run as a CUDA graph. It keeps the run's closure: a graph has the addresses of tensors, not the tensors.

    The warm-up runs on the stream of the capture, because workspaces belong to a stream.
    """

    def __init__(self, run: Run, warmup: int = 1) -> None:
        self.run, self.graph = run, torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                run()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=stream):
            run()

    def __call__(self) -> None:
        self.graph.replay()
