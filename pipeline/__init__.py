"""The library: text in, a registered GPT-2 out. Modules are listed in reading order in the README."""

import sys
from importlib.util import find_spec

if find_spec("torch") is None:  # most likely all the rest is missing too
    sys.exit(f"error: {sys.executable} has no torch: activate .venv, which `make repro` makes")
