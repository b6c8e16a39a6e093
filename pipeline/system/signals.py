"""Stop after the current step, or at once, on SIGINT, SIGTERM and SIGHUP; end together with the parent process."""

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

from pipeline.system.errors import Interrupted


class StopSignals:
    """Inside the block, the first signal is only recorded; a second one acts immediately, as it does outside.

    Signals within one second count as one: a dying parent sends its death signal once for each of its threads. SIGHUP,
    sent when a terminal is closed, remains ignored under `nohup`.
    """

    SAME_S = 1.0

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._receive) for number in self._caught()}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def raise_if_received(self, where: str) -> None:
        """Raise Interrupted if a signal was received; the exit code is that of the signal."""
        if self.received is not None:
            raise interrupted(self.received, where)

    def _caught(self) -> set[signal.Signals]:
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        return {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} - ignored

    def _receive(self, number: int, frame: FrameType | None) -> None:
        mute_closed_terminal()
        if self.received is None:
            self.received, self._received_at = number, time.monotonic()
        elif time.monotonic() - self._received_at > self.SAME_S:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Signalled(KeyboardInterrupt):
    """SIGTERM or SIGHUP has ended the program outside of StopSignals."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class SignalsAsErrors(StopSignals):
    """Inside the block, the first SIGTERM or SIGHUP raises Signalled, as Ctrl-C raises KeyboardInterrupt.

    Otherwise the process would end without leaving its `with` blocks, which remove temporary files. A signal that is
    ignored, or has another handler, keeps it. Only the main thread of a program can catch signals.
    """

    def _caught(self) -> set[signal.Signals]:
        if threading.current_thread() is not threading.main_thread():
            return set()
        return {number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_first = self.received is None
        super()._receive(number, frame)
        if is_first:
            raise Signalled(number)


def mute_closed_terminal() -> None:
    """Discard further output to a closed terminal: writing to it would end the process."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def interrupted(number: int, where: str) -> Interrupted:
    hint = "run the same command again to resume"
    if "SUBMITIT_FOLDER" in os.environ:  # a job of pipeline.cluster
        hint = "Slurm runs it again to resume, unless the job was cancelled"
    return Interrupted(f"{signal.Signals(number).name} {where}: {hint}", number)


def die_with_dvc() -> None:
    """End this process together with `dvc repro` or torchrun, if one of them started it."""
    if {"DVC_STAGE", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        die_with_parent()


def die_with_parent() -> None:
    """Let the kernel send SIGTERM to this process when its parent dies; only on Linux."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGTERM)
