"""EleutherAI's lm-evaluation-harness on a dense and a sparse model: the harness's own tasks, or task files on disk.

A local task is the harness's YAML configuration as a dictionary, with its JSON dataset builder on a local file. One
example a line: ``choices`` (list) and ``answer`` (0-based index) beside the fields that the prompt names; ``lambada``
has only ``text``, whose last word is the target. Prompts are the harness's own for these tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from cats_ext.evaluation.significance import PairedAccuracy, mean_accuracy, paired_accuracy

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

_ACCURACY = {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
_CHOICE = _ACCURACY | {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
}
_QUESTION = _CHOICE | {"doc_to_text": "Question: {{question}}\nAnswer:"}
_GAP = "{% set gap = sentence.index('_') %}"
LOCAL_TASKS: dict[str, dict[str, Any]] = {
    "arc_easy": _QUESTION,
    "arc_challenge": _QUESTION,
    "boolq": _CHOICE | {"doc_to_text": "{{passage}}\nQuestion: {{question}}?\nAnswer:", "doc_to_choice": ["no", "yes"]},
    "hellaswag": _CHOICE | {"doc_to_text": "{{context}}"},
    "openbookqa": _CHOICE | {"doc_to_text": "{{question}}"},
    "piqa": _QUESTION,
    "sciq": _CHOICE | {"doc_to_text": "{{support.lstrip()}}\nQuestion: {{question}}\nAnswer:"},
    # The sentence with either name in its gap; the end of the sentence is scored.
    "winogrande": _CHOICE
    | {
        "doc_to_text": "{{answer}}",
        "doc_to_choice": _GAP + "{{[sentence[:gap] + choices[0], sentence[:gap] + choices[1]]}}",
        "doc_to_target": _GAP + "{{sentence[gap + 1:].strip()}}",
    },
    "lambada": _ACCURACY
    | {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.rsplit(' ', 1)[0]}}",
        "doc_to_target": "{{' ' + text.rsplit(' ', 1)[1]}}",
    },
}


def local_task(name: str, directory: Path) -> dict[str, Any]:
    """The harness's configuration of task ``name`` on ``directory/NAME.jsonl`` or ``.jsonl.gz``.

    Raises:
        ValueError: there is no prompt for a task of this name.
        FileNotFoundError: the file is missing.
    """
    if name not in LOCAL_TASKS:
        raise ValueError(f"local tasks are {', '.join(LOCAL_TASKS)}, got '{name}'")
    files = [directory / f"{name}.jsonl", directory / f"{name}.jsonl.gz"]
    path = next((path for path in files if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"task file '{files[0]}' (or .gz) does not exist")
    return LOCAL_TASKS[name] | {
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(path.resolve())}},
        "validation_split": "validation",
    }


@cache
def _task_manager(named: bool) -> TaskManager:
    """The harness's; it takes ten seconds to find the tasks that have a name."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"tasks need the evaluation harness: pip install 'cats_ext[eval]' ({error})") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=named)


def check_tasks(names: Sequence[str]) -> None:
    """Raise ValueError for a name that the harness does not know, ImportError if it is not installed."""
    for name in names:
        if not name.endswith(".yaml") and name not in _task_manager(True).all_tasks:
            close = " or ".join(get_close_matches(name, _task_manager(True).all_tasks))
            hint = f"; did you mean {close}?" if close else ""
            raise ValueError(f"tasks must be names that lm-evaluation-harness knows, got {name[:80]!r}{hint}")


def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | dict[str, Any]],
    *,
    limit: int | None = None,
    batch_size: int = 16,
) -> dict[str, list[bool]]:
    """Which items of each task ``model`` gets right, zero-shot, by the harness's metric ``acc``.

    Args:
        tasks: names that the harness knows (downloaded by it), or configurations of :func:`local_task`.
        limit: number of items of a task that are used, from its beginning; None for all.

    Raises:
        ImportError: lm_eval is not installed.
        ValueError: a task has no metric ``acc`` (generative tasks and groups of tasks report others).
    """
    manager = _task_manager(any(isinstance(task, str) for task in tasks))
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    # Not simple_evaluate: it takes ten seconds a call to describe the machine.
    loaded = manager.load(list(tasks))
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = evaluate(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    result = {}
    for name, samples in found["samples"].items():
        ordered = sorted(samples, key=lambda sample: sample["doc_id"])
        if any("acc" not in sample for sample in ordered):
            raise ValueError(f"task '{name}' has no metric acc: choose multiple-choice tasks")
        result[name.removeprefix("local_")] = [bool(sample["acc"]) for sample in ordered]
    return result


def compare_answers(
    dense: dict[str, list[bool]], sparse: dict[str, list[bool]]
) -> tuple[dict[str, PairedAccuracy], PairedAccuracy]:
    """Each task with its paired test, and the mean over tasks."""
    tasks = {name: paired_accuracy(name, dense[name], sparse[name]) for name in dense}
    return tasks, mean_accuracy(tasks)
