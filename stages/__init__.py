"""One short script for each DVC stage, run as `python -m stages.NAME` from the project's folder."""

# A stage imports what it needs inside of `main`, so that `run_stage` also handles errors and Ctrl-C during the imports.

import sys

from pipeline import end_quietly

if sys.argv[:1] == ["-m"]:  # `python -m` imports this package first
    end_quietly()
