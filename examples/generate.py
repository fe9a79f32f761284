"""Continue a prompt with the dense model and at several sparsities, and say how fast each was.

python examples/generate.py ./my-model thresholds "The cat"
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cats_ext

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("thresholds", help="directory written by calibrate.py or cats calibrate")
parser.add_argument("prompt")
parser.add_argument("--tokens", type=int, default=64)
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(device)
tokenizer = AutoTokenizer.from_pretrained(options.model)
inputs = tokenizer(options.prompt, return_tensors="pt").to(device)
engine = cats_ext.DecodeEngine(model)


def show(name: str) -> None:
    engine.generate(**inputs, max_new_tokens=2)  # captures the step, once
    start = time.perf_counter()
    output = engine.generate(**inputs, max_new_tokens=options.tokens)
    seconds = time.perf_counter() - start
    written = output.shape[1] - inputs.input_ids.shape[1]
    print(f"{name}, {written / seconds:.1f} tokens/s:\n{tokenizer.decode(output[0], skip_special_tokens=True)}\n")


show("dense")
cats_ext.apply_cats(model, cats_ext.CatsConfig.from_pretrained(options.thresholds))
for sparsity in (0.3, 0.5, 0.7):
    cats_ext.set_sparsity(model, sparsity)  # in place; the captured step follows
    show(f"{sparsity:.0%} skipped")
