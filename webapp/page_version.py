"""The version that an open page shows: it changes in all tabs by one event."""

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from pipeline.system.errors import PipelineError
from webapp.events import event_options
from webapp.html import html, note
from webapp.model_source import Served, Source

CHECK_S = 5.0  # between two questions of an open page whether its version is still served
Render = Callable[[Served], tuple[Any, ...]]


class PageVersion:
    """The number of the version that an open page shows, as a hidden field of it, and what depends on it.

    Each event of a tab takes `number` as its last input and answers with `served(number)`, so that no tab is ahead of
    the others. `number` is "" until the page has loaded; its change is an event that tabs may listen to.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.number = html("", visible="hidden", elem_id="page-version")
        self.change, self.trouble = html("", elem_id="version-change"), html("", elem_id="trouble")  # notices
        self._parts: list[tuple[Render, list[gr.components.Component]]] = []

    def served(self, number: Any) -> Served:
        """The version `number` of an open page. Raises a PipelineError if it cannot be loaded."""
        return self.source.open(str(number)) if number else self.source.current()

    def renders(self, render: Render, *outputs: gr.components.Component) -> None:
        """Set `outputs` to the values of `render` when the page loads and when its version changes."""
        self._parts.append((render, list(outputs)))

    def follow(self, page: gr.Blocks) -> None:
        """Set all parts at once when the page loads, and when another version is served."""
        outputs = [self.number, self.change, self.trouble, *(output for _, part in self._parts for output in part)]
        page.load(partial(self.update, ""), None, outputs, **event_options("read"))
        gr.Timer(CHECK_S).tick(self.update, self.number, outputs, **event_options("read"))

    def update(self, number: Any) -> tuple[Any, ...]:
        """Values of `number`, `change`, `trouble` and all parts; only of `trouble` if `number` is served still."""
        served, trouble = self.source.current(), trouble_html(self.source)
        now = str(served.info["version"])
        if now == number:
            return gr.skip(), gr.skip(), trouble, *(gr.skip() for _, part in self._parts for _ in part)
        notice = ""
        if number:
            notice = note(f"Version {now} has replaced version {str(number)[:20]} while this page was open: all tabs "
                          f"show version {now} now. A text that names another version was written by that one.",
                          "notice")  # fmt: skip
        return now, notice, trouble, *(value for render, _ in self._parts for value in render(served))


def trouble_html(source: Source) -> str:
    """The reason why another version could not be loaded, if that failed."""
    return note(source.trouble, "trouble") if source.trouble else ""


def version_choices(source: Source, served: Served) -> list[str]:
    """All version numbers, newest first; only the served one if the registry does not answer."""
    try:
        return source.versions()
    except PipelineError:
        return [str(served.info["version"])]
