"""Validate params.yaml, and list all of its errors.

The answer does not depend on the machine: `doctor` says whether this machine can train with it.
"""

import argparse


def run(arguments: argparse.Namespace) -> None:
    from pipeline.config.params import load_params
    from pipeline.ops.params_check import check_params

    check_params(params := load_params())
    print(f"{params.path} is valid; `python -m pipeline doctor` says whether this machine can train with it")
