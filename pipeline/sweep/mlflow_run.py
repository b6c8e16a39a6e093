"""Log a study as an MLflow run, the parent of its trials' runs."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from optuna.study import Study
from optuna.trial import TrialState

from pipeline.config.sections import SweepConfig
from pipeline.system.host import git_info
from pipeline.tracking.descriptions import source_tag, study_name
from pipeline.tracking.mlflow_runs import NOTE
from pipeline.tracking.mlflow_store import Store

DESCRIPTIONS = (
    "A search for the parameters that reach the target at the lowest cost; its trials are the runs below it. "
    "`totarget sweep apply` writes the best values into params.yaml.",
    "The same training with several seeds; its trainings are the runs below it.",
)  # of a search, of a list of trainings


class Outcome(NamedTuple):
    """What a study has found so far: a text for the terminal, and numbers and words for tags of its MLflow run.

    The numbers are no metrics, since MLflow shows a metric of one value as a chart.
    """

    text: str
    metrics: Mapping[str, float] = MappingProxyType({})
    tags: Mapping[str, str] = MappingProxyType({})
    result: str = ""  # for the name of the run


def open_study_run(store: Store, run_id: str | None, sweep: SweepConfig, params: Mapping[str, Any]) -> str:
    """Reopen the study's run, or create it; return its id. `params`: the values of params.yaml."""
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    if run_id is not None:
        try:
            store.client.update_run(run_id, status="RUNNING")
            return run_id
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # missing, or deleted
                raise
            print(f"MLflow's store {store.uri} has no run {run_id} of this study: a new one is created")
    name = study_name(_base_name(sweep), params)
    tags = git_info() | {"study": sweep.study, "mlflow.source.name": "pipeline/sweep/controller.py"}
    tags |= source_tag(params)
    tags["mlflow.source.git.commit"] = tags["git_commit"]
    run = store.client.create_run(store.experiment_id, tags=tags, run_name=name)
    searched = [Param(f"sweep.{key}", str(value)[:6000]) for key, value in sweep.model_dump().items()]  # MLflow's limit
    store.client.log_batch(run.info.run_id, params=searched)
    return str(run.info.run_id)


def close_study_run(
    store: Store,
    study: Study,
    status: str,
    outcome: Outcome,
    figures: Path,
    sweep: SweepConfig,
    params: Mapping[str, Any],
) -> None:
    """Log the study's outcome so far, in its description too, and its figures, and close its run as `status`."""
    from mlflow.entities import RunTag

    run_id, states = study.user_attrs["mlflow_run_id"], [trial.state for trial in study.get_trials(deepcopy=False)]
    numbers = {f"trials/{state.name.lower()}": states.count(state) for state in TrialState} | dict(outcome.metrics)
    found = {**{key: str(value) for key, value in numbers.items()}, **outcome.tags}
    found[NOTE] = f"{DESCRIPTIONS[sweep.is_list]}\n\n```\n{outcome.text}\n```"
    store.client.log_batch(run_id, tags=[RunTag(key, text) for key, text in found.items()])
    base = _base_name(sweep)
    if store.client.get_run(run_id).info.run_name.startswith(base):  # else a user has renamed it
        store.client.update_run(run_id, name=study_name(base, params, outcome.result))
    store.client.log_artifacts(run_id, str(figures), "figures")
    store.client.set_terminated(run_id, status)


def _base_name(sweep: SweepConfig) -> str:
    return sweep.study if sweep.is_list else f"sweep {sweep.study}"
