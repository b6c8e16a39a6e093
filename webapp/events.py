"""Options of the page's events: their queue, and what shows their progress."""

from typing import Any

import gradio as gr

CONCURRENT = {"model": 16, "read": 2}  # requests of a queue at the same time; those to the model share a batch


def event_options(queue: str, shown_on: gr.HTML | None = None, **options: Any) -> dict[str, Any]:
    """Options of an event of the page. `queue`: "model" for generation, "read" for fast requests.

    `shown_on`: the result on which a request in the queue shows its place.
    """
    private: dict[str, Any] = {"preprocess": False, "show_progress": "hidden", "api_visibility": "private"}
    if shown_on:
        private |= {"show_progress": "minimal", "show_progress_on": shown_on}
    return private | {"concurrency_id": queue, "concurrency_limit": CONCURRENT[queue]} | options
