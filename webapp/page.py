"""page: a source of models -> the whole page, and the server that shows it."""

from collections.abc import Collection
from functools import partial
from html import escape
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from webapp.api import endpoints
from webapp.html import html
from webapp.http.body import Call
from webapp.http.guard import LOOPBACK, Guard, Known
from webapp.http.readers import Readers
from webapp.model_source import Source
from webapp.style import css, keys, theme
from webapp.tabs.about import about_html
from webapp.tabs.next_token import next_token_tab
from webapp.tabs.recall import first_look, memory_tab, n_windows
from webapp.tabs.training import choices, training_tab
from webapp.tabs.write import write_tab

AT_ONCE = 2  # requests that the model works on together
WAITING = 30  # requests that may wait; the next one is told that the queue is full


def compose(source: Source) -> gr.Blocks:
    """The page with its tabs and the API."""
    with gr.Blocks(title="By heart", analytics_enabled=False, fill_width=True) as page:
        head = html(head_html(source), elem_id="head")
        with gr.Tabs():
            with gr.Tab("Write", id="write-tab"):
                started = write_tab(source)
            with gr.Tab("Next token", id="next-tab"):
                next_token_tab(source)
            with gr.Tab("Memory", id="memory-tab"):
                memory = memory_tab(source)
            with gr.Tab("Training", id="training-tab"):
                versions = training_tab(source)
            with gr.Tab("About", id="about-tab"):
                about = html(about_html(source.current()), elem_id="about")
        refresh: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_id": "look"}
        page.load(partial(_refreshed, source), None, [head, about, memory.window, *versions], **refresh)
        page.load(partial(first_look, source), None, [memory.heat, memory.recital], **refresh)
        started.then(partial(head_html, source), None, head, **refresh)
        endpoints(source)
    return page.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE, api_open=False)  # no way past the queue


def head_html(source: Source) -> str:
    """The title, what is served, and what is wrong with it."""
    served = source.current()
    facts = served.facts
    loss = facts["metrics"].get("corpus_loss")
    aliases = "".join(f", {alias}" for alias in facts["aliases"])
    knows = f"know {len(served.ids):,} tokens of text by heart"
    reached = "" if loss is None else f"; it came to a loss of {loss:.3f} over all of them"
    trouble = f'<p class="trouble" role="status">{escape(source.trouble)}</p>' if source.trouble else ""
    return (
        f'<div class="masthead"><h1>By heart</h1><p>A GPT-2 that was trained to {knows}{reached}. This page shows '
        f"what it writes, and how much of that is memory. <b>{escape(served.label + aliases)}</b></p>{trouble}</div>"
    )


def _refreshed(source: Source) -> tuple[Any, ...]:
    """What a page that is opened, or opened again, has to know of the present version."""
    served = source.current()
    window = gr.update(maximum=n_windows(served))
    return head_html(source), about_html(served), window, *choices(source)


def serve(source: Source, host: str, port: int, names: Collection[str] = (), wait: bool = True) -> gr.Blocks:
    """Serve the page on `host` alone: no share, no upload, no file, no proxy, nobody told.

    `names`: what else it may be asked for by than `host` and this machine; ANY of webapp.http.guard: by any name.
    """
    page, bare = compose(source), host.strip("[]").lower()
    known = Known({*LOOPBACK, bare, *names}, bare not in LOOPBACK, calls(page), Readers(page._queue))
    page.launch(
        server_name=host, server_port=port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=not wait,
        theme=theme(), css=css(), js=keys(), footer_links=["api"], run_history=False, ssr_mode=False, pwa=False,
        max_file_size=1, enable_monitoring=False, strict_cors=True, mcp_server=False, num_workers=0, root_path="",
        app_kwargs={"middleware": [Middleware(Guard, known=known)], "docs_url": None, "redoc_url": None},
        state_session_capacity=50,  # each takes some 50 KB, for values that nothing here reads
    )  # fmt: skip
    return page


def calls(page: gr.Blocks) -> dict[int, Call]:
    """What each event takes that Python answers, by its number."""
    found = {}
    documented = page.get_api_info()["named_endpoints"]
    for number, event in page.fns.items():
        if event.fn is None:
            continue
        api = documented.get(f"/{event.api_name}", {}).get("parameters")
        names = [one["parameter_name"] for one in api] if api else [f"value {n + 1}" for n in range(len(event.inputs))]
        needed = [one["parameter_name"] for one in api or [] if not one["parameter_has_default"]]
        found[number] = Call(event.api_name, names, needed)
    return found
