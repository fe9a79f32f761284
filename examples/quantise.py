"""Make a model smaller and sparse: weights in int4, int8 or fp8, then thresholds for them, in one checkpoint.

python examples/quantise.py ./my-model text.txt small-model
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import cats_ext

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("text", type=Path, help="text like that of the model's later use")
parser.add_argument("output", type=Path)
parser.add_argument("--weights", default="int4", choices=["int4", "int8", "fp8"])
parser.add_argument("--max-tokens", type=int, default=32768)
options = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(options.model)
cats_ext.quantize(model, options.weights)  # first: thresholds depend on the weights
text = options.text.read_text()
config = cats_ext.calibrate(model, text, tokenizer=tokenizer, max_tokens=options.max_tokens)
cats_ext.apply_cats(model, config)
model.save_pretrained(options.output)
tokenizer.save_pretrained(options.output)
size = sum(file.stat().st_size for file in options.output.iterdir())
print(f"{options.output}: {size / 1e6:,.1f} MB; a token reads {config.bytes_share:.1%} of the MLP weights")
