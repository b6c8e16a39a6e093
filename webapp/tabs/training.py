"""The tab Training: a version's curves, samples and origin, and a comparison of two versions."""

from collections.abc import Iterator
from functools import partial
from html import escape
from typing import Any

import gradio as gr
import yaml

from webapp.chart import line_chart
from webapp.completion import MAX_PROMPT, complete
from webapp.html import event_options, heading, html, note, table, user_errors
from webapp.model_source import Served, Source
from webapp.tabs.write import OPEN_PLACE, connect_places, sample_html

COMPARED_TOKENS = 120
METRICS = {  # metric -> its name and its format
    "sliding_loss": ("loss from anywhere in the training text, nats per token", ".4g"),
    "sliding_bits_per_byte": ("the same in bits per byte", ".4g"),
    "corpus_loss": ("the same in fixed windows, nats per token", ".4g"),
    "shifted_loss": ("the same in shifted windows", ".4g"),
    "top1_accuracy": ("tokens that the model ranks first", ".1%"),
    "verbatim_recall_anywhere": ("passages of 32 tokens recited exactly, from anywhere", ".1%"),
    "verbatim_recall": ("the same from the start of a fixed window", ".1%"),
    "verbatim_recall_shifted": ("the same after 32 tokens from any position", ".1%"),
    "validation_loss": ("loss over held-out text, nats per token", ".4g"),
    "validation_bits_per_byte": ("the same in bits per byte", ".4g"),
}
EVALUATED = ("sliding_loss", "corpus_loss")  # losses over the whole text; the first that a version has is shown
ORIGINS = ("data_sha256", "model_sha256", "git_commit", "tree_clean", "fingerprint", "run_id", "verdict")


def training_tab(page: gr.Blocks, source: Source) -> None:
    version = gr.Dropdown(label="Version", elem_id="version", filterable=False)
    run = html(run_html(source.current()), elem_id="run")
    html(heading("Side by side"))
    with gr.Row(equal_height=False):
        prompt = gr.Textbox("".join(source.current().examples[:1]), label="Prompt for both", lines=2,
                            max_length=MAX_PROMPT, scale=3)  # fmt: skip
        left = gr.Dropdown(label="Version", filterable=False, min_width=110)
        right = gr.Dropdown(label="and version", filterable=False, min_width=110)
        seed = gr.Number(1, label="Seed", precision=0, minimum=0, min_width=110)
    compare = gr.Button("Compare", variant="primary", elem_classes="go", elem_id="compare")
    output = html("", js_on_load=OPEN_PLACE, elem_id="compared")
    place = html("", elem_id="compared-place")
    version.change(partial(_run, source), version, run, **event_options("model", run))
    shown = [output, place]
    compare.click(partial(_compare, source), [prompt, left, right, seed], shown, **event_options("model", output))
    connect_places(source, output, place)
    page.load(partial(_choices, source), None, [version, left, right], **event_options("read"))


def _choices(source: Source) -> tuple[dict[str, Any], ...]:
    """Updates of the three lists. They select the served version, the served version, and the newest other one."""
    versions, current = source.versions(), str(source.current().info["version"])
    other = next((number for number in versions if number != current), current)
    return tuple(gr.update(choices=versions, value=number) for number in (current, current, other))


def _run(source: Source, number: Any) -> str:
    with user_errors():
        return run_html(source.open(str(number)))


def _compare(source: Source, prompt: Any, left: Any, right: Any, seed: Any) -> Iterator[tuple[str, str]]:
    """Both versions' completions with the same seed, one after the other."""
    done = ""
    with user_errors():
        for number in (left, right):
            served = source.open(str(number))
            for completion in complete(served, prompt, 1, max_tokens=COMPARED_TOKENS, temperature=0.8, seed=seed):
                now = done + sample_html(completion, 0, served.label)
                yield f'<div class="samples two">{now}</div>', ""
            done = now


def run_html(served: Served) -> str:
    """Metrics, curves, samples, origin and parameters of the run."""
    return "".join(part(served.info) for part in (_metrics, _charts, _samples, _origin, _params))


def _metrics(info: dict[str, Any]) -> str:
    tags, metrics = info["tags"], info["metrics"]
    rows = [(name, f"{metrics[key]:{form}}") for key, (name, form) in METRICS.items() if metrics.get(key) is not None]
    if rule := info.get("rule"):
        rows.insert(0, (f"target rule: {escape(rule['description'])}", escape(rule["name"])))
    if "steps_to_target" in tags:
        cost = f"{int(tags['steps_to_target']):,} steps, {int(tags['tokens_to_target']):,} tokens"
        rows.append((f"cost of the target {escape(str(tags['target_loss']))}", cost))
    title = ", ".join([f"{info['name']} version {info['version']}", *info["aliases"]])
    return (
        heading(title)
        + note(f"Registered {info['created']}.")
        + (table(rows) if rows else note("No metrics were recorded."))
    )


def _charts(info: dict[str, Any]) -> str:
    history, target = info["history"], info["tags"].get("target_loss")
    goal = float(target) if target else None
    rule = info.get("rule") or {}
    evaluated: list[list[float]] = next(filter(None, map(history.get, (rule.get("loss", ""), *EVALUATED))), [])
    text = "held-out" if rule.get("held_out") else "whole"
    unit = f"nats per token; thick: over the {text} text" if evaluated else "nats per token"
    charts = (
        line_chart("Loss", unit, history.get("loss", []), evaluated, log=True, goal=goal),
        line_chart("Gradient norm", "before clipping", history.get("grad_norm", []), log=True),
        line_chart("Throughput", "tokens/s", history.get("tokens_per_s", [])),
        line_chart("Learning rate", "", history.get("lr", [])),
    )
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else note("No curves were recorded.")


def _samples(info: dict[str, Any]) -> str:
    """The samples of the training, the last one open."""
    samples = info["samples"]
    items = "".join(
        f'<details class="more"{" open" if sample is samples[-1] else ""}><summary>after step {int(sample["step"]):,}'
        f'</summary><p class="verse">{escape(str(sample["text"]))}</p></details>'
        for sample in samples
    )
    return heading("Samples during training") + items if items else ""


def _origin(info: dict[str, Any]) -> str:
    origin = {key: info["tags"][key] for key in ORIGINS if key in info["tags"]}
    return heading("Origin") + _yaml(origin | info["environment"])


def _params(info: dict[str, Any]) -> str:
    """params.yaml, collapsed."""
    params = info["params"]
    return f'<details class="more"><summary>All parameters</summary>{_yaml(params)}</details>' if params else ""


def _yaml(values: dict[str, Any]) -> str:
    return f"<pre>{escape(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))}</pre>"
