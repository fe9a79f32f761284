"""A calibration that is interrupted anywhere and called again gives the thresholds of one that was not."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_model, tokens

from cats_ext import calibrate
from cats_ext.calibration import checkpoint as calibration_checkpoint
from cats_ext.calibration import passes as calibration_passes

ARGUMENTS = dict(
    rule="two_threshold",
    importance="gradient",
    gate_power=0.5,
    budget=0.6,
    allocation="search",
    sequence_length=100,
    progress=False,
)


class Interrupted(BaseException):
    pass


@pytest.fixture(autouse=True)
def write_always(monkeypatch):
    monkeypatch.setattr(calibration_checkpoint, "_SECONDS", 0.0)


def interrupt_after(monkeypatch, count: int) -> None:
    """Raise before the batch number ``count`` of all passes is run."""
    left = [count]
    really = calibration_passes._options

    def options(model):
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted
        return really(model)

    monkeypatch.setattr(calibration_passes, "_options", options)


@pytest.fixture(scope="module")
def whole():
    return calibrate(tiny_model(), tokens(400), **ARGUMENTS)


@pytest.mark.parametrize("after", [1, 3, 4, 6, 9, 14])  # four passes of four batches
def test_resumed_is_the_same(whole, tmp_path, monkeypatch, after):
    path, model = tmp_path / "new" / "checkpoint.safetensors", tiny_model()
    interrupt_after(monkeypatch, after)
    with pytest.raises(Interrupted):
        calibrate(model, tokens(400), checkpoint=path, **ARGUMENTS)
    monkeypatch.undo()
    assert path.exists() and all(not module._forward_hooks for module in model.modules())
    run = [0]
    really = calibration_passes._options

    def counted(model):
        run[0] += 1
        return really(model)

    monkeypatch.setattr(calibration_passes, "_options", counted)
    config = calibrate(model, tokens(400), checkpoint=path, **ARGUMENTS)
    assert run[0] == 16 - after
    assert config.to_dict() == whole.to_dict() and config.statistics == whole.statistics
    for name, threshold in whole.thresholds.items():
        assert torch.equal(config.thresholds[name], threshold)
        assert torch.equal(config.down_thresholds[name], whole.down_thresholds[name])
    calibrate(model, tokens(400), checkpoint=path, **ARGUMENTS)  # until the result is on disk, nothing is lost
    assert run[0] == 16 - after


@pytest.mark.parametrize("after", [5, 10])  # in the first and in the last of three passes
def test_inputs_are_continued_too(tmp_path, monkeypatch, after):
    arguments = ARGUMENTS | dict(rule="three_threshold", allocation="uniform")
    whole, model = calibrate(tiny_model(), tokens(400), **arguments), tiny_model()
    interrupt_after(monkeypatch, after)
    with pytest.raises(Interrupted):
        calibrate(model, tokens(400), checkpoint=tmp_path / "checkpoint", **arguments)
    monkeypatch.undo()
    config = calibrate(model, tokens(400), checkpoint=tmp_path / "checkpoint", **arguments)
    assert config.to_dict() == whole.to_dict() and config.statistics == whole.statistics
    assert config.input_thresholds == whole.input_thresholds


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        with pytest.raises(Interrupted):
            calibrate(tiny_model(), tokens(400), checkpoint=tmp_path / "checkpoint", **ARGUMENTS)
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("change", [dict(gate_power=0.25), dict(seed=1), dict(rule="weighted"), dict(batch_size=2)])
def test_a_checkpoint_of_other_arguments_is_refused(checkpoint, change):
    with pytest.raises(ValueError, match="is of a calibration with other arguments, text, model or version: remove it"):
        calibrate(tiny_model(), tokens(400), checkpoint=checkpoint, **ARGUMENTS | change)


def test_a_checkpoint_of_other_text_is_refused(checkpoint):
    with pytest.raises(ValueError, match="other arguments, text, model or version"):
        calibrate(tiny_model(), tokens(400, seed=1), checkpoint=checkpoint, **ARGUMENTS)


def test_a_checkpoint_of_other_weights_is_refused(checkpoint):
    with pytest.raises(ValueError, match="other arguments, text, model or version"):
        calibrate(tiny_model(seed=1), tokens(400), checkpoint=checkpoint, **ARGUMENTS)


def test_a_checkpoint_of_another_version_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr("cats_ext.calibration.settings.__version__", "0")
    with pytest.raises(ValueError, match="other arguments, text, model or version"):
        calibrate(tiny_model(), tokens(400), checkpoint=checkpoint, **ARGUMENTS)


def test_a_damaged_checkpoint_is_refused(checkpoint):
    content = checkpoint.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"x" * 100):
        checkpoint.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is damaged|other arguments"):
            calibrate(tiny_model(), tokens(400), checkpoint=checkpoint, **ARGUMENTS)


def test_a_flipped_bit_is_refused(checkpoint):
    content = checkpoint.read_bytes()
    for place in range(8, len(content), len(content) // 60):
        altered = bytearray(content)
        altered[place] ^= 1
        checkpoint.write_bytes(altered)
        with pytest.raises(ValueError, match=r"is damaged|other arguments"):
            calibrate(tiny_model(), tokens(400), checkpoint=checkpoint, **ARGUMENTS)


def test_a_checkpoint_that_cannot_be_written_is_refused_before_the_first_pass(tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 0)
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path, "is a directory"),
        (tmp_path / "file" / "checkpoint", "cannot be written: Not a directory"),
        ("/proc/checkpoint", "cannot be written: No such file or directory"),
        ("/dev/full", "exists and is not a file"),
        (tmp_path / ("x" * 300), "cannot be written: File name too long"),
    ):
        with pytest.raises(OSError, match=f"checkpoint '{path}' {reason}"):
            calibrate(tiny_model(), tokens(400), checkpoint=path, **ARGUMENTS)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_checkpoint_that_can_no_longer_be_written_is_warned_of(checkpoint, whole, monkeypatch):
    before = checkpoint.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(calibration_checkpoint, "write_together", full)
    with pytest.warns(RuntimeWarning, match=f"checkpoint '{checkpoint}' cannot be written: No space left"):
        config = calibrate(tiny_model(), tokens(400), checkpoint=checkpoint, **ARGUMENTS)
    assert config.to_dict() == whole.to_dict() and checkpoint.read_bytes() == before


def test_a_full_disk_leaves_the_earlier_checkpoint(checkpoint, whole, monkeypatch):
    before = checkpoint.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            calibrate(tiny_model(), tokens(400), checkpoint=checkpoint, **ARGUMENTS)
    assert checkpoint.read_bytes() == before
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]
    assert calibrate(tiny_model(), tokens(400), checkpoint=checkpoint, **ARGUMENTS).to_dict() == whole.to_dict()
