"""The model of quality.compare, with a rule for each MLP: how variants are applied to it, and what is measured."""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.lib import machine
from bench.lib.results import ResultFile
from bench.quality.compare_peers import Peer, PeerData, SparseInput, linears, watched
from bench.quality.compare_rules import Layer, Rule, Variant, cost, search_options
from bench.quality.task_scores import answers, continuations
from cats_ext.evaluation.significance import mean_accuracy, paired_accuracy
from cats_ext.thresholds.allocation import allocate

_CHUNK = 4096  # positions of which logits exist at a time
_SCOPES = ("all", "mlp", "attention", "gate")
ALONE = ("lambada", "arithmetic", "next_line")  # tasks beside the mean of eight


class Comparison:
    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM

        gguf = args.model.suffix == ".gguf"
        source, options = (args.model.parent, {"gguf_file": args.model.name}) if gguf else (args.model, {})
        self.args, self.device = args, machine.default_device()
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options).to(self.device).eval()
        self.model.requires_grad_(False)
        document = json.loads(gzip.decompress(args.inputs.read_bytes()))
        self.texts = {name: torch.tensor(ids, device=self.device) for name, ids in document["texts"].items()}
        self.tasks = document["tasks"]
        self.blocks = self.model.model.layers
        self.mlps = [block.mlp for block in self.blocks]
        self.hidden, self.intermediate = self.model.config.hidden_size, self.model.config.intermediate_size
        sizes = {scope: sum(m.weight.numel() for m in linears(self.blocks, scope).values()) for scope in _SCOPES}
        self.sizes = sizes | {"model": sizes["all"] + self.model.lm_head.weight.numel()}
        self.rules: list[Rule | None] = [None] * len(self.mlps)
        self.fitting: tuple[Variant, list[tuple[float, float]]] | None = None
        self.capture: list[Tensor] | None = None
        self.perturb: list[Tensor] | None = None
        self.before: list[Tensor] = []  # the residual stream before each MLP, of the call in progress
        for index, block in enumerate(self.blocks):
            block.mlp.forward = lambda x, index=index: self.mlp(index, x)
            block.post_attention_layernorm.register_forward_pre_hook(self.note_residual)
        self.dense_states: dict[str, Tensor] = {}
        self.dense_answers: dict[str, list[bool]] = {}
        self.peer_data: PeerData | None = None
        self.dense_residuals: list[Tensor] = []
        self.losses: dict[str, Tensor] = {}
        self.calibrate()

    # --- the model -------------------------------------------------------------------------------------------------

    def note_residual(self, _: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        self.before.append(args[0])

    def mlp(self, index: int, x: Tensor) -> Tensor:
        mlp, before = self.mlps[index], self.before.pop()
        if self.capture is not None:
            self.capture.append(x.flatten(0, 1))
        if self.fitting is not None:
            variant, split = self.fitting
            inputs = x.flatten(0, 1)
            rule = self.rules[index] = self.layers[index].fit(variant, split[index], inputs)
            y = rule(mlp, x)
            if variant.sequential == "residual" and (variant.compensate_last or not self.layers[index].last):
                drift = (self.dense_residuals[index] - (before + y).flatten(0, 1)).mean(0)
                rule.constant, y = rule.constant + drift, y + drift
            return y
        rule = self.rules[index]
        y = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)) if rule is None else rule(mlp, x)
        return y if self.perturb is None else y + self.perturb[index]

    def states(self, windows: Tensor) -> Tensor:
        """What the output layer takes, ``[windows * window, H]``."""
        return last_states(self.model, windows, self.args.batch)

    def sampled_loss(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        """Sum of log p(y) with y drawn from the model: its gradients have the Fisher information as second moment."""
        log_p = self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
        return log_p.gather(1, torch.multinomial(log_p.detach().exp(), 1, generator=generator)).sum()

    def calibrate(self) -> None:
        windows, generator = self.texts["calibration"], torch.Generator(self.device).manual_seed(0)
        inputs, gradients, residuals = [], [], []
        hooks = [  # the residual stream behind each block
            block.register_forward_hook(
                lambda _, a, o: residuals.append((o if isinstance(o, Tensor) else o[0]).detach())
            )
            for block in self.blocks
        ]
        for ids in windows.split(2):
            self.capture = []
            shape = (*ids.shape, self.hidden)
            self.perturb = [torch.zeros(shape, device=self.device, requires_grad=True) for _ in self.mlps]
            gradients.append(torch.autograd.grad(self.sampled_loss(ids, generator), self.perturb))
            inputs.append([x.detach() for x in self.capture])
        self.capture = self.perturb = None
        for hook in hooks:
            hook.remove()
        count = len(self.mlps)
        self.dense_residuals = [torch.cat(residuals[i::count]).flatten(0, 1) for i in range(count)]
        self.layers = []
        for i, mlp in enumerate(self.mlps):
            x, g = (torch.cat([part[i].flatten(0, -2) for part in found]) for found in (inputs, gradients))
            self.layers.append(Layer(mlp, x, g, last=i == count - 1))

    # --- variants --------------------------------------------------------------------------------------------------

    def apply(self, variant: Variant) -> list[tuple[float, float]]:
        saved = sum(share * self.sizes[scope] for scope, share in variant.inputs.items()) / self.sizes["mlp"]
        uniform = variant.split(self.hidden, self.intermediate, saved)
        self.rules = [None] * len(self.mlps)
        split = [uniform] * len(self.mlps)
        if variant.allocation in ("gradient", "free"):
            split = self.search(variant, uniform)
        elif variant.allocation == "measured":
            split = self.measured(variant, uniform)
        self.set_rules(variant, split)
        if variant.tuned:
            self.tune(variant.tuned)
        return split

    @torch.no_grad()
    def set_rules(self, variant: Variant, split: list[tuple[float, float]]) -> None:
        if variant.sequential:
            self.fitting = variant, split
            self.model.model(input_ids=self.texts["calibration"], use_cache=False)
            self.fitting = None
        else:
            self.rules = [
                layer.fit(variant, *pair) for layer, pair in zip(self.layers, ((s,) for s in split), strict=True)
            ]

    def search(self, variant: Variant, uniform: tuple[float, float]) -> list[tuple[float, float]]:
        """As the package: the estimated losses of layers add up. The last layer keeps the uniform one unless free."""
        options, count = search_options(), len(self.mlps)
        facts = {
            **{f.name: getattr(variant, f.name) for f in fields(variant)},
            "name": "",
            "budget": 0,
            "allocation": "",
        }
        key = repr(facts)
        if key not in self.losses:
            self.losses[key] = torch.tensor([layer.losses(variant, options) for layer in self.layers])
        free = count if variant.allocation == "free" else count - 1
        costs = torch.tensor([cost(option) for option in options], dtype=torch.float64).expand(free, -1)
        choice = allocate(self.losses[key][:free], costs, free * cost(uniform))
        return [options[c] for c in choice] + [uniform] * (count - free)

    def measured(self, variant: Variant, uniform: tuple[float, float]) -> list[tuple[float, float]]:
        """By differences in KL when one layer's sparsity or its split changes and all others keep the uniform ones."""
        (up, down), step, room = uniform, 0.1, 0.05
        base = [uniform] * len(self.mlps)
        self.set_rules(variant, base)
        windows = self.texts["calibration"][:: max(1, len(self.texts["calibration"]) // 4)]
        dense = self.dense("measured", windows)
        middle, kept = self.divergence(windows, dense)[0], list(self.rules)
        moves = ((step, step), (-step, -step), (-room, room), (room, -room))
        options = [
            (min(max(up + a - b, 0.0), 0.95), min(max(down + a + b, 0.0), 0.98))
            for a in (-0.2, -0.15, -0.1, -0.05, 0, 0.05, 0.1, 0.15, 0.2)
            for b in (-0.075, -0.05, -0.025, 0, 0.025, 0.05, 0.075)
        ]
        rows = []
        for i, layer in enumerate(self.layers):
            change = []
            for a, b in moves:
                self.rules = list(kept)
                self.rules[i] = layer.fit(variant, (max(up + a, 0.0), min(down + b, 0.98)))
                change.append(self.divergence(windows, dense)[0] - middle)
            more, less, wider, closer = change
            slope, bend = (more - less) / (2 * step), max(0.0, (more + less) / step**2)
            tilt, bow = (wider - closer) / (2 * room), max(0.0, (wider + closer) / room**2)
            row = []
            for one, other in options:
                a, b = (one - up + other - down) / 2, (other - down - one + up) / 2
                row.append(slope * a + bend * a * a / 2 + tilt * b + bow * b * b / 2)
            rows.append(row)
        self.rules = [None] * len(self.mlps)
        losses = torch.tensor(rows, dtype=torch.float64)
        costs = torch.tensor([cost(option) for option in options], dtype=torch.float64).expand(len(rows), -1)
        choice = allocate(losses - losses.min(), costs, len(rows) * cost(uniform))
        return [options[c] for c in choice]

    def tune(self, steps: int) -> None:
        """Train each layer's constant and the gains of its outputs on the divergence from the dense model."""
        windows, dense = self.texts["calibration"], self.dense("calibration", self.texts["calibration"])
        for rule in self.rules:
            start = torch.zeros(self.hidden, device=self.device)
            rule.constant = (start + rule.constant).detach().requires_grad_()
            rule.gain = (start + rule.gain).detach().requires_grad_()
        groups = [
            {"params": [rule.constant for rule in self.rules], "lr": 2e-3},
            {"params": [rule.gain for rule in self.rules], "lr": 5e-3},
        ]
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [2e-3, 5e-3], total_steps=steps)
        generator, size = torch.Generator().manual_seed(0), windows.shape[1]
        for _ in range(steps):
            some = torch.randperm(len(windows), generator=generator)[:4].tolist()
            states = self.model.model(input_ids=windows[some], use_cache=False).last_hidden_state
            loss = 0.0
            for i, mine in zip(some, states, strict=True):
                target = self.model.lm_head(dense[i * size : (i + 1) * size]).log_softmax(-1)
                loss = loss + kl(target, self.model.lm_head(mine).log_softmax(-1)).mean() / len(some)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        for rule in self.rules:
            rule.constant, rule.gain = rule.constant.detach(), rule.gain.detach()

    def peer_rules(self, peer: Peer, sparsity: float | None = None) -> dict[str, SparseInput]:
        found = linears(self.blocks, "all")
        if self.peer_data is None:
            self.peer_data, generator = PeerData(found), torch.Generator(self.device).manual_seed(0)
            windows = self.texts["calibration"]
            with watched(found, self.peer_data.keep):
                for ids in windows[:: max(1, len(windows) // 8)].split(2):
                    embedded = self.model.get_input_embeddings()(ids).requires_grad_()
                    log_p = self.model(inputs_embeds=embedded, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
                    log_p.gather(1, torch.multinomial(log_p.detach().exp(), 1, generator=generator)).sum().backward()
        equal = (1 - peer.share) * self.sizes["mlp"] / self.sizes[peer.scope]
        return self.peer_data.rules(peer, equal if sparsity is None else sparsity)

    # --- measurements ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def dense(self, name: str, windows: Tensor) -> Tensor:
        if name not in self.dense_states:
            kept, self.rules = self.rules, [None] * len(self.mlps)
            self.dense_states[name] = self.states(windows)
            self.rules = kept
        return self.dense_states[name]

    @torch.no_grad()
    def divergence(self, windows: Tensor, dense: Tensor) -> tuple[float, float, float]:
        return divergence_of(self.model, windows, dense, self.states(windows))

    def text(self, names: Sequence[str]) -> dict[str, float]:
        row = {}
        for name in names:
            windows = self.texts[name]
            row[f"{name}_kl"], nll, row[f"{name}_top1"] = self.divergence(windows, self.dense(name, windows))
            row[f"{name}_ppl"] = math.exp(nll)
        return row

    def measure_tasks(self, name: str, table: ResultFile) -> None:
        found = answers(self.model, self.tasks, self.args.batch_tokens)
        self.dense_answers = self.dense_answers or found
        add_tasks(table, {"model": self.args.name, "variant": name}, self.dense_answers, found)

    @torch.no_grad()
    def greedy(self) -> list[tuple[list[int], list[int]]]:
        """Prompts of 64 tokens and the dense model's greedy continuations."""
        ids = self.texts["c4"].flatten().view(-1, 64)
        ids = ids[:: max(1, len(ids) // self.args.prompts)][: self.args.prompts]
        options = {"max_new_tokens": self.args.new_tokens, "min_new_tokens": self.args.new_tokens, "do_sample": False}
        new = self.model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)[:, 64:]
        return list(zip(ids.tolist(), new.tolist(), strict=True))

    def agreement(self, texts: list[tuple[list[int], list[int]]]) -> dict[str, float]:
        """How far the greedy text would be the dense one: until the first token that is not the first choice."""
        agreed = torch.full((len(texts),), len(texts[0][1]), device=self.device)
        for items, wanted, states in continuations(self.model, texts, self.args.batch_tokens):
            places = torch.arange(len(wanted), device=self.device) % len(texts[0][1])
            for at in torch.arange(len(wanted), device=self.device).split(_CHUNK):
                wrong = self.model.lm_head(states[at]).argmax(-1) != wanted[at]
                agreed.scatter_reduce_(0, items[at][wrong], places[at][wrong], "amin")
        agreed = agreed.double()
        return {"agreed_mean": float(agreed.mean()), "agreed_median": float(agreed.median())}


def last_states(model: nn.Module, windows: Tensor, batch: int) -> Tensor:
    """What the output layer takes, ``[windows * window, H]``."""
    parts = windows.split(batch)
    return torch.cat([model.model(input_ids=ids, use_cache=False).last_hidden_state for ids in parts]).flatten(0, 1)


def divergence_of(model: nn.Module, windows: Tensor, dense: Tensor, states: Tensor) -> tuple[float, float, float]:
    """KL from the dense model, mean negative log-likelihood, and share of equal first choices."""
    sums = torch.zeros(3, dtype=torch.float64, device=windows.device)
    next_ids = windows.roll(-1, 1).flatten()
    inside = (torch.arange(windows.numel(), device=windows.device) + 1) % windows.shape[1] != 0
    for at in torch.arange(len(states), device=windows.device).split(_CHUNK):
        p, q = (model.lm_head(some[at]).log_softmax(-1) for some in (dense, states))
        nll = -q.gather(1, next_ids[at, None])[:, 0] * inside[at]
        sums += torch.stack([kl(p, q).sum(), nll.sum(), (p.argmax(-1) == q.argmax(-1)).sum()]).double()
    divergence, nll, same = sums.tolist()
    return divergence / len(states), nll / int(inside.sum()), same / len(states)


def add_tasks(
    table: ResultFile, labels: dict[str, str], dense: dict[str, list[bool]], found: dict[str, list[bool]]
) -> None:
    """Rows of each task and of the mean of eight, apart for items of odd (dev) and of even index (reported)."""
    for half, start in (("dev", 1), ("reported", 0)):
        tasks = {task: paired_accuracy(task, dense[task][start::2], right[start::2]) for task, right in found.items()}
        eight = mean_accuracy({task: one for task, one in tasks.items() if task not in ALONE})
        for one in (eight, *tasks.values()):
            table.add(labels | {"half": half} | one.to_dict())
        alone = {task: f"{tasks[task].sparse:.3f} ({tasks[task].difference:+.3f})" for task in ALONE if task in tasks}
        print(f"  {half}: {eight.sparse:.4f} ({eight.difference:+.4f} ± {eight.difference_se:.4f}) {alone}", flush=True)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)
