"""Runs a benchmark from any directory: python bench FOLDER.NAME [options], for instance python bench kernels.mlp."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent


def main() -> None:
    # Python has put this directory (with -m, the working directory) first. The root goes last, so that an installed
    # cats_ext wins over the sources beside bench/.
    if Path(sys.path[0]).resolve() in (BENCH, BENCH.parent):
        del sys.path[0]
    sys.path.append(str(BENCH.parent))
    files = {".".join(path.relative_to(BENCH).with_suffix("").parts): path for path in sorted(BENCH.glob("*/*.py"))}
    programs = [name for name, path in files.items() if "__main__" in path.read_text()]
    if len(sys.argv) < 2 or sys.argv[1] not in programs:
        raise SystemExit("usage: python bench NAME [options], where NAME is one of\n  " + "\n  ".join(programs))
    runpy.run_module(f"bench.{sys.argv.pop(1)}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
