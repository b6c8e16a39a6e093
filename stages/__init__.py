"""One short script for each DVC stage, run as `python -m stages.NAME` from the project's folder."""

# A stage imports what it needs inside of `main`, so that `run_stage` also handles errors and Ctrl-C during the imports.

import pipeline  # noqa: F401 (before the stage's own imports: Ctrl-C then leaves no traceback)
