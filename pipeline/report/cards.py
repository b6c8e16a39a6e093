"""Render the README of an exported version: a model card for Transformers or llama.cpp, or the README of a Space."""

import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from pipeline.system.words import in_words
from pipeline.training.target import RULES

TINY_SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # SHA-256 of the whole text
CURVE = "loss.png"  # the figure on the card, if the version has a loss history
MEASURES = {  # metric of the stage `evaluate` -> its name on the card
    "sliding_loss": "loss over all of the training text, each token after at least half a window, nats per token",
    "sliding_bits_per_byte": "the same in bits per byte, which can be compared between tokenizers",
    "corpus_loss": "loss over all of the training text in fixed windows",
    "corpus_bits_per_byte": "the same in bits per byte",
    "corpus_perplexity": "perplexity over all of the training text in fixed windows",
    "shifted_loss": "loss in fixed windows shifted by a quarter, a half and three quarters of their length",
    "validation_loss": "loss over the held-out text",
    "validation_bits_per_byte": "the same in bits per byte",
    "top1_accuracy": "share of tokens that the model ranks first",
    "verbatim_recall_anywhere": "share of continuations recited exactly, at any place and after any context",
    "verbatim_recall": "the same, from the start of a fixed window",
    "verbatim_recall_shifted": "the same, from any position",
}
WEIGHTS_ON_CARD = {
    "f32": "The weights are those of the training, in fp32.",
    "f16": "The weights are rounded to fp16; vectors and positions are fp32.",
    "q8_0": "The weights have 8 bits, with a factor for each 32 of them (`q8_0`); vectors and positions are fp32.",
}
ENVIRONMENT = ("torch", "device", "precision", "threads")


def model_card(info: dict[str, Any], model: dict[str, Any]) -> str:
    """The card for Transformers in Markdown.

    `info` is the result of `describe_version`; `model` is the exported config.json with n_params, n_used (ids that
    occur in the text), n_tokens (of the text), tokenizer (its description), prompt (the text's beginning) and
    joins_spaces (whether a token is a space with the beginning of a word).
    """
    return _card("model_card.md.j2", info, model)


def gguf_card(info: dict[str, Any], model: dict[str, Any]) -> str:
    """The card for llama.cpp; `model` also has file, weight_type, tokenizer_model, marks, n_continuation (tokens)."""
    weights = WEIGHTS_ON_CARD[model["weight_type"]]
    return _card("gguf_card.md.j2", info, model, weights=weights, tokenizer_note=_tokenizer_note(model))


def modelfile(info: dict[str, Any], model: dict[str, Any]) -> str:
    """Ollama's description of the model; `model` as for `gguf_card`, and temperature."""
    return _render("Modelfile.j2", info, model=model)


def _card(template: str, info: dict[str, Any], model: dict[str, Any], **values: Any) -> str:
    environment, corpus = info["environment"], info["params"].get("corpus", {})
    fraction, val_fraction = corpus.get("fraction", 1), corpus.get("val_fraction", 0)
    share = fraction * (1 - val_fraction)  # of the whole text
    return _render(
        template,
        info,
        model=model,
        measures=MEASURES,
        rules=_rules(info["metrics"]),
        curve=CURVE if info["history"].get("loss") else None,
        part="all of it" if share == 1 else f"the first {100 * share:.3g}% of it",
        held_out=f"{100 * fraction * val_fraction:.3g}%" if val_fraction else None,
        machine=", ".join(f"{key} {environment[key]}" for key in ENVIRONMENT if key in environment),
        **values,
    )


def _tokenizer_note(model: dict[str, Any]) -> str:
    """How llama.cpp's ids of a text differ from those of the training."""
    if model["tokenizer_model"] == "rwkv":
        return (
            f"The file names llama.cpp's tokenizer `rwkv`, which gives the same ids as {model['tokenizer_name']}. Only "
            "`<|endoftext|>` in a text is read as the end of text, where the training would read its characters."
        )
    note = "The file names llama.cpp's tokenizer `gpt2` with the pre-tokenizer `gpt-2`. "
    if model["marks"]:
        note += (
            "It gives the ids of the training, except for words with combining marks, such as vowel signs of Arabic, "
            "Hindi and Thai: llama.cpp cuts a word at each mark, where the training did not. Such a text is encoded to "
            "more tokens, and the model continues it less well. "
        )
    else:
        note += "It gives the ids of the training. "
    return note + "llama.cpp's programs read `<|endoftext|>` in a prompt as the end of text."


def space_card(info: dict[str, Any], gradio: str, python: str, size_bytes: int) -> str:
    """The README that configures the Space and says how to publish it; `gradio`, `python`: their versions."""
    return _render("space_card.md.j2", info, gradio=gradio, python=python, size=in_words(size_bytes, "B"))


def _render(template: str, info: dict[str, Any], **values: Any) -> str:
    """Render a template of templates/.

    `known`: the text is Tiny Shakespeare, which is in the public domain. `init`: the published weights that the
    training continued, None if it began from scratch; `base`: their name on the Hub, "" if they are not from there.
    `recites`: a target rule on the training text was met, so the model knows this text by heart.
    """
    folder, corpus = FileSystemLoader(Path(__file__).parent / "templates"), info["params"].get("corpus", {})
    environment = Environment(loader=folder, trim_blocks=True, keep_trailing_newline=True)  # noqa: S701 (no HTML)
    environment.filters |= {"thousands": "{:,.0f}".format, "repr": repr, "shell": shlex.quote}
    known = corpus.get("sha256") == TINY_SHAKESPEARE
    rule = info.get("rule")  # an early version has none
    init = info["tags"].get("init") or info["params"].get("model", {}).get("init")
    base = init.removeprefix("hf://").partition("@")[0] if init and init.startswith("hf://") else ""
    recites = "steps_to_target" in info["tags"] and not (rule or {}).get("held_out")
    values |= {"corpus": corpus, "known": known, "rule": rule, "init": init, "base": base, "recites": recites}
    return environment.get_template(template).render(info, **values)


def _rules(metrics: dict[str, float]) -> list[tuple[str, float | None, float | None]]:
    """Each target rule with its description, steps and tokens; None if it was not met.

    A rule that needs a held-out text is left out if there was none.
    """
    return [
        (
            f"{name}: {rule.description}",
            metrics.get(f"to_target.{name}.steps"),
            metrics.get(f"to_target.{name}.tokens"),
        )
        for name, rule in RULES.items()
        if not rule.needs_held_out or metrics.get("validation_loss") is not None
    ]
