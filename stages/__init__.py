"""One thin script for each DVC stage, run as `python -m stages.NAME` from the project's folder."""

import os
import signal
import sys

if os.path.basename(sys.path[0]) == "stages" and os.getcwd() == sys.path[0]:  # tokenize.py would hide Python's own
    sys.exit("error: this is the folder stages/: run `python -m stages.NAME` from the project's folder, above it")

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a word; run_stage has words
