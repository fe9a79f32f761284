"""Altered checkpoints through both doors: ``CatsConfig.from_pretrained`` with ``apply_cats``, and transformers.

Case n of a seed is the same whatever runs before it.
"""

from __future__ import annotations

import random
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adversarial.harness import mutations
from adversarial.harness.checkpoints import (
    Checkpoint,
    Checkpoints,
    equal,
    load_config_door,
    load_transformers_door,
    logits,
)
from adversarial.harness.record import CHANGED, CLEAR_TYPES, OBSCURE, REFUSED, UNCHANGED, Record, in_words, is_clear
from transformers.utils import logging

TRANSFORMERS_SHARE = 0.2
NOT_MADE = "not made"
_MEMORY = 1 << 30  # that loading a tiny checkpoint may allocate: an altered file must not be read whole if it is huge
_ARGUMENTS = ("config", "thresholds", "layers", "statistics", "calibrat", "sparsity", "rule", "model")


@contextmanager
def limited_memory() -> Iterator[None]:
    """Inside, this process can allocate ``_MEMORY`` more than it has."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text()
    used = 1024 * int(status.split("VmData:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (used + _MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def run_case(number: int, seed: int, checkpoints: Checkpoints, directory: Path) -> tuple[str, str]:
    """The outcome of case ``number``, and what was done and found."""
    r = random.Random(f"{seed}:{number}")
    rule = r.choice(sorted(checkpoints.by_rule))
    base: Checkpoint = checkpoints.by_rule[rule]
    through_transformers = r.random() < TRANSFORMERS_SHARE
    base.copy_to(directory, weights=through_transformers)
    kinds = mutations.DAMAGE + (5 * mutations.OF_A_CHECKPOINT if through_transformers else ())
    try:
        what = r.choice(kinds)(r, directory, checkpoints)
    except ValueError as error:  # a value that no JSON file can have
        return NOT_MADE, str(error)
    names = (str(directory), *base.cats_files, *_ARGUMENTS)
    door = "transformers" if through_transformers else "config"
    try:
        with limited_memory(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if through_transformers:
                found = load_transformers_door(directory)
            else:
                found = load_config_door(directory, base.model)
    except Exception as error:
        clear = isinstance(error, CLEAR_TYPES) and is_clear(str(error), names)
        return REFUSED if clear else OBSCURE, f"{door} door, {rule}, {what}: {in_words(error)}"
    return UNCHANGED if equal(found, base.expected) else CHANGED, f"{door} door, {rule}, {what}"


def run_stale_files(checkpoints: Checkpoints, directory: Path) -> tuple[str, str]:
    """Another model saved densely over a CATS checkpoint is loaded as itself; the old thresholds are refused for it."""
    what = "dense save of another model over a CATS checkpoint"
    checkpoints.by_rule["searched"].copy_to(directory)
    checkpoints.dense.model.save_pretrained(directory)
    if not equal(load_transformers_door(directory), checkpoints.dense.expected):
        return CHANGED, f"transformers door, {what}"
    try:
        load_config_door(directory, checkpoints.dense.model)
    except (ValueError, OSError) as error:
        clear = is_clear(str(error), (str(directory), *_ARGUMENTS))
        return REFUSED if clear else OBSCURE, f"config door, {what}: {in_words(error)}"
    return CHANGED, f"config door, {what}"


def run(count: int, seed: int, checkpoints: Checkpoints, directory: Path, first: int = 0) -> Record:
    """``count`` cases from number ``first`` on."""
    record = Record("altered files", seed)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dense = {rule: logits(base.model) for rule, base in checkpoints.by_rule.items()}
    outcome, what = run_stale_files(checkpoints, directory)
    record.add(outcome, f"{outcome}: {what}" if outcome in (OBSCURE, CHANGED) else None)
    for number in range(first, first + count):
        outcome, what = run_case(number, seed, checkpoints, directory)
        record.add(outcome, f"{outcome}, case {number}: {what}" if outcome in (OBSCURE, CHANGED) else None)
    for rule, base in checkpoints.by_rule.items():
        if not equal(dense[rule], logits(base.model)):
            record.add("model damaged", f"the dense model of {rule} computes something else after all cases")
    return record
