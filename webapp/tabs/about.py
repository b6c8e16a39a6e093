"""about: the tab that says what the model is: its card, its parts counted, its bytes, and what it is not."""

import math
from html import escape
from typing import Any, NamedTuple

from pipeline.config.sections import ModelConfig
from webapp.model_source import Served

MIB = 2**20


class Part(NamedTuple):
    name: str
    formula: str
    n_params: int


def parts(config: ModelConfig) -> list[Part]:
    """Every parameter of the standard model, once: the head is the token embedding again."""
    C, L, V, T = config.n_embd, config.n_layer, config.vocab_size, config.block_size
    return [
        Part("token embedding, and head", f"V·C = {V:,} · {C}", V * C),
        Part("position embedding", f"T·C = {T:,} · {C}", T * C),
        Part("attention, queries keys values", f"L·(3C² + 3C) = {L} · {3 * C * C + 3 * C:,}", L * (3 * C * C + 3 * C)),
        Part("attention, projection", f"L·(C² + C) = {L} · {C * C + C:,}", L * (C * C + C)),
        Part("MLP, up", f"L·(4C² + 4C) = {L} · {4 * C * C + 4 * C:,}", L * (4 * C * C + 4 * C)),
        Part("MLP, down", f"L·(4C² + C) = {L} · {4 * C * C + C:,}", L * (4 * C * C + C)),
        Part("LayerNorms of the blocks", f"L·4C = {L} · {4 * C:,}", L * 4 * C),
        Part("last LayerNorm", f"2C = 2 · {C}", 2 * C),
    ]


def sizes(config: ModelConfig) -> list[tuple[str, str, float]]:
    """What it takes: (what for, how it is counted, MiB)."""
    n, C, L, T = config.n_params, config.n_embd, config.n_layer, config.block_size
    matrices = L * 12 * C * C
    return [
        ("weights in fp32, as on the disk", "4 bytes a parameter", 4 * n / MIB),
        ("weights in bf16 or fp16", "2 bytes a parameter", 2 * n / MIB),
        ("weights in int8", "1 byte a parameter; scales left out", n / MIB),
        ("keys and values of one text, fp32", f"2·L·T·C · 4 bytes, T = {T}", 8 * L * T * C / MIB),
        ("training in fp32 with AdamW", "weights, gradients, two moments: 16 bytes", 16 * n / MIB),
        ("training with Muon on the blocks", "one moment for their matrices: 12 bytes", (16 * n - 4 * matrices) / MIB),
    ]


def about_html(served: Served) -> str:
    facts = served.facts
    body = _card(served)
    if shape := facts["params"].get("model"):
        config = ModelConfig.model_validate(shape)
        body += f'<div class="charts"><div>{_counted(config)}</div><div>{_sized(config)}</div></div>'
    return f'<div class="about">{body}{_not(served)}</div>'


def _card(served: Served) -> str:
    facts, shape = served.facts, served.facts["params"].get("model", {})
    loss = facts["metrics"].get("corpus_loss")
    layers = f" of {shape['n_layer']} layers, {shape['n_head']} heads, {shape['n_embd']} wide" if shape else ""
    reached = ""
    if loss is not None:
        reached = f" Its loss over the whole of them is {loss:.4f} nats per token: the geometric mean of what it gives "
        reached += f"the true next tokens is {math.exp(-loss):.0%}."
    corpus = facts["params"].get("corpus", {})
    origin = f" (<code>{escape(str(corpus['source']))}</code>)" if "source" in corpus else ""
    share = corpus.get("fraction", 1.0)
    part = "" if share == 1 else f" They are the first {100 * share:.3g}% of it."
    return (
        f'<h2 class="part">{escape(served.label)}</h2><p>A GPT-2{layers}, trained from nothing to know '
        f"{len(served.ids):,} tokens of text{origin} by heart.{part}{reached}</p>"
        "<p>It reads and writes GPT-2’s 50,257 byte-pair tokens and was trained on windows of "
        f"{served.window} tokens; it is never used beyond {served.generator.trained_length}.</p>"
    )


def _counted(config: ModelConfig) -> str:
    rows = "".join(
        f"<tr><th>{part.name}<small>{part.formula}</small></th><td class='number'>{part.n_params:,}</td></tr>"
        for part in parts(config)
    )
    legend = f"L = {config.n_layer} layers, C = {config.n_embd} wide, V = {config.vocab_size:,} tokens, "
    return (
        '<h2 class="part">Its parts</h2><p class="note">' + legend + f"T = {config.block_size:,} positions.</p>"
        f'<table class="facts counted">{rows}<tr class="sum"><th>all</th>'
        f"<td class='number'>{config.n_params:,}</td></tr></table>"
    )


def _sized(config: ModelConfig) -> str:
    rows = "".join(
        f"<tr><th>{what}<small>{how}</small></th><td class='number'>{mib:,.1f} MiB</td></tr>"
        for what, how, mib in sizes(config)
    )
    return (
        '<h2 class="part">Its size</h2><p class="note">Activations, which grow with the batch, are not in it.</p>'
        f'<table class="facts counted">{rows}</table>'
    )


def _not(served: Served) -> str:
    metrics: dict[str, Any] = served.facts["metrics"]
    items = [
        "No author. What reads best is recited as a rule: the tab Write marks what stands in the training text.",
        "No measure of understanding. A loss this low over a text that was seen again and again is memory.",
        "No source of facts, and no assistant: it knows no words but those of its text, and follows no instructions.",
        "Not fair or kind beyond its text: whatever stands there, it can say.",
    ]
    if (shifted := metrics.get("shifted_loss")) is not None:
        items.insert(2, f"No master of its text at any place: moved off the windows that it learnt, its loss is "
                        f"{shifted:.2f} and not {metrics['corpus_loss']:.2f}. The tab Memory shows it.")  # fmt: skip
    return f'<h2 class="part">What it is not</h2><ul>{"".join(f"<li>{item}</li>" for item in items)}</ul>'
