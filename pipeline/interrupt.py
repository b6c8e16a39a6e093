"""interrupt: SIGINT and SIGTERM -> a wish to stop that is looked at between two steps."""

import signal
from types import FrameType, TracebackType

from pipeline.errors import Interrupted


class StopSignals:
    """While it is entered, the first signal is only noted; the second acts as it always does, at once."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def raise_if_received(self, where: str) -> None:
        """Raise Interrupted, whose exit code is the signal's, if one has come."""
        if self.received is not None:
            name = signal.Signals(self.received).name
            raise Interrupted(f"{name} {where}: run the same command again to go on", self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
