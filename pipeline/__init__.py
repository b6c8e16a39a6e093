"""The library that trains a GPT-2 on a text and registers it. docs/concepts/structure.md describes its packages."""

import os
import signal
import sys

__version__ = "1.0.0"  # docs/reference/stability.md says what it promises

# How long a thread of torch that waits for the others keeps its core busy; libgomp reads it when torch is imported. Its
# default, milliseconds, makes a training step much slower beside other busy programs (benchmarks/LOG.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def end_quietly() -> None:
    """Let Ctrl-C end the program without a traceback, until `exit_code_of` runs it and reports Ctrl-C in one line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if sys.argv[:1] == ["-m"] or "".join(sys.argv[:1]).endswith("totarget"):  # a program starts, `python -m` or totarget
    end_quietly()
