"""Compose the page from its tabs, and mount it on the app."""

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

import gradio as gr
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from gradio.blocks import BlockFunction
from gradio.route_utils import FnIndexInferError
from starlette.middleware import Middleware

from pipeline.system.words import counted
from webapp.api import add_endpoints
from webapp.html import html
from webapp.model_source import Served, Source
from webapp.page_version import PageVersion
from webapp.request_filter import GradioFilter, bad_call
from webapp.tabs.about import about_tab
from webapp.tabs.next_token import next_token_tab
from webapp.tabs.recall import recall_tab
from webapp.tabs.training import training_tab
from webapp.tabs.write import write_tab

Tab: TypeAlias = Callable[[gr.Blocks, PageVersion], None]  # adds its components and their events
TABS: dict[str, Tab] = {
    "Write": write_tab,
    "Next token": next_token_tab,
    "Recall": recall_tab,
    "Training": training_tab,
    "About": about_tab,
}
STYLE, KEYS = (Path(__file__).with_name(name) for name in ("page.css", "page.js"))
BAD_CALLS = (FnIndexInferError, RequestValidationError, LookupError, TypeError)  # Gradio raises them for invalid calls
WAITING = 30  # requests that may wait; further ones are refused


class Page(gr.Blocks):  # type: ignore[misc]  # gradio is untyped here
    """The page. It answers a call with too few values in one line; Gradio logs a traceback."""

    def validate_inputs(self, block_fn: BlockFunction, inputs: list[Any]) -> None:
        if (n := len(inputs)) < (wanted := len(block_fn.inputs)):
            words = f"data has {counted(n, 'value')}, the endpoint takes {wanted}: see /gradio_api/openapi.json"
            raise gr.Error(words, print_exception=False)


def compose(source: Source, tabs: Mapping[str, Tab] = TABS) -> gr.Blocks:
    """The page with its tabs and the API."""
    with Page(title=source.current().info["name"], analytics_enabled=False, fill_width=True) as page:
        head = html(head_html(source.current()), elem_id="head")
        version = PageVersion(source)
        version.renders(lambda served: (head_html(served),), head)
        with gr.Tabs():
            for title, tab in tabs.items():
                with gr.Tab(title):
                    tab(page, version)
        version.follow(page)
        add_endpoints(source)
    return page.queue(max_size=WAITING, api_open=False)  # API calls queue too


def head_html(served: Served) -> str:
    """The title, what the model is, and the served version."""
    metrics = served.info["metrics"]
    recall, recited = metrics.get("verbatim_recall_anywhere"), round(metrics.get("recall_tokens", 32))
    known = (
        ""
        if recall is None
        else f" From any place in it, it recites {recall:.0%} of passages of {recited} tokens word for word."
    )
    role = ", the champion" if "champion" in served.info["aliases"] else ""
    aim = "trained on" if served.held_out else "trained to memorise"
    name, number = escape(served.info["name"]), escape(str(served.info["version"]))
    return (
        f'<div class="masthead"><h1>{name}</h1><p>A GPT-2 that was {aim} {served.corpus.n_text:,} tokens of '
        f"text.{known} This page shows what it writes, and how much of that is copied. <b>Shown: version "
        f"{number}{role}.</b></p></div>"
    )


def mounted(app: FastAPI, page: gr.Blocks) -> None:
    """Mount the page on `app`, without share link, uploads, files, proxy or analytics."""
    system, mono = ("ui-sans-serif", "system-ui", "sans-serif"), ("ui-monospace", "monospace")  # no web fonts
    theme = gr.themes.Base(primary_hue="orange", neutral_hue="stone", radius_size="sm", font=system, font_mono=mono)
    theme.set(body_background_fill="#fbfaf8", body_background_fill_dark="#161412")
    options = {
        "middleware": [Middleware(GradioFilter)],
        "exception_handlers": dict.fromkeys(BAD_CALLS, bad_call),
        "docs_url": None,
        "redoc_url": None,
        "openapi_url": None,
    }
    page.state_session_capacity = 50  # each takes 50 KB, and no event uses them
    gr.mount_gradio_app(
        app, page, "/", theme=theme, css_paths=STYLE, js=KEYS.read_text(encoding="utf-8"), footer_links=["api"],
        run_history=False, ssr_mode=False, pwa=False, max_file_size=1, enable_monitoring=False, mcp_server=False,
        root_path="", app_kwargs=options, show_error=False,
    )  # fmt: skip
