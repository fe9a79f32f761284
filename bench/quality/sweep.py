"""Weights and allocations of thresholds against each other: perplexity, KL and LAMBADA of many variants of one model.

Gate and up projections of the calibration windows are kept whole, so that thresholds are exact quantiles in any
variant, and every variant runs through the dense masked path in PyTorch. What is found here becomes the defaults of
``cats_ext.calibrate``; quality.measure measures those through the package itself.

    python bench quality.sweep --model DIR_OR_GGUF --data ../shared/data --variants bench/quality/sweep_rules.json \
        --output bench/results/quality/sweep_rules.csv
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lib import machine
from bench.lib.command import command
from bench.lib.results import ResultFile
from bench.quality.sweep_variants import Sample, Variant
from bench.quality.task_scores import continuations
from bench.quality.texts import c4_documents, load_texts, read_jsonl, token_ids
from cats_ext.thresholds.allocation import allocate


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
        self.device = machine.default_device()
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options).to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or source, **({} if args.tokenizer else options))
        self.layers = [layer.mlp for layer in self.model.model.layers]
        self.thresholds: list[tuple[Tensor, Tensor | None] | None] = [None] * len(self.layers)
        self.dense_first = 0
        self.capture: list[tuple[Tensor, Tensor]] | None = None
        self.perturb: list[Tensor] | None = None
        self.corrections: list[Tensor] | None = None
        self.counts = torch.zeros(len(self.layers), 3, dtype=torch.int64, device=self.device)
        for index, mlp in enumerate(self.layers):
            mlp.forward = lambda x, index=index: self.mlp(index, x)
        self.stride, w = args.stride, args.window

        def windows(text: str, count: int) -> Tensor:
            return token_ids(self.tokenizer, text, count * w).view(-1, w).to(self.device)

        texts = load_texts(args.data)
        wikitext, c4 = (windows(texts[name], args.windows) for name in ("wikitext_valid", "c4_end"))
        half = args.windows // 2
        self.texts = {"wikitext": wikitext, "c4": c4, "mixed": torch.cat([wikitext[:half], c4[:half]])}
        self.texts["short"] = self.texts["mixed"].view(-1, w // 8)
        self.sets = {
            "wikitext": windows(texts["wikitext"], args.windows),
            "c4": windows(texts["c4"], args.c4_windows),
        }
        if args.preparations:
            for name, text in preparations(texts["wikitext"]).items():
                self.sets[name] = windows(text, args.windows)
        self.dense_sets = list(dict.fromkeys([*self.sets, *sets]))
        rows = read_jsonl(args.data / "tasks/lambada.jsonl.gz")[: args.lambada]
        stories, documents = [tuple(row["text"].rsplit(" ", 1)) for row in rows], c4_documents(args.data)
        words = repeated_words(documents[len(documents) // 4 : -200])[: 2 * args.lambada]
        pairs = {"lambada": stories, "words": words}

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
        if self.thresholds[index] is not None:
            threshold, down_threshold = self.thresholds[index]
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
            self.thresholds, self.corrections = [None] * len(self.layers), None
            gradients, activations = self.gradients(self.texts[text]), self.collect(self.texts[text])
            downs = [mlp.down_proj.weight.detach() for mlp in self.layers]
            each = zip(activations, gradients, downs, strict=True)
            self.prepared[text] = [Sample(v, u, g @ down, down) for (v, u), g, down in each]
        return self.prepared[text]

    def apply(self, variant: Variant | None) -> list[tuple[float, float]]:
        self.thresholds, self.corrections = [None] * len(self.layers), None
        if variant is None:
            return []
        samples = self.samples(variant.text)
        split = self.allocate(variant)
        activations = [(sample.v, sample.u) for sample in samples]
        for turn in range(variant.rounds):
            if turn:
                activations = self.collect(self.texts[variant.text])
            self.thresholds = [
                sample.thresholds(variant.of_layer(i, len(samples)), *split[i], *activations[i], self.stride)
                for i, sample in enumerate(samples)
            ]
        if variant.correct:
            self.corrections = [s.mean_dropped(*found) for s, found in zip(samples, self.thresholds, strict=True)]
            if not variant.correct_last:
                self.corrections[-1] = torch.zeros_like(self.corrections[-1])
        return split

    def allocate(self, variant: Variant) -> list[tuple[float, float]]:
        """Up and down sparsity of each layer."""
        count = len(self.layers)
        if variant.allocation == "uniform":
            return [(of.up, of.down) for of in (variant.of_layer(i, count) for i in range(count))]
        options, free = variant.options(), count - (variant.last is not None)
        facts = (
            variant.allocation,
            variant.text,
            variant.gate_weight,
            variant.gate_power,
            variant.down_weight,
            variant.skip,
            options,
        )
        key = repr((*facts, variant.clip, variant.last_power, variant.last))
        if key not in self.losses:
            if variant.allocation == "kl":
                rows = [[self.layer_kl(variant, i, option) for option in options] for i in range(free)]
            else:
                samples = self.samples(variant.text)[:free]
                rows = [sample.losses(variant.of_layer(i, count), options) for i, sample in enumerate(samples)]
            self.losses[key] = torch.tensor(rows)
        rest = [] if variant.last is None else [tuple(variant.last)]
        costs = torch.tensor([(3 - a - b) / 3 for a, b in options]).expand(free, -1)
        choice = allocate(self.losses[key], costs, variant.budget * count - sum((3 - a - b) / 3 for a, b in rest))
        return [options[c] for c in choice] + rest

    def layer_kl(self, variant: Variant, index: int, option: tuple[float, float]) -> float:
        sample, variant = self.samples(variant.text)[index], variant.of_layer(index, len(self.layers))
        key, windows = f"{variant.text} calibration", self.texts[variant.text][:4]
        self.thresholds = [None] * len(self.layers)
        if key not in self.dense_logits:
            self.dense_logits[key] = self.logits(windows)
        self.thresholds[index] = sample.thresholds(variant, *option, sample.v, sample.u, self.stride)
        pairs = zip(windows, self.dense_logits[key], strict=True)
        return mean(float(kl(dense, self.model(input_ids=ids[None]).logits[0]).mean()) for ids, dense in pairs)

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
        right, first = torch.ones(len(pairs), dtype=torch.bool, device=self.device), {}
        for items, wanted, states in continuations(self.model, pairs, tokens):
            log_p = self.model.lm_head(states).log_softmax(-1)
            right[items[log_p.argmax(-1) != wanted]] = False
            for k, i in enumerate(items.tolist()):
                first.setdefault(i, (log_p[k], wanted[k]))
        log_p, wanted = (torch.stack(found) for found in zip(*(first[i] for i in range(len(pairs))), strict=True))
        dense, dense_right = self.dense_last.setdefault(name, (log_p, right))
        return {
            name: 100 * float(right.float().mean()),
            f"{name}_difference": 100 * float((right.float() - dense_right.float()).mean()),
            f"{name}_se": 100 * float((right.float() - dense_right.float()).std() / len(pairs) ** 0.5),
            f"{name}_logp": float(log_p.gather(1, wanted[:, None]).mean()),
            f"{name}_kl": float((dense.exp() * (dense - log_p)).sum(-1).mean()),
        }

    def evaluate(self, variant: Variant | None) -> dict[str, object]:
        started = time.perf_counter()
        split = self.apply(variant)
        self.dense_first = variant.dense_first if variant else 0
        row: dict[str, object] = {"name": variant.name if variant else "dense"}
        for name in variant.sets if variant else self.dense_sets:
            self.counts.zero_()
            row |= self.last_words(name) if name in self.last else self.text(name)
            if variant:
                seen, up, down = self.counts.double().sum(0).tolist()
                row[f"{name}_up"], row[f"{name}_down"] = 1 - up / seen, 1 - down / seen
                row[f"{name}_bytes"] = (1 + up / seen + down / seen) / 3
        row["seconds"] = time.perf_counter() - started
        if variant and variant.allocation != "uniform":
            row["split"] = " ".join(f"{a:.2f}/{b:.2f}" for a, b in split)
        self.dense_first = 0
        return row


def kl(dense: Tensor, sparse: Tensor) -> Tensor:
    p, q = dense.log_softmax(-1), sparse.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def main() -> None:
    parser = command(__spec__, __doc__, output="CSV file", required=True)
    parser.add_argument("--model", required=True, help="directory or .gguf file")
    parser.add_argument("--tokenizer", help="directory, if not beside the model: one from a .gguf loads slowly")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--variants", type=Path, required=True, help="JSON: a list of Variant's fields")
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
    variants = [None, *(Variant(**entry) for entry in json.loads(args.variants.read_text()))]
    sweep = Sweep(args, [name for variant in variants[1:] for name in variant.sets])
    print(f"loaded after {time.perf_counter() - started:.1f} s", flush=True)
    results = ResultFile(args.output, machine.facts(sweep.device, args.commit), digits=5)
    for variant in variants:
        if time.perf_counter() - started > args.seconds:
            print(f"stopped before {variant and variant.name}")
            break
        results.add(sweep.evaluate(variant))
        print(results.rows[-1], flush=True)
    print(f"done after {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
