"""Runs the long form of the adversarial tests, from the root of the source tree, and writes a log of what it counted.

    python -m tests.adversarial                       # all four
    python -m tests.adversarial files --cases 10000 --seed 7 --log bench/results/reliability/files.log

The exit code is 1 if anything failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    tests = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(tests)]  # as pytest does
    sys.path.append(str(tests.parent))
    from adversarial.harness.long_run import main

    sys.exit(main())
