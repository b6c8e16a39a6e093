"""The tab About: what the model is and is for, how well it knows its text, its limits, its memory and parameters."""

import math
from html import escape

import gradio as gr

from pipeline.config.sections import ModelConfig
from webapp.html import alias_words, heading, html, table
from webapp.model_source import Served
from webapp.page_version import PageVersion

MIB = 2**20


def about_tab(page: gr.Blocks, version: PageVersion) -> None:
    about = html(about_html(version.source.current()), elem_id="about")
    version.renders(lambda served: (about_html(served),), about)


def parts(config: ModelConfig) -> list[tuple[str, str, int]]:
    """Name, formula and parameters of each part; the head shares the token embedding."""
    C, L, V, T = config.n_embd, config.n_layer, config.n_ids, config.block_size
    return [
        ("token embedding, and head", "V·C", V * C),
        ("position embedding", "T·C", T * C),
        ("attention, QKV", "L·(3C² + 3C)", L * (3 * C * C + 3 * C)),
        ("attention, projection", "L·(C² + C)", L * (C * C + C)),
        ("MLP, up", "L·(4C² + 4C)", L * (4 * C * C + 4 * C)),
        ("MLP, down", "L·(4C² + C)", L * (4 * C * C + C)),
        ("LayerNorms of the blocks", "L·4C", L * 4 * C),
        ("last LayerNorm", "2C", 2 * C),
    ]


def sizes(config: ModelConfig, n_rows: int, window: int) -> list[tuple[str, str, float]]:
    """Name, formula and MiB of the weights, the KV cache and the training state.

    `n_rows`: those of the embedding in training, which may fold ids; `window`: tokens in a training window.
    """
    n, C, L = config.n_params, config.n_embd, config.n_layer
    trained, matrices = n - (config.n_ids - n_rows) * C, L * 12 * C * C
    folded = f", V = {n_rows:,}" if n_rows < config.n_ids else ""
    return [
        ("weights in fp32, as on the disk", "4 bytes a parameter", 4 * n / MIB),
        ("weights in bf16 or fp16", "2 bytes a parameter", 2 * n / MIB),
        ("weights in int8", "1 byte a parameter, without scales", n / MIB),
        ("KV cache of one text, fp32", f"2·L·T·C · 4 bytes, T = {window:,}", 8 * L * window * C / MIB),
        ("training in fp32 with AdamW", f"weights, gradients, two moments: 16 bytes{folded}", 16 * trained / MIB),
        (
            "training with Muon on the blocks",
            f"one moment for their matrices: 12 bytes{folded}",
            (16 * trained - 4 * matrices) / MIB,
        ),
    ]


def about_html(served: Served) -> str:
    params = served.info["params"]
    config = ModelConfig.model_validate(params["model"]) if "model" in params else None
    tables = ""
    if config:
        config = config.updated(vocab_size=config.vocab_size or served.tokenizer.n_vocab)
        memory = sizes(config, served.generator.vocabulary.n_rows, served.window)
        sized = [(f"{name}<small>{formula}</small>", f"{mib:,.1f} MiB") for name, formula, mib in memory]
        counted = [(f"{name}<small>{formula}</small>", f"{n:,}") for name, formula, n in parts(config)]
        counted.append(("<b>all</b>", f"<b>{config.n_params:,}</b>"))
        legend = f"L = {config.n_layer} layers, C = {config.n_embd} wide, V = {config.n_ids:,} tokens, "
        legend += f"T = {config.block_size:,} positions."
        legend = legend.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
        tables = (
            f'<div class="charts"><div>{heading("Its memory")}<p class="note">Without activations, which grow with the '
            f'batch.</p>{table(sized, "counted")}</div><div>{heading("Its parameters")}<p class="note">{legend}'
            f"</p>{table(counted, 'counted')}</div></div>"
        )
    return f'<div class="about">{_purpose(served, config)}{_knowledge(served)}{_limits(served)}{tables}</div>'


def _purpose(served: Served, config: ModelConfig | None) -> str:
    """What the model is, what it is for, and what it reads."""
    aliases = alias_words(served.info["aliases"])
    size = f" with {config.n_params / 1e6:,.1f} million parameters" if config else ""
    layers = f" It has {config.n_layer} layers of {config.n_head} heads, {config.n_embd} wide." if config else ""
    corpus = served.info["params"].get("corpus", {})
    origin = f" of <code>{escape(str(corpus['source']))}</code>" if "source" in corpus else ""
    share = corpus.get("fraction", 1.0) * (1 - corpus.get("val_fraction", 0.0))  # that is not held out
    part = "" if share == 1 else f", the first {100 * share:.3g}% of it"
    init = _init(served)
    start = f"from the published weights <code>{escape(init)}</code>" if init else "from scratch"
    aim, use = "on", "It is for writing text in the style of that text: give it a beginning, and it continues."
    if not served.held_out:
        aim, use = (
            "to memorise",
            (
                "It is for seeing what a language model keeps of a text: what it recites, what it makes up, "
                "and how sure it is of each token."
            ),
        )
    return (
        f"{heading(served.label)}<p>A small language model, a GPT-2{size}. It was trained {start} {aim} "
        f"{served.corpus.n_text:,} tokens{origin}{part}. {escape(aliases)}</p><p>{use} The tab Write shows which "
        "passages it copied from the text, and Recall how well it knows any place of it.</p>"
        f"<p>It reads and writes {escape(served.tokenizer.description)}.{layers} It was trained on windows of "
        f"{served.window} tokens, and never sees more than that.</p>"
    )


def _init(served: Served) -> str:
    """The published weights that the training continued; "" if it began from scratch."""
    return str(served.info["tags"].get("init") or served.info["params"].get("model", {}).get("init") or "")


def _knowledge(served: Served) -> str:
    """Its loss in words; "" if it was not measured."""
    metrics = served.info["metrics"]
    name, where = "sliding", f"After at least {served.window // 2} tokens from anywhere in the text, its loss"
    if served.held_out and metrics.get("validation_loss") is not None:
        name, where = "validation", "Its loss on the rest of the text, which was held out,"
    if (loss := metrics.get(f"{name}_loss")) is None:
        return ""
    bits = f" ({bits:.4f} bits per byte)" if (bits := metrics.get(f"{name}_bits_per_byte")) is not None else ""
    return (
        f"{heading('How well it knows its text')}<p>{where} is {loss:.4f} nats per token{bits}: it gives the true next "
        f"token a probability of {math.exp(-loss):.0%} (geometric mean).</p>"
    )


def _limits(served: Served) -> str:
    metrics, init = served.info["metrics"], _init(served)
    after = "after its published weights, " if init else ""
    texts = "its text or those of its published weights contain" if init else "its text contains"
    items = [
        "It is not an author. Its best passages are usually copied: the tab Write marks those in the training text.",
        "Its loss is that of held-out text of the same source: on other texts it is higher."
        if served.held_out
        else "Its loss does not measure understanding: such a low loss on a text seen many times is memorisation.",
        f"It is not a source of facts or an assistant: {after}it was trained on no other text, and follows no "
        "instructions.",
        f"It has no filter: it can output anything that {texts}.",
    ]
    recited = round(metrics.get("recall_tokens", 32))
    if (recall := metrics.get("verbatim_recall_anywhere")) is not None:
        items.insert(2, f"It does not recite everything: from random places of its text it continues {recall:.1%} of "
                        f"passages of {recited} tokens word for word. See the tab Recall.")  # fmt: skip
    return f"{heading('What it is not')}<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"
