"""finding: what one look of the doctor found -> a line, and what mends it."""

from collections.abc import Callable
from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """`ok`: all is well. `note`: nothing to mend, but worth knowing. `mend`: a fault."""

    mark: Literal["ok", "note", "mend"]
    topic: str
    what: str  # is well or wrong, and where
    hint: str | None = None  # what the user may do
    fix: Callable[[], str] | None = None  # does it instead, and says in a line what it did

    def __str__(self) -> str:
        return line(self.mark, self.topic, self.what if self.hint is None else f"{self.what}: {self.hint}")


def line(mark: str, topic: str, text: str) -> str:
    """One line of the report, its columns aligned."""
    return f"{mark:<5}  {topic:<11}  {' '.join(text.split())}"
