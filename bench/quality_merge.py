"""Joins what several runs of bench/quality.py wrote, in the order of the variants; equal measurements once.

python bench/quality_merge.py --variants bench/quality.json --out bench/results/quality PART...
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

FACTS = ("device", "torch", "commit", "date")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("parts", nargs="+", help="directories")
    args = parser.parse_args()
    order = [variant["name"] for variant in json.loads(Path(args.variants).read_text())]
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name in sorted({path.name for part in args.parts for path in Path(part).glob("*.csv")}):
        rows, columns = {}, {}
        for part in args.parts:
            path = Path(part) / name
            if path.exists():
                with path.open(newline="") as file:
                    for row in csv.DictReader(file):
                        columns |= dict.fromkeys(row)
                        key = tuple(row.get(k) for k in ("name", "text", "task", "prompt", "layer", "low"))
                        rows.setdefault(key, row)
        columns = [column for column in columns if column not in FACTS] + [*FACTS]
        ordered = sorted(rows.values(), key=lambda row: order.index(row["name"]))
        with open(Path(args.out) / name, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(ordered)


if __name__ == "__main__":
    main()
