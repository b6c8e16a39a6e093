"""Show the MLflow run of the current model."""

import argparse
from pathlib import Path


def run(arguments: argparse.Namespace) -> None:
    from pipeline.system.host import project_root
    from pipeline.tracking.mlflow_runs import describe_run
    from pipeline.tracking.run_record import read_run

    for name, value in describe_run(project_root(), read_run(Path("models"))["fingerprint"]).items():
        print(f"{name:12} {value}")
