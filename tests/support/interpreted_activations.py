"""Applies the activation functions of the Triton kernels in Triton's interpreter: values and results are JSON.

A program of its own: Triton reads TRITON_INTERPRET=1 when a kernel is defined.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from cats_ext.ops.reference import ACTIVATIONS
from cats_ext.ops.triton_activations import activate


@triton.jit
def kernel(x, y, COUNT: tl.constexpr, ACTIVATION: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(y + i, activate(tl.load(x + i), ACTIVATION))


if __name__ == "__main__":
    # As on a GPU, tl.maximum gives the number where one operand is NaN.
    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    x = torch.tensor(json.load(sys.stdin))
    results = {name: torch.empty_like(x) for name in ACTIVATIONS}
    for name, y in results.items():
        kernel[(1,)](x, y, COUNT=len(x), ACTIVATION=name)
    print(json.dumps({name: y.tolist() for name, y in results.items()}))
