"""Rules, compensation of skipped neurons, allocations and the rules of others, at equal bytes, on one model.

    python bench quality.compare_inputs --model DIR_OR_GGUF --data ../shared/data --output inputs.json.gz
    python bench quality.compare --model DIR_OR_GGUF --inputs inputs.json.gz --output bench/results/quality/compare

Thresholds are exact quantiles and masks plain PyTorch, in float32 with TF32 products. ``NAME_text.csv`` has the
divergence and the perplexity on windows for development (dev), on those that a search may be judged by (held) and on
those that are reported (c4, wikitext; of variants with tasks); ``NAME_tasks.csv`` has the tasks, items of odd index for
development and of even index reported. A variant's share counts all it reads: rows, maps, vectors; that of the model
adds the attention and the output layer.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from bench.lib import machine
from bench.lib.command import command
from bench.lib.results import ResultFile
from bench.quality.compare_model import Comparison
from bench.quality.compare_peers import Peer, linears, sparse_inputs
from bench.quality.compare_rules import Variant


def main() -> None:
    parser = command(__spec__, __doc__, output="directory", required=True)
    parser.add_argument("--model", type=Path, required=True, help="directory or .gguf file")
    parser.add_argument("--name", required=True, help="of the model, in the rows")
    parser.add_argument("--inputs", type=Path, required=True, help="of quality.compare_inputs")
    parser.add_argument("--variants", type=Path, default=Path(__file__).with_name("compare.json"))
    parser.add_argument("--batch", type=int, default=8, help="windows in a forward pass")
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing after so long")
    parser.add_argument("--only", nargs="+", help="variants, with all texts; and the dense model")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    started = time.perf_counter()
    comparison = Comparison(args)
    print(f"calibrated after {time.perf_counter() - started:.1f} s", flush=True)
    facts = machine.facts(comparison.device, args.commit)
    texts, tasks = (ResultFile(args.output / f"{args.name}_{part}.csv", facts, digits=5) for part in ("text", "tasks"))
    greedy: list = []

    def run(entry: Variant | Peer | None, part: str) -> None:
        name, began = entry.name if entry else "dense", time.perf_counter()
        comparison.rules, peers, split = [None] * len(comparison.mlps), {}, []
        if isinstance(entry, Peer):
            peers = comparison.peer_rules(entry)
        elif entry:
            for scope, share in entry.inputs.items():
                peers |= comparison.peer_rules(Peer("", "wina", scope=scope), share)
        found = {n: m for n, m in linears(comparison.blocks, "all").items() if n in peers}
        whole = entry is None or entry.tasks or args.only
        sets = ("held", "dev", "c4", "wikitext") if whole else ("held", "dev")
        with ExitStack() as stack:
            if peers:
                for texts_name in sets:
                    comparison.dense(texts_name, comparison.texts[texts_name])
                stack.enter_context(sparse_inputs(found, peers))
            if isinstance(entry, Variant):
                split = comparison.apply(entry)
            stack.enter_context(torch.no_grad())
            if part == "tasks":
                print(f"{args.name} {name}", flush=True)
                comparison.measure_tasks(name, tasks)
                print(f"  {time.perf_counter() - began:.1f} s", flush=True)
                return
            for rule in (*comparison.rules, *peers.values()):
                if rule is not None:
                    rule.seen = [0, 0, 0]
            row = {"model": args.name, "variant": name} | shares(comparison, entry, peers, comparison.text(sets))
            if greedy and (entry is None or entry.tasks):
                row |= comparison.agreement(greedy)
            row["seconds"] = time.perf_counter() - began
            if len(set(split)) > 1:
                row["split"] = " ".join(f"{a:.2f}/{b:.2f}" for a, b in split)
            texts.add(row)
            print({key: value for key, value in texts.rows[-1].items() if key not in facts}, flush=True)

    kinds = {True: Peer, False: Variant}
    entries = [kinds["criterion" in fields](**fields) for fields in json.loads(args.variants.read_text())]
    entries = [entry for entry in entries if not args.only or entry.name in args.only]
    measured = sorted((entry for entry in entries if entry.tasks), key=lambda entry: entry.tasks)
    first = [(entry, "text") for entry in entries if entry.tasks] + [(entry, "tasks") for entry in (None, *measured)]
    rest = [(entry, "text") for entry in entries if not entry.tasks]
    if args.prompts and args.new_tokens:
        greedy.extend(comparison.greedy())
        print(f"greedy texts after {time.perf_counter() - started:.1f} s", flush=True)
    for entry, part in [(None, "text"), *first, *rest]:
        if time.perf_counter() - started > args.seconds:
            print(f"stopped before {entry.name if entry else 'dense'}, {part}")
            break
        run(entry, part)
    print(f"done after {time.perf_counter() - started:.1f} s")


def shares(comparison: Comparison, entry: Variant | Peer | None, peers: dict, row: dict) -> dict:
    """``row`` behind the measured sparsities and the shares of bytes read of the MLPs and of the model."""
    sizes, facts, skipped = comparison.sizes, {}, {"mlp": 0.0, "attention": 0.0}
    found = linears(comparison.blocks, "all")
    for name, rule in peers.items():
        part = "mlp" if ".mlp." in name else "attention"
        skipped[part] += (1 - float(rule.seen[1]) / float(rule.seen[0])) * found[name].weight.numel()
    if isinstance(entry, Variant):
        seen, passed, kept = (sum(float(rule.seen[i]) for rule in comparison.rules) for i in range(3))
        facts = {"up": 1 - passed / seen, "down": 1 - kept / seen}
        rows = (facts["up"] + facts["down"]) / 3 - entry.extra(comparison.hidden, comparison.intermediate)
        skipped["mlp"] += rows * sizes["mlp"]
    share = {"mlp_share": 1 - skipped["mlp"] / sizes["mlp"], "model_share": 1 - sum(skipped.values()) / sizes["model"]}
    return share | facts | row


if __name__ == "__main__":
    main()
