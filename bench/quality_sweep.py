"""Rules and allocations against each other: perplexity, KL and LAMBADA of one model, many configurations in one run.

Gate and up projections of the calibration windows are kept whole, so that thresholds are exact quantiles under any
rule, and every configuration runs through the dense masked path in PyTorch. What is found here becomes the defaults of
``cats_ext.calibrate``; bench/quality.py measures those through the package itself.

    python bench/quality_sweep.py --model DIR_OR_GGUF --data ../shared/data --configs bench/quality_sweep.json --out DIR
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from quality_rules import Rule, Sample
from torch import Tensor

from cats_ext.thresholds.allocation import allocate


def read(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode()


def preparations(text: str) -> dict[str, str]:
    """Ways to join the lines of the test split: dense perplexity depends on it more than on most rules."""
    lines = [line for line in text.split("\n") if line.strip()]
    plain = text.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".")
    stripped = [line.strip() for line in lines]
    body = [line for line in stripped if not line.startswith("=")]
    return {
        "newline": "\n".join(stripped),
        "lines": "\n".join(lines),
        "blank": "\n\n".join(lines),
        "blank_stripped": "\n\n".join(stripped),
        "all_blank": "\n\n".join(text.split("\n")),
        "space": " ".join(stripped),
        "body": "\n".join(body),
        "body_blank": "\n\n".join(body),
        "detokenised": plain,
        "no_unk": plain.replace("<unk>", ""),
    }


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in read(path).splitlines() if line.strip()]


def repeated_words(documents: list[str], length: int = 400) -> list[tuple[str, str]]:
    """Last words to tell from a context of about ``length`` characters in which they occur: one a document."""
    found = []
    for document in documents:
        words = document.split()
        for end in range(len(words) - 1, 40, -1):
            word, context = words[end], " ".join(words[:end])[-length:].partition(" ")[2]
            if word.isalpha() and len(word) >= 5 and word in context.split():
                found.append((context, word))
                break
    return found


class Sweep:
    def __init__(self, args: argparse.Namespace, sets: list[str]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = Path(args.model)
        source, options = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options).to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or source, **({} if args.tokenizer else options))
        self.layers = [layer.mlp for layer in self.model.model.layers]
        self.rules: list[tuple[Tensor, Tensor | None] | None] = [None] * len(self.layers)
        self.dense_first = 0
        self.capture: list[tuple[Tensor, Tensor]] | None = None
        self.perturb: list[Tensor] | None = None
        self.corrections: list[Tensor] | None = None
        self.counts = torch.zeros(len(self.layers), 3, dtype=torch.int64, device=self.device)
        for index, mlp in enumerate(self.layers):
            mlp.forward = lambda x, index=index: self.mlp(index, x)
        data, w = Path(args.data), args.window
        self.window = w

        def windows(text: str, count: int) -> Tensor:
            ids = self.tokenizer(text[: 8 * count * w], add_special_tokens=False, verbose=False)["input_ids"][
                : count * w
            ]
            return torch.tensor(ids, device=self.device).view(-1, w)

        rows = [row["text"] for row in jsonl(data / "text/c4_sample.jsonl.gz")]
        c4 = "\n\n".join(rows)
        wikitext = windows(read(data / "text/wikitext2_valid.txt.gz"), args.windows)
        other = windows("\n\n".join(rows[::-1]), args.windows)  # its end: evaluation is on its beginning
        half = args.windows // 2
        self.texts = {"wikitext": wikitext, "c4": other, "mixed": torch.cat([wikitext[:half], other[:half]])}
        self.texts["short"] = self.texts["mixed"].view(-1, w // 8)
        self.sets = {
            "wikitext": windows(read(data / "text/wikitext2_test.txt.gz"), args.windows),
            "c4": windows(c4, args.c4_windows),
        }
        if args.preparations:
            for name, text in preparations(read(data / "text/wikitext2_test.txt.gz")).items():
                self.sets[name] = windows(text, args.windows)
        self.dense_sets = list(dict.fromkeys([*self.sets, *sets]))
        self.stride = args.stride
        stories = [tuple(row["text"].rsplit(" ", 1)) for row in jsonl(data / "tasks/lambada.jsonl.gz")[: args.lambada]]
        pairs = {"lambada": stories, "words": repeated_words(rows[len(rows) // 4 : -200])[: 2 * args.lambada]}

        def tokens(some: str) -> list[int]:
            return self.tokenizer(some, add_special_tokens=False)["input_ids"]

        self.last = {name: [(tokens(a), tokens(" " + b)) for a, b in some] for name, some in pairs.items()}
        self.dense_last: dict[str, tuple[Tensor, Tensor]] = {}
        self.dense_logits: dict[str, list[Tensor]] = {}
        self.losses: dict[str, Tensor] = {}
        self.prepared: dict[str, list[Sample]] = {}

    # --- the model -------------------------------------------------------------------------------------------------

    def mlp(self, index: int, x: Tensor) -> Tensor:
        mlp = self.layers[index]
        v, u = F.silu(mlp.gate_proj(x)), mlp.up_proj(x)
        if self.capture is not None:
            self.capture.append((v.flatten(0, 1), u.flatten(0, 1)))
        h = v * u
        if self.rules[index] is not None:
            threshold, down_threshold = self.rules[index]
            mask = v.abs() >= threshold
            both = mask if down_threshold is None else mask & (h.abs() >= down_threshold)
            if self.dense_first:
                mask[:, : self.dense_first] = both[:, : self.dense_first] = True
            self.counts[index] += torch.stack([torch.tensor(v.numel(), device=x.device), mask.sum(), both.sum()])
            h = torch.where(both, h, 0)
        y = mlp.down_proj(h)
        if self.corrections is not None:
            y = y + self.corrections[index]
        if self.perturb is not None:
            y = y + self.perturb[index]
        return y

    @torch.no_grad()
    def collect(self, calibration: Tensor) -> list[tuple[Tensor, Tensor]]:
        """v and u of every layer on the calibration windows, ``[windows, window, I]``."""
        pieces = []
        for ids in calibration:
            self.capture = []
            self.model.model(input_ids=ids[None])
            pieces.append(self.capture)
        self.capture = None
        return [tuple(torch.stack([p[i][k] for p in pieces]) for k in (0, 1)) for i in range(len(self.layers))]

    def gradients(self, calibration: Tensor) -> list[Tensor]:
        """Per layer, d log p(y) / d(MLP output) with y drawn from the model: ``[windows, window, H]``."""
        generator = torch.Generator(self.device).manual_seed(0)
        pieces = []
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for ids in calibration:
            shape = (1, len(ids), self.model.config.hidden_size)
            self.perturb = [torch.zeros(shape, device=self.device, requires_grad=True) for _ in self.layers]
            log_p = self.model(input_ids=ids[None]).logits[0].log_softmax(-1)
            y = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            pieces.append(torch.autograd.grad(log_p.gather(1, y).sum(), self.perturb))
        self.perturb = None
        return [torch.cat([p[i] for p in pieces]) for i in range(len(self.layers))]

    # --- thresholds ------------------------------------------------------------------------------------------------

    def samples(self, text: str) -> list[Sample]:
        """Every layer of the dense model on one of the calibration texts."""
        if text not in self.prepared:
            self.rules, self.corrections = [None] * len(self.layers), None
            gradients, activations = self.gradients(self.texts[text]), self.collect(self.texts[text])
            downs = [mlp.down_proj.weight.detach() for mlp in self.layers]
            each = zip(activations, gradients, downs, strict=True)
            self.prepared[text] = [Sample(v, u, g @ down, down) for (v, u), g, down in each]
        return self.prepared[text]

    def set_rule(self, rule: Rule | None) -> list[tuple[float, float]]:
        self.rules, self.corrections = [None] * len(self.layers), None
        if rule is None:
            return []
        samples = self.samples(rule.text)
        split = self.allocate(rule)
        activations = [(sample.v, sample.u) for sample in samples]
        for turn in range(rule.rounds):
            if turn:
                activations = self.collect(self.texts[rule.text])
            self.rules = [
                sample.thresholds(rule.of_layer(i, len(samples)), *split[i], *activations[i], self.stride)
                for i, sample in enumerate(samples)
            ]
        if rule.correct:
            self.corrections = [s.mean_dropped(*found) for s, found in zip(samples, self.rules, strict=True)]
            if not rule.correct_last:
                self.corrections[-1] = torch.zeros_like(self.corrections[-1])
        return split

    def allocate(self, rule: Rule) -> list[tuple[float, float]]:
        """Up and down sparsity of each layer."""
        count = len(self.layers)
        if rule.allocation == "uniform":
            return [(of.up, of.down) for of in (rule.of_layer(i, count) for i in range(count))]
        options, free = rule.options(), count - (rule.last is not None)
        facts = (rule.allocation, rule.text, rule.gate_weight, rule.gate_power, rule.down_weight, rule.skip, options)
        key = repr((*facts, rule.clip, rule.last_power, rule.last))
        if key not in self.losses:
            if rule.allocation == "kl":
                rows = [[self.layer_kl(rule, i, option) for option in options] for i in range(free)]
            else:
                samples = self.samples(rule.text)[:free]
                rows = [sample.losses(rule.of_layer(i, count), options) for i, sample in enumerate(samples)]
            self.losses[key] = torch.tensor(rows)
        rest = [] if rule.last is None else [tuple(rule.last)]
        costs = torch.tensor([(3 - a - b) / 3 for a, b in options]).expand(free, -1)
        choice = allocate(self.losses[key], costs, rule.budget * count - sum((3 - a - b) / 3 for a, b in rest))
        return [options[c] for c in choice] + rest

    def layer_kl(self, rule: Rule, index: int, option: tuple[float, float]) -> float:
        sample, rule = self.samples(rule.text)[index], rule.of_layer(index, len(self.layers))
        self.rules = [None] * len(self.layers)
        if rule.text + " calibration" not in self.dense_logits:
            self.dense_logits[rule.text + " calibration"] = self.logits(self.texts[rule.text][:4])
        self.rules[index] = sample.thresholds(rule, *option, sample.v, sample.u, self.stride)
        total = 0.0
        for ids, dense in zip(self.texts[rule.text][:4], self.dense_logits[rule.text + " calibration"], strict=True):
            total += float(kl(dense, self.model(input_ids=ids[None]).logits[0]).mean())
        return total / len(self.dense_logits[rule.text + " calibration"])

    # --- evaluation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, windows: Tensor) -> list[Tensor]:
        return [logits for some in windows.split(4) for logits in self.model(input_ids=some, use_cache=False).logits]

    @torch.no_grad()
    def text(self, name: str) -> dict[str, float]:
        nll = divergence = agree = 0.0
        if name not in self.dense_logits:
            self.dense_logits[name] = [logits.half() for logits in self.logits(self.sets[name])]
        every = (pair for some in self.sets[name].split(4) for pair in zip(some, self.logits(some), strict=True))
        for (ids, logits), dense in zip(every, self.dense_logits[name], strict=True):
            nll += float(F.cross_entropy(logits[:-1], ids[1:]))
            divergence += float(kl(dense.float(), logits).mean())
            agree += float((dense.argmax(-1) == logits.argmax(-1)).float().mean())
        n = len(self.sets[name])
        return {f"{name}_ppl": math.exp(nll / n), f"{name}_kl": divergence / n, f"{name}_top1": agree / n}

    @torch.no_grad()
    def last_words(self, name: str, tokens: int = 32768) -> dict[str, float]:
        """Accuracy on the last word; of its first token also the log-probability and the KL from the dense model."""
        pairs = self.last[name]
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        right, first = torch.zeros(len(order), dtype=torch.bool, device=self.device), {}
        while order:
            longest = sum(map(len, pairs[order[0]]))
            some, order = order[: max(1, tokens // longest)], order[max(1, tokens // longest) :]
            ids = torch.zeros(len(some), longest, dtype=torch.long)
            rows, positions, targets, items = [], [], [], []
            for row, i in enumerate(some):
                context, word = pairs[i]
                ids[row, : len(context) + len(word)] = torch.tensor(context + word)
                for k, token in enumerate(word):
                    rows.append(row), positions.append(len(context) + k - 1), targets.append(token), items.append(i)
            hidden = self.model.model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
            log_p = self.model.lm_head(hidden[rows, positions]).log_softmax(-1)
            wanted = torch.tensor(targets, device=self.device)
            wrong = torch.tensor(items, device=self.device)[log_p.argmax(-1) != wanted]
            right[torch.tensor(some, device=self.device)] = True
            right[wrong] = False
            for k, i in enumerate(items):
                first.setdefault(i, (log_p[k], targets[k]))
        log_p = torch.stack([first[i][0] for i in range(len(pairs))])
        wanted = torch.tensor([first[i][1] for i in range(len(pairs))], device=self.device)
        dense, dense_right = self.dense_last.setdefault(name, (log_p, right))
        return {
            name: 100 * float(right.float().mean()),
            f"{name}_difference": 100 * float((right.float() - dense_right.float()).mean()),
            f"{name}_se": 100 * float((right.float() - dense_right.float()).std() / len(pairs) ** 0.5),
            f"{name}_logp": float(log_p.gather(1, wanted[:, None]).mean()),
            f"{name}_kl": float((dense.exp() * (dense - log_p)).sum(-1).mean()),
        }

    def evaluate(self, rule: Rule | None) -> dict[str, object]:
        started = time.perf_counter()
        split = self.set_rule(rule)
        self.dense_first = rule.dense_first if rule else 0
        row: dict[str, object] = {"name": rule.name if rule else "dense"}
        for name in rule.sets if rule else self.dense_sets:
            self.counts.zero_()
            row |= self.last_words(name) if name in self.last else self.text(name)
            if rule:
                seen, up, down = self.counts.double().sum(0).tolist()
                row[f"{name}_up"], row[f"{name}_down"] = 1 - up / seen, 1 - down / seen
                row[f"{name}_bytes"] = (1 + up / seen + down / seen) / 3
        row["seconds"] = time.perf_counter() - started
        if rule and rule.allocation != "uniform":
            row["split"] = " ".join(f"{a:.2f}/{b:.2f}" for a, b in split)
        self.dense_first = 0
        return row


def kl(dense: Tensor, sparse: Tensor) -> Tensor:
    p, q = dense.log_softmax(-1), sparse.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory or .gguf file")
    parser.add_argument("--tokenizer", help="directory, if not beside the model: one from a .gguf loads slowly")
    parser.add_argument("--data", required=True)
    parser.add_argument("--configs", required=True, help="JSON: a list of Rule's fields")
    parser.add_argument("--out", required=True)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--c4-windows", type=int, default=48)
    parser.add_argument("--lambada", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--stride", type=int, default=1, help="of the tokens that thresholds are quantiles over")
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--preparations", action="store_true", help="dense perplexity over ways to join the test text")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    started = time.perf_counter()
    rules = [None] + [Rule(**entry) for entry in json.loads(Path(args.configs).read_text())]
    sweep = Sweep(args, [name for rule in rules[1:] for name in rule.sets])
    print(f"loaded after {time.perf_counter() - started:.1f} s", flush=True)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for rule in rules:
        if time.perf_counter() - started > args.seconds:
            print(f"stopped before {rule and rule.name}")
            break
        rows.append(sweep.evaluate(rule))
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with open(out / "sweep.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    print(f"done after {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
