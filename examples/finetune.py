"""Tune a sparse model with LoRA, so that it makes up for the neurons it skips, and save it merged.

python examples/finetune.py ./my-model text.txt tuned
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from cats_ext.finetune import FinetuneSettings, finetune

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("text", type=Path)
parser.add_argument("output", type=Path)
parser.add_argument("--sparsity", type=float, default=0.7)
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--length", type=int, default=512, help="tokens in a window")
options = parser.parse_args()

result = finetune(
    AutoModelForCausalLM.from_pretrained(options.model),
    options.text.read_text(),
    options.output,
    FinetuneSettings(sparsity=options.sparsity, steps=options.steps, sequence_length=options.length),
    tokenizer=AutoTokenizer.from_pretrained(options.model),
)
for when in ("before", "after"):
    print(f"perplexity {when}: {result[when]['ppl']:.2f}")
