"""Find thresholds for a model on a text, and save them.

python examples/calibrate.py ./my-model text.txt thresholds
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import cats_ext

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("text", type=Path, help="text like that of the model's later use")
parser.add_argument("output", type=Path)
parser.add_argument("--budget", type=float, default=2 / 3, help="share of the MLP weights that a token may read")
parser.add_argument("--max-tokens", type=int, default=32768)
options = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
config = cats_ext.calibrate(
    model,
    options.text.read_text(),
    tokenizer=AutoTokenizer.from_pretrained(options.model),
    budget=options.budget,
    max_tokens=options.max_tokens,
)
config.save_pretrained(options.output)
for name, layer in config.layers.items():
    print(f"{name}: skips {layer.up_sparsity:.1%} of up, {layer.down_sparsity:.1%} of down")
print(f"a token reads {config.bytes_share:.1%} of the MLP weights")
