"""The tab Training: a version's curves, samples and origin, and a comparison of two versions."""

from collections.abc import Iterator
from functools import partial
from html import escape
from typing import Any

import gradio as gr
import yaml

from pipeline.system.errors import PipelineError
from webapp.chart import line_chart
from webapp.completion import complete
from webapp.events import event_options
from webapp.fields import MAX_PROMPT, chosen_seed
from webapp.html import alias_words, fault_html, fault_slot, faults, heading, html, note, table
from webapp.model_source import Served
from webapp.page_version import PageVersion, version_choices
from webapp.tabs.write import (
    OPEN_PLACE,
    PROMPT_CHANGED,
    connect_places,
    place_slot,
    sample_html,
    seed_fields,
)

COMPARED_TOKENS = 120
METRICS = {  # metric -> its name and its format
    "sliding_loss": ("loss from anywhere in the training text, nats per token", ".4g"),
    "sliding_bits_per_byte": ("the same in bits per byte", ".4g"),
    "corpus_loss": ("the same in fixed windows, nats per token", ".4g"),
    "shifted_loss": ("the same in shifted windows", ".4g"),
    "top1_accuracy": ("tokens that the model ranks first", ".1%"),
    "verbatim_recall_anywhere": ("passages recited exactly, from anywhere", ".1%"),
    "verbatim_recall": ("the same from the start of a fixed window", ".1%"),
    "verbatim_recall_shifted": ("the same after as many tokens from any position", ".1%"),
    "validation_loss": ("loss over held-out text, nats per token", ".4g"),
    "validation_bits_per_byte": ("the same in bits per byte", ".4g"),
}
EVALUATED = ("sliding_loss", "corpus_loss")  # losses over the whole text; the first that a version has is shown
ORIGINS = {  # tag or entry of the environment -> its name
    "verdict": "decision when it was registered",
    "data_sha256": "SHA-256 of the training text",
    "model_sha256": "SHA-256 of the model",
    "fingerprint": "fingerprint of parameters and sources",
    "git_commit": "git commit",
    "tree_clean": "changes that were not committed",
    "run_id": "MLflow run",
    "torch": "PyTorch",
    "compiled": "torch.compile",
}
ORIGIN_WORDS = {("tree_clean", "true"): "none", ("tree_clean", "false"): "some, so the commit alone does not repeat it"}
ORIGIN_WORDS |= {("compiled", "True"): "used", ("compiled", "False"): "not used"}
COMPARED = ("prompt", "seed")  # fields


def training_tab(page: gr.Blocks, version: PageVersion) -> None:
    served = version.source.current()
    chosen = gr.Dropdown(label="Version", elem_id="version", filterable=False)
    run = html(run_html(served), elem_id="run")
    html(heading("Side by side"))
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            prompt = gr.Textbox("".join(served.examples[:1]), label="Prompt for both", lines=2, max_length=MAX_PROMPT,
                                elem_id="compared-prompt")  # fmt: skip
            slots = [fault_slot()]
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                left = gr.Dropdown(label="Version", filterable=False, min_width=110)
                right = gr.Dropdown(label="and version", filterable=False, min_width=110)
            seed, keep = seed_fields()
            slots.append(fault_slot())
    compare = gr.Button("Compare", variant="primary", elem_classes="go", elem_id="compare")
    output, place = html("", js_on_load=OPEN_PLACE, elem_id="compared"), place_slot("compared")
    chosen.change(partial(_run, version), chosen, run, **event_options("model", run))
    shown, given = [output, place, seed, *slots], [prompt, left, right, seed, keep]
    compare.click(partial(_compare, version), given, shown, **event_options("model", output))
    prompt.change(None, None, None, js=PROMPT_CHANGED, api_visibility="private")
    connect_places(version, output, place)
    version.renders(partial(_version, version), chosen, left, right, run)


def _version(version: PageVersion, served: Served) -> tuple[Any, ...]:
    """The three lists and the run. The lists select the served version, the served version, and the newest other."""
    versions, current = version_choices(version.source, served), str(served.info["version"])
    other = next((number for number in versions if number != current), current)
    lists = (gr.update(choices=versions, value=number) for number in (current, current, other))
    return *lists, run_html(served)


def _run(version: PageVersion, number: Any) -> str:
    try:
        return run_html(version.served(number))
    except PipelineError as error:
        return fault_html(error)


def _compare(
    version: PageVersion, prompt: Any, left: Any, right: Any, seed: Any, keep: Any
) -> Iterator[tuple[Any, ...]]:
    """Both versions' completions with the same seed, one after the other; the seed, and the faults of COMPARED."""
    done, begin = "", f'<div class="samples two" data-of="compared-prompt" data-prompt="{escape(str(prompt))}">'
    rest: tuple[Any, ...] = ()
    try:
        seed = chosen_seed(keep, seed)
        for number in (left, right):
            served = version.served(number)
            for completion in complete(served, prompt, 1, max_tokens=COMPARED_TOKENS, temperature=0.8, seed=seed):
                now = done + sample_html(completion, 0, served.label)
                rest = (gr.skip(),) * (1 + len(COMPARED)) if rest else (seed, *faults(COMPARED))
                yield f"{begin}{now}</div>", "", *rest
            done = now
    except PipelineError as error:
        yield gr.skip(), "", gr.skip(), *faults(COMPARED, error)


def run_html(served: Served) -> str:
    """Metrics, curves, samples, origin and parameters of the run."""
    return "".join(part(served.info) for part in (_metrics, _charts, _samples, _origin, _params))


def _metrics(info: dict[str, Any]) -> str:
    tags, metrics = info["tags"], info["metrics"]
    rows = [(name, f"{metrics[key]:{form}}") for key, (name, form) in METRICS.items() if metrics.get(key) is not None]
    if rule := info.get("rule"):
        rows.insert(0, (f"target rule: {escape(rule['description'])}", escape(rule["name"])))
    if "steps_to_target" in tags:
        rows.append((f"steps to the target {escape(str(tags['target_loss']))}", f"{int(tags['steps_to_target']):,}"))
        rows.append(("tokens to the target", f"{int(tags['tokens_to_target']):,}"))
    return (
        heading(f"{info['name']} version {info['version']}")
        + note(f"Registered on {info['created']}. {alias_words(info['aliases'])}".strip())
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
    values = {key: info["tags"][key] for key in ORIGINS if key in info["tags"]} | info["environment"]
    rows = [
        (escape(ORIGINS.get(key, key)), escape(ORIGIN_WORDS.get((key, str(value)), str(value))))
        for key, value in values.items()
    ]
    return heading("Origin") + table(rows, "origin")


def _params(info: dict[str, Any]) -> str:
    """params.yaml, collapsed."""
    params = info["params"]
    return f'<details class="more"><summary>All parameters</summary>{_yaml(params)}</details>' if params else ""


def _yaml(values: dict[str, Any]) -> str:
    return f"<pre>{escape(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))}</pre>"
