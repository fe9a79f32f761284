"""A conversation with a sparse model; an empty line ends it.

python examples/chat.py ./my-sparse-model
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import cats_ext  # with it, from_pretrained loads a model that was saved with thresholds as a sparse one

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="saved by save_pretrained of a patched model, with a chat template")
parser.add_argument("--tokens", type=int, default=256, help="of an answer, at most")
options = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
model.to("cuda" if torch.cuda.is_available() else "cpu")
tokenizer = AutoTokenizer.from_pretrained(options.model)
engine = cats_ext.DecodeEngine(model)
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
messages = []
while question := input("> ").strip():
    messages.append({"role": "user", "content": question})
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    output = engine.generate(**inputs, max_new_tokens=options.tokens, streamer=streamer)
    answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    messages.append({"role": "assistant", "content": answer})
