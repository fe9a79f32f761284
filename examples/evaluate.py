"""What sparsity costs on a text: perplexity beside the dense model's, and how far the predictions are from its own.

python examples/evaluate.py ./my-model thresholds other-text.txt
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cats_ext

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("thresholds")
parser.add_argument("text", type=Path, help="other text than that of the calibration")
parser.add_argument("--window", type=int, default=1024)
parser.add_argument("--max-windows", type=int, default=8)
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(device)
tokenizer = AutoTokenizer.from_pretrained(options.model)
ids = tokenizer(options.text.read_text(), return_tensors="pt").input_ids
cats_ext.apply_cats(model, cats_ext.CatsConfig.from_pretrained(options.thresholds))
for sparsity in (0.3, 0.5, 0.7):
    cats_ext.set_sparsity(model, sparsity)
    result = cats_ext.evaluation.compare(model, ids, window=options.window, max_windows=options.max_windows)
    print(
        f"{sparsity:.0%} skipped: perplexity {result.sparse.ppl:.2f}, dense {result.dense.ppl:.2f}, "
        f"KL {result.kl:.4f} nats, same top token {result.top1:.1%}"
    )
