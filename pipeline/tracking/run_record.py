"""Read models/run.json and reports/metrics.json, and check that they belong together."""

from pathlib import Path
from typing import Any

from pipeline.system.errors import IntegrityError
from pipeline.system.files import read_json

RUN_KEYS = {"fingerprint", "data_sha256", "params", "environment", "n_params", "results"}


def read_run(models: Path) -> dict[str, Any]:
    """Read the record of the run that made `models`/model.

    Raises InputError if it is missing, IntegrityError if it is not such a record.
    """
    run = read_json(path := models / "run.json")
    if not isinstance(run, dict) or not run.keys() >= RUN_KEYS:
        raise IntegrityError(f"{path} is not the record of a run: `dvc repro` restores it")
    return run


def read_metrics(reports: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Read the metrics that the stage `evaluate` wrote for the model of `run`.

    Raises IntegrityError if they belong to another run.
    """
    metrics = read_json(path := reports / "metrics.json")
    if not isinstance(metrics, dict) or metrics.get("fingerprint") != run["fingerprint"]:
        raise IntegrityError(
            f"{path} is not about the run {run['fingerprint']} of the present model: run `dvc repro -f -s evaluate`"
        )
    return metrics
