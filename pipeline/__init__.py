"""The library that trains a GPT-2 on a text and registers it. README.md describes its packages."""

import signal
import sys


def end_quietly() -> None:
    """Let Ctrl-C end the program without a traceback, until `exit_code_of` runs it and reports Ctrl-C in one line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if sys.argv[:1] == ["-m"] or "".join(sys.argv[:1]).endswith("totarget"):  # a program starts, `python -m` or totarget
    end_quietly()
