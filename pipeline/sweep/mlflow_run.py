"""study_run: a study -> its run in MLflow, the parent of its trials' runs."""

from pathlib import Path
from typing import Any

from pipeline.system.host import git_info
from pipeline.tracking.mlflow_store import Store


def open_study_run(store: Store, run_id: str | None, study: str, settings: dict[str, Any]) -> str:
    """Go on with the study's run, or create it; return its id."""
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    if run_id is not None:
        try:
            store.client.update_run(run_id, status="RUNNING")
            return run_id
        except MlflowException:
            print(f"MLflow's store {store.uri} has lost the study's run {run_id}: it gets a new one")
    facts = git_info()
    tags = facts | {"study": study, "mlflow.source.name": "pipeline/sweep/controller.py"}
    tags["mlflow.source.git.commit"] = facts["git_commit"]
    run = store.client.create_run(store.experiment_id, tags=tags, run_name=f"sweep {study}")
    params = [Param(f"sweep.{key}", str(value)[:6000]) for key, value in settings.items()]  # MLflow's limit
    store.client.log_batch(run.info.run_id, params=params)
    return str(run.info.run_id)


def close_study_run(
    store: Store, run_id: str, status: str, figures: Path, metrics: dict[str, float], tags: dict[str, str]
) -> None:
    """Give the study's run what has come out so far, and close it as `status`."""
    for key, value in metrics.items():
        store.client.log_metric(run_id, key, value)
    for key, text in tags.items():
        store.client.set_tag(run_id, key, text)
    store.client.log_artifacts(run_id, str(figures), "figures")
    store.client.set_terminated(run_id, status)
