"""One thin script for each DVC stage, run as `python -m stages.NAME`."""
