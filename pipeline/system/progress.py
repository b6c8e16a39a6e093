"""Show the progress of long work: a bar on a terminal; elsewhere, such as in a log, a line every few seconds."""

import io
import sys
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 5.0
LINE = "{desc}: {n_fmt} of {total_fmt} {unit} in {elapsed}, {remaining} left"


class Bar(tqdm):  # type: ignore[type-arg]
    """A tqdm bar. If stderr is not a terminal, it prints lines to stdout instead: the first after LINE_EVERY_S."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._in_lines, self._shown_at = not sys.stderr.isatty(), 0.0
        if self._in_lines:
            options |= {"file": io.StringIO(), "bar_format": LINE, "leave": False}
            options |= {"delay": LINE_EVERY_S, "mininterval": LINE_EVERY_S, "miniters": 1}
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self._in_lines:
            super().display(msg, pos)
        elif msg is None:  # "" clears the bar
            now: float = self._time()  # type: ignore[attr-defined]
            if now >= (self._shown_at or self.start_t) + LINE_EVERY_S:
                self._shown_at = now
                print(self, flush=True)
