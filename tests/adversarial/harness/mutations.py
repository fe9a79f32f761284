"""Alterations of the files of a CATS checkpoint: damage, forgery with right hashes, and files that do not belong.

Each takes a random generator, the directory to alter in place and the checkpoints, and returns what it did, in words.
None makes another valid file for the same model: whatever is loaded must be refused, or behave as before.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from adversarial.harness.checkpoints import Checkpoints, forge
from safetensors.torch import load_file, save_file

Mutation = Callable[[random.Random, Path, Checkpoints], str]


def cats_file(r: random.Random, directory: Path, suffix: str = "") -> Path:
    return r.choice(sorted(path for path in directory.iterdir() if re.fullmatch(rf"cats_.*{suffix}", path.name)))


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


# --- bytes of one file ------------------------------------------------------------------------------------------------


def flip_bits(r: random.Random, directory: Path, _: Checkpoints) -> str:
    path = cats_file(r, directory)
    data = bytearray(path.read_bytes())
    places = [r.randrange(8 * len(data)) for _ in range(r.choice([1, 1, 1, 2, 8]))]
    for place in places:
        data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    return f"flip_bits {path.name} {places}"


def flip_digit(r: random.Random, directory: Path, _: Checkpoints) -> str:
    path = cats_file(r, directory, r"\.json")
    text = path.read_text()
    place = r.choice([match.start() for match in re.finditer(r"\d", text)])
    digit = r.choice("0123456789".replace(text[place], ""))
    path.write_text(text[:place] + digit + text[place + 1 :])
    return f"flip_digit {path.name} at {place}: {text[max(0, place - 30) : place + 10]!r} to {digit}"


def cut(r: random.Random, directory: Path, _: Checkpoints) -> str:
    path = cats_file(r, directory)
    data = path.read_bytes()
    start = r.choice([0, r.randrange(len(data))])
    end = r.choice([len(data), min(len(data), start + r.choice([1, 8, 100]))])
    path.write_bytes(data[:start] + data[end:])
    return f"cut {path.name} [{start}:{end}]"


def insert(r: random.Random, directory: Path, _: Checkpoints) -> str:
    path = cats_file(r, directory)
    data = path.read_bytes()
    place = r.choice([0, len(data), r.randrange(len(data))])
    added = r.choice([b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b" ", b"0", b"}", b"\n" * 40, data[:64], r.randbytes(16)])
    path.write_bytes(data[:place] + added + data[place:])
    return f"insert {added[:16]!r} into {path.name} at {place}"


def swap_lines(r: random.Random, directory: Path, _: Checkpoints) -> str:
    path = cats_file(r, directory, r"\.json")
    lines = path.read_text().splitlines(keepends=True)
    a, b = r.randrange(len(lines)), r.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    path.write_text("".join(lines))
    return f"swap_lines {path.name} {a} and {b}"


def odd_json(r: random.Random, directory: Path, _: Checkpoints) -> str:
    """Another number or text in the place of a value, or of the whole file."""
    path = cats_file(r, directory, r"\.json")
    text = path.read_text()
    odd = r.choice(
        [nested(100_000), "9" * 5000, "1e999", "-Infinity", "NaN", '{"a":' * 3000, '"\\ud800"', "null", "[]", "{}", ""]
    )
    if r.random() < 0.3:
        path.write_text(odd)
        return f"odd_json: {path.name} is {odd[:12]!r}, {len(odd)} characters"
    match = r.choice(list(re.finditer(r'(?<=: )(-?[\d.e+-]+|true|false|null|"[^"]*")', text)))
    path.write_text(text[: match.start()] + odd + text[match.end() :])
    return f"odd_json: {text[max(0, match.start() - 30) : match.end()]!r} to {odd[:12]!r}, {len(odd)} characters"


# --- the JSON document, without its hash ------------------------------------------------------------------------------

ODD_VALUES = [
    *(None, [], {}, "", "x", True, False, -1, -0.5, 0, 7, 2**31, 2**63, 2**70, -(2**70), 10**400, 1.5e308, 1e-300),
    *(float("nan"), float("inf"), float("-inf"), [[1]], {"a": 1}, "nan", "\ud800", [None] * 50),
]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values inside ``value``, those of dictionaries and lists too."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*path, key) for key, _ in inside] + [p for key, item in inside for p in places(item, (*path, key))]


def parent_of(document: Any, path: tuple) -> Any:
    for key in path[:-1]:
        document = document[key]
    return document


def edit_document(r: random.Random, document: dict[str, Any]) -> str:
    path = r.choice(places(document))
    parent = parent_of(document, path)
    action = r.choice(["remove", "rename", "add", "swap", "odd", "odd"])
    where = ".".join(map(str, path))
    if action == "remove":
        del parent[path[-1]]
    elif action == "rename" and isinstance(parent, dict):
        name = r.choice([f"{path[-1]} ", path[-1].upper(), "", "x" * 300, f"{path[-1]}.0"])
        parent[name] = parent.pop(path[-1])
        where += f" to {name[:20]!r}"
    elif action == "add" and isinstance(parent, dict):
        parent[r.choice(["", "x", "__class__", "threshold", "0", "self"])] = r.choice(ODD_VALUES)
    elif action == "swap":
        # With one of the same kind: another value would be odd.
        like = [p for p in places(document) if type(parent_of(document, p)[p[-1]]) is type(parent[path[-1]])]
        like = [p for p in like if p[: len(path)] != path and path[: len(p)] != p] or [path]
        other = r.choice(like)
        there = parent_of(document, other)
        parent[path[-1]], there[other[-1]] = there[other[-1]], parent[path[-1]]
        where += f" with {'.'.join(map(str, other))}"
    else:
        parent[path[-1]] = copy.deepcopy(r.choice(ODD_VALUES))
        where += f" to {str(parent[path[-1]])[:20]!r}"
    return f"{action} {where}"


def edit_json(r: random.Random, directory: Path, _: Checkpoints) -> str:
    path = cats_file(r, directory, r"\.json")
    document = json.loads(path.read_text())
    done = [edit_document(r, document) for _ in range(r.choice([1, 1, 2]))]
    path.write_text(json.dumps(document, indent=2))
    return f"edit_json: {'; '.join(done)}"


def duplicate_key(r: random.Random, directory: Path, _: Checkpoints) -> str:
    """The same key twice in one JSON object: the last one counts."""
    path = cats_file(r, directory, r"\.json")
    text = path.read_text()
    match = r.choice(list(re.finditer(r'( *"[^"]+": )(-?[\d.e+-]+|true|"[^"]*"),?\n', text)))
    odd = json.dumps(r.choice([0, 1, 0.75, None, "x", False, 2]))
    path.write_text(f"{text[: match.start()]}{match[1]}{odd},\n{text[match.start() :]}")
    if r.random() < 0.5:
        path.write_text(f"{text[: match.start()]}{match[1]}{match[2]},\n{match[1]}{odd},\n{text[match.end() :]}")
    return f"duplicate_key {match[1].strip()} {odd}"


def permute_layers(r: random.Random, directory: Path, _: Checkpoints) -> str:
    """Layers under each other's names, in the JSON text."""
    path = cats_file(r, directory, r"\.json")
    text = path.read_text()
    path.write_text(
        text.replace("layers.0.", "layers.X.").replace("layers.1.", "layers.0.").replace("layers.X.", "layers.1.")
    )
    return "permute_layers"


# --- forged: the hashes are those of the altered contents -------------------------------------------------------------


def forge_document(r: random.Random, directory: Path, _: Checkpoints) -> str:
    """An entry of a wrong type or out of its range. What a valid entry of another value says cannot be known."""
    done = []

    def edit(document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        path = r.choice(places(document))
        odd = copy.deepcopy(r.choice([None, [], "x", -1, -0.5, 2**70, -(2**70), 1e308, True, [1]]))
        parent_of(document, path)[path[-1]] = odd
        done.append(f"{'.'.join(map(str, path))} to {str(odd)[:20]}")

    forge(directory, edit)
    return f"forge_document: {done}"


DTYPES = [
    *(torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8),
    *(torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64, torch.complex64),
]


def odd_shape(r: random.Random, t: torch.Tensor) -> torch.Tensor:
    flat = t.reshape(-1)
    return r.choice(
        [t[None], t[..., None], flat.repeat(2), flat[:-1], flat[:0], torch.cat([flat, flat[-1:]]), flat.expand(3, -1)]
    ).contiguous()


def odd_element(r: random.Random, t: torch.Tensor) -> torch.Tensor:
    floats = [float("nan"), float("inf"), float("-inf"), -1.0, -1e-30]
    value = r.choice(floats) if t.is_floating_point() else r.choice([-1, torch.iinfo(t.dtype).min])
    changed = t.clone().reshape(-1)
    changed[r.randrange(len(changed)) :: r.choice([1, len(changed)])] = value
    return changed.reshape(t.shape)


def forge_tensors(r: random.Random, directory: Path, _: Checkpoints) -> str:
    """A tensor of another dtype or shape, with an impossible value, missing, too many, or under another's name."""
    done = []

    def edit(document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        key = r.choice(sorted(tensors))
        action = r.choice(["dtype", "dtype", "shape", "element", "element", "remove", "rename", "add", "exchange"])
        if action == "dtype":
            # Not an integer type of counts, in which they are the same numbers.
            counts = not tensors[key].is_floating_point()
            kinds = [d for d in DTYPES if d != tensors[key].dtype and not (counts and d in (torch.int32, torch.int64))]
            dtype = r.choice(kinds)
            tensors[key] = tensors[key].to(dtype)
            key += f" to {dtype}"
        elif action == "shape":
            tensors[key] = odd_shape(r, tensors[key])
        elif action == "element":
            tensors[key] = odd_element(r, tensors[key])
        elif action == "remove":
            del tensors[key]
        elif action == "rename":
            tensors[r.choice([f"{key}2", f"x.{key}", "", key.replace(".", "/")])] = tensors.pop(key)
        elif action == "add":
            tensors[r.choice(["x", "model.layers.9.mlp.threshold", f"{key}.threshold"])] = tensors[key].clone()
        else:  # with one of another meaning
            part = key.rpartition(".")[2]
            kind = (tensors[key].shape, tensors[key].dtype)
            others = [k for k, t in tensors.items() if k.rpartition(".")[2] != part and (t.shape, t.dtype) != kind]
            other = r.choice(sorted(others) or [key])
            tensors[key], tensors[other] = tensors[other], tensors[key]
            key += f" and {other}"
        done.append(f"{action} {key}")

    forge(directory, edit)
    return f"forge_tensors: {done}"


# --- whole files ------------------------------------------------------------------------------------------------------


def exchange_files(r: random.Random, directory: Path, checkpoints: Checkpoints) -> str:
    """Some or all threshold files of another model of the same shape, or of another rule for the same one."""
    others = [*checkpoints.by_rule.values(), checkpoints.other]
    name = cats_file(r, directory).name
    donors = [
        c
        for c in others
        if name in c.cats_files and (c.directory / name).read_bytes() != (directory / name).read_bytes()
    ]
    donor = r.choice(donors or [checkpoints.other])
    names = list(donor.cats_files) if donor is checkpoints.other and r.random() < 0.5 else [name]
    for each in names:
        if (donor.directory / each).exists():
            shutil.copyfile(donor.directory / each, directory / each)
    return f"exchange_files {names} from {donor.directory.name}"


def rename_file(r: random.Random, directory: Path, _: Checkpoints) -> str:
    path = cats_file(r, directory)
    name = r.choice([path.name.upper(), f"{path.name}.bak", path.name.replace("cats_", "cats-"), f" {path.name}"])
    path.rename(directory / name)
    return f"rename_file {path.name} to {name}"


def not_a_file(r: random.Random, directory: Path, _: Checkpoints) -> str:
    path = cats_file(r, directory)
    kind = r.choice(["missing", "directory", "empty", "link to itself", "dead link", "device", "sparse"])
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "dead link":
        path.symlink_to(directory / "nothing")
    elif kind == "device":
        path.symlink_to(os.devnull)
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(10 << 30)
    return f"not_a_file: {path.name} is {kind}"


DAMAGE: tuple[Mutation, ...] = (
    *(
        flip_bits,
        flip_bits,
        flip_digit,
        flip_digit,
        flip_digit,
        cut,
        insert,
        swap_lines,
        odd_json,
        edit_json,
        edit_json,
    ),
    *(duplicate_key, permute_layers, forge_document, forge_document, forge_tensors, forge_tensors, forge_tensors),
    *(exchange_files, rename_file, not_a_file),
)


# --- of a whole checkpoint --------------------------------------------------------------------------------------------


def other_weights(r: random.Random, directory: Path, checkpoints: Checkpoints) -> str:
    """The weights of another model of the same shape beside the thresholds, as an interrupted save may leave them."""
    shutil.copyfile(checkpoints.other.directory / "model.safetensors", directory / "model.safetensors")
    return "other_weights"


def permuted_weights(r: random.Random, directory: Path, checkpoints: Checkpoints) -> str:
    """The same layers in another order, under the old names."""
    path = directory / "model.safetensors"
    swapped = {"0": "1", "1": "0"}
    tensors = {
        re.sub(r"layers\.(\d+)\.", lambda m: f"layers.{swapped[m[1]]}.", key): t for key, t in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return "permuted_weights"


def edit_entry(r: random.Random, directory: Path, checkpoints: Checkpoints) -> str:
    """The entry of config.json. Not its method, without which transformers warns and loads the dense model."""
    path = directory / "config.json"
    document = json.loads(path.read_text())
    entry = document["quantization_config"]
    method = entry.pop("quant_method")
    done = edit_document(r, entry)
    document["quantization_config"] = entry | {"quant_method": method}
    path.write_text(json.dumps(document, indent=2))
    return f"edit_entry: {done}"


OF_A_CHECKPOINT: tuple[Mutation, ...] = (other_weights, permuted_weights, edit_entry)
