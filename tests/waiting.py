"""Wait for conditions that another process or thread fulfils; ports for servers of other processes."""

import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

import psutil

Found = TypeVar("Found")


def wait_until(condition: Callable[[], Found], deadline_s: float) -> Found:
    """Ask until the answer is true or the time is over; return the last answer. If there is an event, wait for that.

    `assert wait_until(lambda: path.exists() or process.poll() is not None, 60)` is how a dead process ends the wait.
    """
    end = time.monotonic() + deadline_s
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def free_ports(n: int) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listens now."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]
