"""``save_pretrained`` of a patched or quantised transformers model: what belongs together, all or nothing.

transformers writes into a new folder, to which the thresholds are added. The files then replace those of the directory
together. Until the last one is there, loading is refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cats_ext.parallel.ranks import raised_together
from cats_ext.parallel.sharding import group_of, with_bare_layers
from cats_ext.patching.apply import current_config, replaced_activation, sparse_mlps
from cats_ext.patching.detection import projection_names
from cats_ext.patching.mlp import CatsMLP
from cats_ext.quantization.layout import Rows, describe
from cats_ext.thresholds.config import CatsConfig
from cats_ext.thresholds.exact import EXACT, ExactConfig
from cats_ext.thresholds.files import CONFIG_FILE, OLD_FILES, THRESHOLDS_FILE
from cats_ext.thresholds.fit import sample_all_ranks, sample_weights, weight_of
from cats_ext.thresholds.replacement import publish, staged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What configs of transformers' models call the activation of their MLPs.
ACTIVATION_ENTRIES = ("hidden_act", "hidden_activation")
# Without the last one of those that there are, a directory is refused.
_LAST = (THRESHOLDS_FILE, CONFIG_FILE, "config.json")
# The weights of a model and their index; the group is the variant.
_WEIGHTS = (
    re.compile(r"model(\.[^.]+?)?(?:-\d{5}-of-\d{5})?\.safetensors"),
    re.compile(r"model\.safetensors\.index(\.[^.]+)?\.json"),
)


@dataclass
class Saving:
    """A call of ``save_pretrained`` in progress.

    Attributes:
        state_dict: as given by the caller.
        directory: where the files go in the end.
        finish: puts them there.
        names: of the files that are there.
    """

    state_dict: dict[str, Tensor] | None
    directory: Path
    finish: Callable[[], list[str]] = list
    names: list[str] = field(default_factory=list)


_IN_PROGRESS: ContextVar[Saving | None] = ContextVar("cats_saving", default=None)  # of each thread its own


def given_state_dict() -> dict[str, Tensor] | None:
    """The state dict that the call of ``save_pretrained`` in progress was given."""
    saving = _IN_PROGRESS.get()
    return None if saving is None else saving.state_dict


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    *arguments: Any,
    **named: Any,
) -> None:
    """As transformers' own, which it calls; the directory has the old checkpoint or the new one, also after an error.

    Adapters that transformers saves by themselves have no thresholds. All ranks of a tensor-parallel model have to call
    it; the files are there when it returns on any of them.

    Raises:
        ValueError: ``distributed_checkpoint`` is given, or a threshold is not valid.
        OSError: a file cannot be written; there has to be space for the old and the new files.
    """
    if named.get("distributed_checkpoint"):
        raise ValueError("distributed_checkpoint must be False for a patched or quantised model, got True")
    directory = Path(save_directory)
    write, group = partial(type(model).save_pretrained, model), group_of(model)
    writes = is_main_process and not getattr(model, "_hf_peft_config_loaded", False)
    if writes or group is not None:
        entries, files = _additions(model, state_dict)
    if not writes:
        with _in_progress(Saving(state_dict, directory)):
            write(save_directory, is_main_process, state_dict, *arguments, **named)
        with raised_together(group):
            return
    named.setdefault("repo_id", directory.absolute().name)  # for push_to_hub; transformers takes the folder's name
    with staged(directory) as new:

        def finish() -> list[str]:
            written = new / "config.json"
            if written.is_file():  # not twice, nor on a rank that writes nothing
                content = json.loads(written.read_text(encoding="utf-8")) | entries
                written.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
                for name, blob in files.items():
                    (new / name).write_bytes(blob)
                saving.names = publish(new, directory, partial(_superseded, directory), _LAST)
            return saving.names

        saving = Saving(state_dict, directory, finish)
        with _in_progress(saving):
            write(str(new), is_main_process, state_dict, *arguments, **named)
        with raised_together(group):
            finish()


def upload_modified_files(
    model: PreTrainedModel,
    working_dir: str | os.PathLike,
    repo_id: str,
    files_timestamps: dict[str, float],
    **named: Any,
) -> Any:
    """transformers' own, called for ``push_to_hub``. The files are in their place first, also if this fails."""
    saving = _IN_PROGRESS.get()
    names = [] if saving is None else saving.finish()
    if names:
        working_dir = saving.directory
        files_timestamps = {name: math.inf for name in os.listdir(working_dir) if name not in names}
    return type(model)._upload_modified_files(model, working_dir, repo_id, files_timestamps, **named)


@contextmanager
def _in_progress(saving: Saving) -> Iterator[None]:
    token = _IN_PROGRESS.set(saving)
    try:
        yield
    finally:
        _IN_PROGRESS.reset(token)


def _additions(model: PreTrainedModel, state_dict: dict[str, Tensor] | None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Entries of ``config.json`` and further files of a CATS checkpoint."""
    patched, rows = sparse_mlps(model), describe(model) or None
    if not patched:
        return {"quantization_config": checkpoint_entry(rows=rows)}, {}
    if isinstance(config := current_config(model), ExactConfig):
        return {"quantization_config": checkpoint_entry(config, rows=rows)}, {}
    activation = replaced_activation(model)
    samples = {
        module.cats.name: _saved_sample(model, state_dict or {}, name, module) for name, module in patched.items()
    }
    config = replace(config, weights=samples)
    entries = {} if activation is None else dict.fromkeys(_activation_entries(model, activation), activation)
    return entries | {"quantization_config": checkpoint_entry(config, activation, rows)}, config.to_files()


def checkpoint_entry(
    config: CatsConfig | None = None, activation: str | None = None, rows: Rows | None = None
) -> dict[str, Any]:
    """The entry ``quantization_config`` of a checkpoint's ``config.json``."""
    entry: dict[str, Any] = {"quant_method": CatsConfig.quant_method}
    if config is not None:
        entry |= {"rule": config.rule}
        entry |= {} if config.rule == EXACT else {"sparsity": config.sparsity, "bytes_share": config.bytes_share}
    optional = {"activation": activation, "rows": rows}
    return entry | {key: value for key, value in optional.items() if value is not None}


def _activation_entries(model: PreTrainedModel, activation: str) -> list[str]:
    """What the activation of the MLPs is called in the model's ``config.json``; warns if it has none."""
    config = model.config
    names = [name for name in ACTIVATION_ENTRIES if getattr(config, name, None) is not None]
    if not names:
        warnings.warn(
            f"the config of {type(model).__name__} has none of {', '.join(ACTIVATION_ENTRIES)}: without cats_ext this "
            f"checkpoint loads with its own activation instead of {activation}, and computes something else",
            UserWarning,
            stacklevel=4,
        )
    return [config.attribute_map.get(name, name) for name in names]


def _saved_sample(model: PreTrainedModel, state_dict: dict[str, Tensor], name: str, module: CatsMLP) -> Tensor:
    """Of the weights of an MLP that will be in the checkpoint."""
    shard = module.cats.shard
    if shard is not None:
        # Also where it is not used: the other ranks wait for this one, and may have been given no state dict.
        sample = sample_all_ranks(partial(weight_of, with_bare_layers(module, projection_names(module))), shard)
        if not state_dict:
            return sample
    return sample_weights(partial(_saved_weight, model, state_dict, name, module))


def _saved_weight(
    model: PreTrainedModel, state_dict: dict[str, Tensor], name: str, module: CatsMLP, projection: str
) -> Tensor | None:
    """The weight of a projection that will be in the checkpoint."""
    weight = weight_of(module, projection)
    if weight is None:
        return None
    keys = [f"{name}.{projection}{ending}" for ending in ("", ".weight", ".base_layer.weight")]
    key = next((key for key in keys if key in state_dict), None)
    if key is not None:
        return state_dict[key]
    if weight.is_meta:  # offloaded
        from transformers.integrations.accelerate import load_offloaded_parameter

        return load_offloaded_parameter(model, keys[module.cats.target.experts is None])
    if type(weight.data) is not Tensor or not weight.numel():
        raise ValueError(f"weights of {name} are sharded: pass state_dict= with the gathered ones to save_pretrained")
    return weight


def _superseded(directory: Path, names: Sequence[str]) -> list[str]:
    """The old files that would be loaded instead of the new ones, or are a part of the old ones."""
    variants = {_variant(name) for name in names} - {None}
    weights = [name for name in os.listdir(directory) if name not in names and _variant(name) in variants]
    return [*OLD_FILES, *weights]


def _variant(name: str) -> str | None:
    """The variant of a file of weights, empty by default; None for other files."""
    found = next((match for pattern in _WEIGHTS if (match := pattern.fullmatch(name))), None)
    return None if found is None else found[1] or ""
