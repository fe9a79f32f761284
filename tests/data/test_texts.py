"""Long text: the parts that a calibration draws, and its memory, which does not grow with the text."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import CharacterTokenizer

import cats_ext
from cats_ext.data import texts as calibration_texts
from cats_ext.data.texts import PART, cut_text, sample_size, sample_texts
from cats_ext.data.windows import collect_windows

WORDS = " ".join(str(random.Random(i).randrange(10**6)) for i in range(3000))


@pytest.mark.parametrize("text", ["", "a cat", WORDS, "x" * 5000, " " * 999, "line\n" * 800])
@pytest.mark.parametrize("size", [1, 7, 100, 10**6])
def test_parts_are_the_text(text, size):
    parts = list(cut_text(text, size))
    assert "".join(parts) == text and max(map(len, parts)) <= size
    if text == WORDS and size == 100:
        assert all(part.startswith(" ") for part in parts[1:])  # no number is cut


def test_a_sample_of_little_text_is_all_of_it():
    assert sample_texts(enumerate(["one", "", WORDS]), 32, 64, 0) == ["one", WORDS]
    split = [(0, "on"), (0, "e"), (1, WORDS[:99]), (1, WORDS[99:])]
    assert sample_texts(split, 32, 64, 0) == ["one", WORDS]


def test_a_sample_has_pieces_from_everywhere_in_their_order(monkeypatch):
    monkeypatch.setattr(calibration_texts, "PART", 4000)
    numbered = [f"{i:05} " * 5 for i in range(10_000)]

    def sample(seed: int) -> list[int]:
        found = sample_texts(enumerate(numbered), 1, 64, seed)
        assert 3900 < sum(map(len, found)) <= 4000
        return [int(text[:5]) for text in found]

    first = sample(0)
    assert first == sorted(first) == sample(0) != sample(1)
    assert first[0] < 1000 and first[-1] > 9000
    chosen = [i for seed in range(300) for i in sample(seed)]
    assert all(abs(sum(i // 1000 == k for i in chosen) / len(chosen) - 0.1) < 0.01 for k in range(10))


def test_neighbouring_pieces_are_one_text_again(monkeypatch):
    monkeypatch.setattr(calibration_texts, "PART", len(WORDS) - 40)
    found = sample_texts([(0, WORDS)], 1, 4, 0)
    assert len(found) <= 3 and all(text in WORDS for text in found)


def test_only_a_sample_of_long_text_is_tokenised(monkeypatch):
    monkeypatch.setattr(calibration_texts, "PART", 2000)
    seen = []

    class Counting(CharacterTokenizer):
        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            seen.append(len(text))
            return super().__call__(text, **options)

    for data in (WORDS * 20, [WORDS] * 20):
        seen.clear()
        windows = collect_windows(data, Counting(), 50, 200, seed=0)
        assert sum(map(len, windows)) == 200 and sum(seen) <= sample_size(200) + 1 < len(WORDS) * 20
    assert sum(map(len, collect_windows(iter([WORDS * 1000]), Counting(), 50, 200, seed=0))) == 200
    assert max(seen) <= PART


SCRIPT = """
import sys
from pathlib import Path
from cats_ext.cli import app

def peak():  # ru_maxrss begins with that of the process which started this one
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1])  # KiB

start = peak()
app(["calibrate", *sys.argv[1:]], standalone_mode=False)
print(peak() - start)
"""


def test_memory_does_not_grow_with_the_text(model_dir, tmp_path):
    """200 MB of text take no more than 2 MB do (within 100 MB); their tokens alone would take several GB."""
    line = " ".join(WORDS[:4000].split()) + "\n"

    def grown(megabytes: int) -> float:
        text = tmp_path / f"{megabytes}.txt"
        with text.open("w") as file:
            for _ in range(megabytes * 10**6 // len(line)):
                file.write(line)
        arguments = [model_dir, "--text", text, "-o", tmp_path / "out", "--max-tokens", 2048, "--rule", "plain"]
        command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
        environment = {"PYTHONPATH": str(Path(cats_ext.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment | {"HF_HUB_OFFLINE": "1"})
        assert run.returncode == 0, run.stderr
        return int(run.stdout.split()[-1]) / 1024

    assert grown(200) < grown(2) + 100
