"""Log a study as an MLflow run, the parent of its trials' runs."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from optuna.study import Study
from optuna.trial import TrialState

from pipeline.config.sections import SweepConfig
from pipeline.system.host import git_info
from pipeline.tracking.mlflow_store import Store


class Outcome(NamedTuple):
    """What a study has found so far: a text for the terminal, and metrics and tags of its MLflow run."""

    text: str
    metrics: Mapping[str, float] = MappingProxyType({})
    tags: Mapping[str, str] = MappingProxyType({})


def open_study_run(store: Store, run_id: str | None, sweep: SweepConfig) -> str:
    """Reopen the study's run, or create it; return its id."""
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    if run_id is not None:
        try:
            store.client.update_run(run_id, status="RUNNING")
            return run_id
        except MlflowException:
            print(f"MLflow's store {store.uri} has no run {run_id} of this study: a new one is created")
    name = sweep.study if sweep.is_list else f"sweep {sweep.study}"
    tags = git_info() | {"study": sweep.study, "mlflow.source.name": "pipeline/sweep/controller.py"}
    tags["mlflow.source.git.commit"] = tags["git_commit"]
    run = store.client.create_run(store.experiment_id, tags=tags, run_name=name)
    params = [Param(f"sweep.{key}", str(value)[:6000]) for key, value in sweep.model_dump().items()]  # MLflow's limit
    store.client.log_batch(run.info.run_id, params=params)
    return str(run.info.run_id)


def close_study_run(store: Store, study: Study, status: str, outcome: Outcome, figures: Path) -> None:
    """Log the study's outcome so far and its figures, and close its run as `status`."""
    run_id, states = study.user_attrs["mlflow_run_id"], [trial.state for trial in study.get_trials(deepcopy=False)]
    for state in TrialState:
        store.client.log_metric(run_id, f"trials/{state.name.lower()}", states.count(state))
    for key, value in outcome.metrics.items():
        store.client.log_metric(run_id, key, value)
    for key, text in outcome.tags.items():
        store.client.set_tag(run_id, key, text)
    store.client.log_artifacts(run_id, str(figures), "figures")
    store.client.set_terminated(run_id, status)
