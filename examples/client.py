"""Ask a server with OpenAI's interface, such as vLLM, and print the answer as it comes. Needs only Python.

python examples/client.py "Why is the sky blue?" --url http://localhost:8000
"""

import argparse
import json
import urllib.request

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("question")
parser.add_argument("--url", default="http://localhost:8000")
parser.add_argument("--tokens", type=int, default=256, help="of the answer, at most")
options = parser.parse_args()

with urllib.request.urlopen(f"{options.url}/v1/models") as response:
    model = json.load(response)["data"][0]["id"]
body = {
    "model": model,
    "messages": [{"role": "user", "content": options.question}],
    "max_tokens": options.tokens,
    "stream": True,
}
headers = {"Content-Type": "application/json"}
request = urllib.request.Request(f"{options.url}/v1/chat/completions", json.dumps(body).encode(), headers)
with urllib.request.urlopen(request) as response:
    for line in response:  # server-sent events: "data: {...}", at the end "data: [DONE]"
        data = line.decode().removeprefix("data: ").strip()
        if data and data != "[DONE]":
            choices = json.loads(data)["choices"]
            print(choices[0]["delta"].get("content") or "" if choices else "", end="", flush=True)
print()
