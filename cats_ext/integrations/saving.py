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

import torch.distributed as dist
from torch import Tensor

from cats_ext.parallel.ranks import check_same, raised_together
from cats_ext.parallel.sharding import gathered_state_dict, group_of
from cats_ext.patching.apply import current_config, replaced_activation, sparse_mlps
from cats_ext.patching.mlp import CatsMLP
from cats_ext.quantization.layout import Rows, describe
from cats_ext.thresholds.config import CatsConfig
from cats_ext.thresholds.exact import EXACT, ExactConfig
from cats_ext.thresholds.files import CONFIG_FILE, OLD_FILES, THRESHOLDS_FILE
from cats_ext.thresholds.fit import sample_weights, weight_of
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
        state_dict: as given by the caller; None is the model's own.
        directory: where the files go in the end.
        group: of a tensor-parallel model.
        finish: puts them there.
        names: of the files that are there.
    """

    state_dict: dict[str, Tensor] | None
    directory: Path
    group: dist.ProcessGroup | None = None
    finish: Callable[[], list[str]] = list
    names: list[str] = field(default_factory=list)


_IN_PROGRESS: ContextVar[Saving | None] = ContextVar("cats_saving", default=None)  # of each thread its own


def state_dict_to_save() -> dict[str, Tensor] | None:
    """That of the call of ``save_pretrained`` in progress; None is the model's own."""
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
        ValueError: ``distributed_checkpoint`` is given, a threshold is not valid, or only some ranks have a state dict.
        OSError: a file cannot be written; there has to be space for the old and the new files.
    """
    if named.get("distributed_checkpoint"):
        raise ValueError("distributed_checkpoint must be False for a patched or quantised model, got True")
    group = group_of(model)
    check_same(group, "whether state_dict is given", lambda: state_dict is not None)
    adapters = getattr(model, "_hf_peft_config_loaded", False)
    writes = is_main_process and not adapters and (group is None or dist.get_rank() == 0)
    # What communicates comes first, so that no rank waits for one that cannot write.
    config = current_config(model) if sparse_mlps(model) else None
    if group is not None and state_dict is None and not adapters:
        state_dict = gathered_state_dict(model, keep=writes)
    saving = Saving(state_dict, Path(save_directory), group)
    with raised_together(group), _in_progress(saving):
        if writes:
            _write(model, saving, _additions(model, config, state_dict), arguments, named)
        elif group is None or adapters:
            type(model).save_pretrained(model, save_directory, is_main_process, state_dict, *arguments, **named)


def _write(
    model: PreTrainedModel,
    saving: Saving,
    additions: tuple[dict[str, Any], dict[str, bytes]],
    arguments: Sequence[Any],
    named: dict[str, Any],
) -> None:
    """Let transformers write into a new folder, with the ``additions``, and put the files into their directory."""
    directory, (entries, files) = saving.directory, additions
    named.setdefault("repo_id", directory.absolute().name)  # for push_to_hub; transformers takes the folder's name
    with staged(directory) as new:

        def finish() -> list[str]:
            written = new / "config.json"
            if written.is_file():  # not twice
                content = json.loads(written.read_text(encoding="utf-8")) | entries
                written.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
                for name, blob in files.items():
                    (new / name).write_bytes(blob)
                saving.names = publish(new, directory, partial(_superseded, directory), _LAST)
            return saving.names

        saving.finish = finish
        type(model).save_pretrained(model, str(new), True, saving.state_dict, *arguments, **named)
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


def barrier_after_save(model: PreTrainedModel, *arguments: Any) -> None:
    """transformers' own; not where :func:`save_pretrained` waits for all ranks itself, and tells them of an error."""
    saving = _IN_PROGRESS.get()
    if saving is None or saving.group is None:
        type(model).barrier_after_gathered_checkpoint_save(model, *arguments)


@contextmanager
def _in_progress(saving: Saving) -> Iterator[None]:
    token = _IN_PROGRESS.set(saving)
    try:
        yield
    finally:
        _IN_PROGRESS.reset(token)


def _additions(
    model: PreTrainedModel, config: CatsConfig | None, state_dict: dict[str, Tensor] | None
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Entries of ``config.json`` and further files of a CATS checkpoint with the thresholds of ``config``."""
    rows = describe(model) or None
    if config is None or isinstance(config, ExactConfig):
        return {"quantization_config": checkpoint_entry(config, rows=rows)}, {}
    activation = replaced_activation(model)
    samples = {
        module.cats.name: sample_weights(partial(_saved_weight, model, state_dict or {}, name, module))
        for name, module in sparse_mlps(model).items()
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
