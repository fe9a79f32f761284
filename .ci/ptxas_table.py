"""Registers and spills of every CUDA kernel, from a build log with ``nvcc -Xptxas=-v``; fails if a hot kernel spills.

python .ci/ptxas_table.py LOG... prints one line a kernel template and architecture.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

# Kernels that may spill, as patterns of "NAME for ARCH", each with the reason.
MAY_SPILL = {
    "gated_threshold_kernel": "elementwise and bound by memory, which hides a few spilled bytes a thread",
}

ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\S+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    """One instantiation, compiled for one architecture. Stack and spill in bytes a thread."""

    name: str
    arch: str
    registers: int
    stack: int
    spill: int

    @property
    def may_spill(self) -> bool:
        return any(re.match(pattern, f"{self.name} for {self.arch}") for pattern in MAY_SPILL)


def parse(log: str) -> list[Kernel]:
    found = [match.groupdict() for match in ENTRY.finditer(log)]
    # A header's kernel can be compiled in several files: one of its entries is enough.
    unique = {(f["symbol"], f["arch"]): f for f in found}.values()
    demangle = subprocess.run(
        ["c++filt"], input="\n".join(f["symbol"] for f in unique), capture_output=True, text=True, check=True
    )
    names = [re.sub(r"^void |cats::|\(anonymous namespace\)::|\(.*", "", n) for n in demangle.stdout.splitlines()]
    return [
        Kernel(name, f["arch"], int(f["registers"]), int(f["stack"]), int(f["stores"]) + int(f["loads"]))
        for name, f in zip(names, unique, strict=True)
    ]


def main(paths: list[str]) -> int:
    log = "\n".join(Path(path).read_text() for path in paths)
    kernels = parse(log)
    if not kernels or len(kernels) != len(set(re.findall(r"Compiling entry function '(\S+)' for '(\w+)'", log))):
        print(f"{', '.join(paths)}: no ptxas output, or a part of it could not be read")
        return 1
    groups = defaultdict(list)
    for kernel in kernels:
        groups[kernel.name.split("<")[0], kernel.arch].append(kernel)
    print(f"{'kernel':<32}{'arch':<9}{'count':>6}{'registers':>12}{'stack':>7}{'spill':>7}   (largest, bytes)")
    for (name, arch), group in sorted(groups.items()):
        registers, stack, spill = (max(getattr(k, f) for k in group) for f in ("registers", "stack", "spill"))
        print(f"{name:<32}{arch:<9}{len(group):>6}{registers:>12}{stack:>7}{spill:>7}")
    spilled = [kernel for kernel in kernels if kernel.spill]
    for kernel in spilled:
        verdict = "allowed" if kernel.may_spill else "SPILLS"
        print(f"{verdict}: {kernel.name} for {kernel.arch}: {kernel.spill} bytes, {kernel.registers} registers")
    return int(any(not kernel.may_spill for kernel in spilled))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
