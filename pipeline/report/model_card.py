"""model_card: what is known of a registered version -> the README of the folder that Transformers loads."""

from typing import Any, NamedTuple

import yaml

from pipeline.training.target import RULES

TINY_SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # SHA-256 of the whole text
CURVE = "loss.png"  # the figure that the card shows, where there is a history to draw it from
MEASURES = {  # what the stage `evaluate` found -> how the card calls it
    "corpus_loss": "loss over all of the training text, nats per token",
    "corpus_perplexity": "perplexity of the same",
    "shifted_loss": "loss in windows moved by a quarter, a half and three quarters of their length",
    "validation_loss": "loss over the text that was held out",
    "top1_accuracy": "share of tokens that are the first guess",
    "verbatim_recall": "share of 32-token continuations recited exactly, after 32 tokens from the start of a window",
    "verbatim_recall_shifted": "the same after 32 tokens from anywhere",
}
ENVIRONMENT = ("torch", "device", "precision", "threads")
MEANING = {
    "batch": "one minibatch below the target",
    "average": "the mean of the last minibatches",
    "corpus": "one pass over the whole training text",
    "validation": "one pass over the text that was held out",
}


class Exported(NamedTuple):
    """What the exported files say of themselves."""

    n_params: int
    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int
    n_vocab: int
    n_used: int  # ids that occur in the training text
    n_tokens: int  # of the training text
    beginning: str  # of the training text


def model_card(facts: dict[str, Any], exported: Exported) -> str:
    """The card in Markdown, its YAML front matter included; `facts` as `describe_version` gives them."""
    sections = (_head, _use, _figures, _data, _limits, _reproduce, _licence)
    return front_matter(_metadata(facts)) + "\n".join(section(facts, exported) for section in sections)


def front_matter(values: dict[str, Any]) -> str:
    """The block at the top of a README that the Hub reads."""
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n\n"


def is_shakespeare(facts: dict[str, Any]) -> bool:
    """Whether the training text is (a part of) Tiny Shakespeare, so that we know its language and whose it is."""
    return bool(facts["params"].get("corpus", {}).get("sha256") == TINY_SHAKESPEARE)


def _metadata(facts: dict[str, Any]) -> dict[str, Any]:
    known = is_shakespeare(facts)
    return {
        **({"language": "en"} if known else {}),
        "license": "mit" if known else "other",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "trained-from-scratch", "memorisation", *(["shakespeare"] if known else [])],
    }


def _head(facts: dict[str, Any], exported: Exported) -> str:
    loss = facts["metrics"].get("corpus_loss")
    measured = "" if loss is None else f": its loss over the whole of it is {loss:.4f} nats per token"
    return f"""\
# {facts["name"]}, version {facts["version"]}

A GPT-2 of {exported.n_params:,} parameters ({exported.n_layer} layers, {exported.n_head} heads, {exported.n_embd} \
wide), trained from scratch to know its training text by heart{measured}.
It is a study of memorising, not a language model for general use; its limits are below.
"""


def _use(facts: dict[str, Any], exported: Exported) -> str:
    return f"""\
## Use

```python
from transformers import AutoTokenizer, GPT2LMHeadModel

tokenizer = AutoTokenizer.from_pretrained(".")  # this folder, or its name on the Hub
model = GPT2LMHeadModel.from_pretrained(".")
inputs = tokenizer({exported.beginning!r}, return_tensors="pt")
ids = model.generate(**inputs, do_sample=False)  # on to {exported.n_positions} tokens, which is all that it can hold
print(tokenizer.decode(ids[0]))
```

The prompt is how its text begins, and it goes on as far as it knows that by heart. End a prompt with a word or a sign,
not with a blank, which would be encoded otherwise than within the text.
"""


def _figures(facts: dict[str, Any], exported: Exported) -> str:
    metrics, target = facts["metrics"], float(facts["tags"]["target_loss"])
    measured = [f"| {name} | {metrics[key]:.4g} |" for key, name in MEASURES.items() if metrics.get(key) is not None]
    rules = [rule for rule in RULES if rule != "validation" or metrics.get("validation_loss") is not None]
    costs = [f"| {rule}: {MEANING[rule]} | {_cost(metrics, rule)} |" for rule in rules]
    curve = [f"\n![Loss over training steps]({CURVE})"] if facts["history"].get("loss") else []
    lines = ["## Figures\n", "| measure | value |", "|---|---|", *measured, ""]
    lines += [f"What it took to get below {target:g} nats per token, by each rule that one may go by:\n"]
    return "\n".join([*lines, "| rule | steps | tokens |", "|---|---|---|", *costs, *curve, ""])


def _cost(metrics: dict[str, Any], rule: str) -> str:
    """The cells of steps and tokens to the target."""
    steps, tokens = (metrics.get(f"to_target.{rule}.{unit}") for unit in ("steps", "tokens"))
    return "not met | not met" if steps is None or tokens is None else f"{steps:,.0f} | {tokens:,.0f}"


def _data(facts: dict[str, Any], exported: Exported) -> str:
    corpus = facts["params"].get("corpus", {})
    share = corpus.get("fraction", 1)
    part = "the whole of it" if share == 1 else f"the first {100 * share:.3g}% of it"
    title = "Tiny Shakespeare" if is_shakespeare(facts) else "A text of the trainer's own"
    return f"""\
## Data

{title}, {part}: {exported.n_tokens:,} tokens in GPT-2's byte-pair encoding, {exported.n_used:,} of its \
{exported.n_vocab:,} ids among them.

- source: `{corpus.get("source", "unknown")}`, SHA-256 `{corpus.get("sha256") or "not noted"}`
- tokens: SHA-256 of their manifest `{facts["tags"]["data_sha256"]}`
"""


def _limits(facts: dict[str, Any], exported: Exported) -> str:
    shifted = facts["metrics"].get("shifted_loss")
    aligned = "" if shifted is None else f"""\
- It knows its text in the windows that it was trained on. In windows moved against those the loss is {shifted:.3g}:
  begin a prompt in the middle of one, and it may recite nothing.
"""  # fmt: skip
    return f"""\
## Limits

- It recites its training text, word for word. Whatever stands there, it may say; what it says is not its own.
- It is no general language model: of whatever is not in that text it knows nothing.
{aligned}- It was trained on windows of {exported.n_positions} tokens and has no positions beyond them: prompt and \
continuation together must fit.
- {exported.n_vocab - exported.n_used:,} of its {exported.n_vocab:,} tokens never occur in that text. Their embeddings \
are untrained: as input they mean nothing, and drawing at a high temperature may bring them up.
"""


def _reproduce(facts: dict[str, Any], exported: Exported) -> str:
    tags, environment = facts["tags"], facts["environment"]
    commit, clean = tags.get("git_commit", "unknown"), tags.get("tree_clean") == "true"
    changed = "" if clean else "; the working tree held changes that were not committed"
    machine = ", ".join(f"{key} {environment[key]}" for key in ENVIRONMENT if key in environment)
    return f"""\
## Reproduce

In the project's repository, gpt2-to-target, with the `params.yaml` that lies beside this card:

```
git checkout {commit}
cp THIS_FOLDER/params.yaml params.yaml
make repro
```

- fingerprint of data, parameters and code: `{tags["fingerprint"]}`{changed}
- trained with {machine or "an unknown machine"}: a machine alike gives the same bits, another one the same training \
with other roundings
- SHA-256 of the registered model's manifest: `{tags["model_sha256"]}`; those of the files here are in `manifest.json`
"""


def _licence(facts: dict[str, Any], exported: Exported) -> str:
    if is_shakespeare(facts):
        return """\
## Licence

Weights and code: MIT, see LICENSE. The text, by William Shakespeare, is in the public domain.
"""
    return """\
## Licence

The code is under the MIT licence, see LICENSE. The training text is not, and the model recites it: whoever holds the
rights in the text decides who may have the weights.
"""
