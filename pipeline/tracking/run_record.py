"""Read models/run.json and reports/metrics.json, and check that they belong together."""

from pathlib import Path
from typing import Any

from pipeline.system.errors import IntegrityError
from pipeline.system.files import read_json

RUN_KEYS = {"fingerprint", "data_sha256", "params", "environment", "n_params", "results"}


def read_run(models: Path) -> dict[str, Any]:
    """The record of the run behind `models`/model. Raises InputError where it is missing, IntegrityError if unfit."""
    run = read_json(path := models / "run.json")
    if not isinstance(run, dict) or not run.keys() >= RUN_KEYS:
        raise IntegrityError(f"{path} is not the record of a run: `dvc repro` restores it")
    return run


def read_metrics(reports: Path, run: dict[str, Any]) -> dict[str, Any]:
    """What the stage `evaluate` measured of the model of `run`. Raises IntegrityError where it is about another one."""
    metrics = read_json(path := reports / "metrics.json")
    if not isinstance(metrics, dict) or metrics.get("fingerprint") != run["fingerprint"]:
        raise IntegrityError(
            f"{path} is not about the run {run['fingerprint']} of the present model: run `dvc repro -f -s evaluate`"
        )
    return metrics
