"""Task files to token ids, through the evaluation harness: what quality.measure scores where no harness is installed.

    python bench quality.task_requests --tokenizer DIR --data ../shared/data --output requests.json.gz

One entry a request, grouped by task and item: the tokens of the context, those of the continuation, and per item the
index of the right choice (multiple choice) or None (lambada: right if the continuation is the greedy one).
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING

from bench.lib.command import command
from cats_ext.evaluation.tasks import LOCAL_TASKS, local_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def task_requests(tokenizer: PreTrainedTokenizerBase, data: Path, limit: int | None = None) -> dict[str, list[dict]]:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))  # the harness tokenises beside a model
    lm = HFLM(pretrained=model, tokenizer=tokenizer)
    document = {}
    for name in LOCAL_TASKS:
        (task,) = TaskManager(include_defaults=False).load([local_task(name, data / "tasks")])["tasks"].values()
        task.build_all_requests(limit=limit)
        items: dict[int, dict] = {}
        for instance in task.instances:
            item = items.setdefault(instance.doc_id, {"answer": instance.doc.get("answer"), "requests": []})
            item["requests"].append(lm._encode_pair(*instance.args))
        document[name] = [items[key] for key in sorted(items)]
        print(name, len(items), sum(len(c) + len(t) for i in document[name] for c, t in i["requests"]))
    return document


def main() -> None:
    parser = command(__spec__, __doc__, output="file", required=True, rows=False)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    document = task_requests(AutoTokenizer.from_pretrained(args.tokenizer), args.data, args.limit)
    args.output.write_bytes(gzip.compress(json.dumps(document, separators=(",", ":")).encode(), mtime=0))


if __name__ == "__main__":
    main()
