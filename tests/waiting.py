"""waiting: a condition that another process or thread brings about -> what it comes to be, as soon as it holds."""

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def wait_until(condition: Callable[[], Found], deadline_s: float) -> Found:
    """Ask until the answer is true or the time is over; return the last answer. Where there is an event, wait for that.

    `assert wait_until(lambda: path.exists() or process.poll() is not None, 60)` is how a dead process ends the wait.
    """
    end = time.monotonic() + deadline_s
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found
