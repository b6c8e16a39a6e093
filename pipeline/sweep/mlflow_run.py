"""Log a study as an MLflow run, the parent of its trials' runs."""

import json
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import TrialState

from pipeline.sweep.pruner import best_trial
from pipeline.sweep.study import SHARED
from pipeline.system.host import git_info
from pipeline.tracking.mlflow_store import Store


def open_study_run(store: Store, run_id: str | None, study: str, settings: dict[str, Any]) -> str:
    """Reopen the study's run, or create it; return its id."""
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    if run_id is not None:
        try:
            store.client.update_run(run_id, status="RUNNING")
            return run_id
        except MlflowException:
            print(f"MLflow's store {store.uri} has no run {run_id} of this study: a new one is created")
    tags = git_info() | {"study": study, "mlflow.source.name": "pipeline/sweep/controller.py"}
    tags["mlflow.source.git.commit"] = tags["git_commit"]
    run = store.client.create_run(store.experiment_id, tags=tags, run_name=f"sweep {study}")
    params = [Param(f"sweep.{key}", str(value)[:6000]) for key, value in settings.items()]  # MLflow's limit
    store.client.log_batch(run.info.run_id, params=params)
    return str(run.info.run_id)


def close_study_run(store: Store, study: Study, status: str, figures: Path) -> None:
    """Log the study's results so far and its figures, and close its run as `status`."""
    run_id, states = study.user_attrs["mlflow_run_id"], [trial.state for trial in study.get_trials(deepcopy=False)]
    for state in TrialState:
        store.client.log_metric(run_id, f"trials/{state.name.lower()}", states.count(state))
    if (best := best_trial(study)) is not None:
        store.client.log_metric(run_id, f"best/{study.user_attrs[SHARED]['objective']}", best.value)
        store.client.set_tag(run_id, "best_trial", best.number)
        store.client.set_tag(run_id, "best_values", json.dumps(best.user_attrs["values"]))
    store.client.log_artifacts(run_id, str(figures), "figures")
    store.client.set_terminated(run_id, status)
