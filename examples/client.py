"""Call both endpoints of a running app: `python examples/client.py [http://127.0.0.1:7860 [PROMPT]]`."""

import sys

import httpx
from gradio_client import Client

address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:7860"
prompt = sys.argv[2] if len(sys.argv) > 2 else "The"  # best from the text that the model has learnt
address = address if "://" in address else f"http://{address}"
try:
    client = Client(address, verbose=False)
except (httpx.HTTPError, ValueError):
    sys.exit(f"error: nothing answers at {address}: start the app with `make app`, or name another address")

# /generate streams: each answer contains all text generated so far; `finished` is true in the last one
job = client.submit(prompt, max_tokens=60, temperature=0.8, samples=2, seed=1, api_name="/generate")
for answer in job:
    print(f"\r{sum(len(sample['text']) for sample in answer['samples'])} characters", end="")
print(f", {answer['tokens_per_s']} tokens/s, by {answer['model']}\n")
for sample in answer["samples"]:
    print(f"seed {sample['seed']}, {sample['novelty']:.0%} new:{sample['text']}\n")
    for passage in sample["passages"]:
        print(f"  token {passage['place']:,} of the training text: {passage['text']!r}")

# /next_token: the most likely next tokens, and how often each occurs in the training text after this context
answer = client.predict(prompt, most=3, api_name="/next_token")
for token in answer["tokens"]:
    print(f"{token['probability']:7.2%}  {token['text']!r}, {token['times_in_text']} times in the text")
