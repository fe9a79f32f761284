"""The texts and requests that quality and tuning are measured on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def read(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode()


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in read(path).splitlines() if line.strip()]


def c4_documents(data: Path) -> list[str]:
    return [row["text"] for row in read_jsonl(data / "text/c4_sample.jsonl.gz")]


def load_texts(data: Path) -> dict[str, str]:
    documents = c4_documents(data)
    return {
        "wikitext_valid": read(data / "text/wikitext2_valid.txt.gz"),
        "wikitext": read(data / "text/wikitext2_test.txt.gz"),
        "c4": "\n\n".join(documents),
        "c4_end": "\n\n".join(documents[::-1]),  # for calibration: evaluation is on the beginning
    }


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, count: int | None = None) -> Tensor:
    """All ids of ``text``, or the first ``count``, for which 8 characters a token are read."""
    text = text if count is None else text[: 8 * count]
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:count])


def load_requests(path: Path, items: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """The output of quality.task_requests, at most ``items`` of each task."""
    return {name: found[:items] for name, found in json.loads(read(path)).items()}
