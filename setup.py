"""Refuse Windows before pip installs anything. The rest is in pyproject.toml."""

import sys

if sys.platform == "win32":
    sys.exit("error: this program runs on Linux and macOS: on Windows, run it in WSL 2")

from setuptools import setup

setup()
