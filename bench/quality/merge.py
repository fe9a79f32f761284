"""Joins what several runs of quality.measure wrote, in the order of the variants; equal measurements once.

python bench quality.merge --variants bench/quality/variants.json --output bench/results/quality PART...
"""

from __future__ import annotations

import json
from pathlib import Path

from bench.lib.command import command
from bench.lib.results import read_rows, write_rows

FACTS = ("device", "driver", "torch", "commit", "date")  # columns that stay the last


def main() -> None:
    parser = command(__spec__, __doc__, output="directory", required=True, rows=False)
    parser.add_argument("--variants", type=Path, required=True)
    parser.add_argument("parts", nargs="+", type=Path, help="directories")
    args = parser.parse_args()
    order = [variant["name"] for variant in json.loads(args.variants.read_text())]
    for name in sorted({path.name for part in args.parts for path in part.glob("*.csv")}):
        rows: dict[tuple, dict[str, str]] = {}
        for path in (part / name for part in args.parts if (part / name).exists()):
            for row in read_rows(path):
                rows.setdefault(tuple(row.get(k) for k in ("name", "text", "task", "prompt", "layer", "low")), row)
        ordered = sorted(rows.values(), key=lambda row: order.index(row["name"]))
        columns = dict.fromkeys(column for row in rows.values() for column in row)
        write_rows(args.output / name, ordered, sorted(columns, key=lambda column: column in FACTS))


if __name__ == "__main__":
    main()
