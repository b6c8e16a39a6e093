"""Run a study's workers, print its trials, and write the best values into params.yaml."""

import json
import math
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from optuna.storages import RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pipeline.config.params import PARAMS, Params, load_params
from pipeline.config.recipes import locked_params, write_values
from pipeline.config.sections import SlurmConfig, SweepConfig
from pipeline.data.token_files import count_tokens, data_sha256
from pipeline.sweep import worker
from pipeline.sweep.figures import UNITS, draw_study
from pipeline.sweep.mlflow_run import Outcome, close_study_run, open_study_run
from pipeline.sweep.placement import Placement, place_workers
from pipeline.sweep.pruner import best_trial
from pipeline.sweep.search_space import BATCH_KEYS, STEP_TOKENS, check_space, values_of, with_values
from pipeline.sweep.slurm_workers import run_on_slurm
from pipeline.sweep.study import (
    CONFIRMED,
    MAX_RETRIES,
    SHARED,
    VALUES,
    WORKER,
    enqueue,
    failure_of,
    find_study,
    has_work,
    join_study,
    latest_trials,
    open_storage,
    requeue,
    require_same,
    shared_settings,
    unfinished_trials,
)
from pipeline.sweep.worker import WorkerConfig, worker_name
from pipeline.system.errors import PipelineError, TargetNotReached, WorkersDied
from pipeline.system.files import locked
from pipeline.system.host import project_root
from pipeline.system.processes import repro_stage, start_module
from pipeline.system.signals import StopSignals
from pipeline.tracking.mlflow_store import open_store, store_uri, translate_store_errors
from pipeline.training.config import RunConfig

DASHBOARD_PORT = 8080
POLL_S = 0.2


def run_sweep(params: Params, sweep: SweepConfig, slurm: SlurmConfig | None = None) -> None:
    """Run the study until its trials, its time or its patience are used up, or a signal arrives.

    Raises RunLocked if another process runs the study in this checkout, TargetNotReached if no trial has reached
    the target.
    """
    config = RunConfig.of(params)
    check_space(sweep, params)
    placement = place_workers(sweep, config.train, slurm)
    tokens = prepared_tokens(sweep.study)
    check_space(sweep, params, count_tokens(tokens))
    shared = shared_settings(sweep, config.with_weights(tokens.parent), data_sha256(tokens))

    def queue_default(study: Study) -> None:
        if not study.get_trials(deepcopy=False) and not enqueue(study, sweep, values_of(config, list(sweep.axes))):
            print("the values of params.yaml are outside the search space: no trial uses them")

    require_best(run_study(params, sweep, shared, placement, queue_default, _search_outcome))


def prepared_tokens(lock_name: str) -> Path:
    """The folder of the tokens, updated by DVC, so that no trial trains on stale ones.

    Raises RunLocked if another process holds the lock of this name.
    """
    root = project_root()
    with locked(root / "checkpoints" / f"{lock_name}.lock"):  # without locks, DVC would wait for its own without end
        repro_stage("tokenize")
    return root / "data" / "tokens"


def run_study(
    params: Params,
    sweep: SweepConfig,
    shared: dict[str, Any],
    placement: Placement,
    queue: Callable[[Study], None],
    outcome: Callable[[Study, Path], Outcome],
) -> Study:
    """Run the workers of a study until it has no more work, its time is over, or a signal arrives; return the study.

    `queue` adds the trials that are known at the start. `outcome` writes the figures into a folder, and returns what is
    printed and logged. Raises RunLocked if another process runs the study in this checkout, Interrupted after a signal
    (workers on Slurm then run on), WorkersDied or, on Slurm, JobFailed if workers failed and trials are left.
    """
    root = project_root()
    home = root / "checkpoints" / sweep.study
    with locked(home.with_suffix(".lock")), StopSignals() as stop:
        study = join_study(sweep, shared, open_storage(sweep.storage, root, sweep.heartbeat_timeout_s))
        queue(study)
        study.set_user_attr("trials", max(sweep.trials, len(latest_trials(study))))
        with translate_store_errors(store_uri(root)):
            store = open_store(root)
            run_id = open_study_run(store, study.user_attrs.get("mlflow_run_id"), sweep, params.values)
        study.set_user_attr("mlflow_run_id", run_id)
        settings = sweep.updated(workers=len(placement.devices)).model_dump(mode="json")
        given = str(root.absolute()), settings, params.values, shared, secrets.token_hex(4)
        configs = [WorkerConfig(*given, placement.threads, run_id, os.getpid(), device) for device in placement.devices]
        if sweep.is_list:
            configs = configs[: len(unfinished_trials(study))]
        failure: PipelineError | None = None
        if configs:
            print(f"study {sweep.study}: {placement._replace(devices=placement.devices[: len(configs)])}", flush=True)
            if placement.slurm:
                failure = run_on_slurm(study, sweep, configs, placement.slurm, home, stop)
            else:
                failure = _supervise(study, sweep, configs, stop)
        found = outcome(study, home / "figures")
        with translate_store_errors(store_uri(root)):
            status = "FAILED" if failure else "FINISHED" if stop.received is None else "KILLED"
            close_study_run(store, study, status, found, home / "figures", sweep, params.values)
        print(found.text)
        stop.raise_if_received(f"everything saved in {sweep.storage} and {home}")
        if failure:
            raise failure
        return study


def print_status(sweep: SweepConfig) -> None:
    """Print every trial of the study, the best one first."""
    study = find_study(sweep, project_root())
    rows = [_row(trial) for trial in latest_trials(study)]
    rows.sort(key=lambda row: (row["state"] != "reached", row["value"] if row["state"] == "reached" else row["trial"]))
    print(_summary(study))
    if rows:
        print(pd.DataFrame(rows).to_string(index=False, na_rep="", float_format=lambda value: f"{value:,.6g}"))


def print_best(sweep: SweepConfig) -> None:
    """Print the best trial, its values and its MLflow run."""
    study = find_study(sweep, project_root())
    best = require_best(study)
    print(_summary(study))
    if confirmed := study.user_attrs.get(CONFIRMED):
        print(f"confirmed, {confirmed['verdict']}")
    for key, value in best.user_attrs[VALUES].items():
        print(f"  {key} {value}")
    run_id = best.user_attrs.get("mlflow_run_id", "unknown")
    print(f"MLflow run {run_id}; `python -m pipeline sweep apply` writes these values into params.yaml")


def apply_best(sweep: SweepConfig, path: Path = PARAMS) -> None:
    """Write the best trial's values into params.yaml, and the trial's name into `sweep.applied`.

    After `sweep confirm` it is the confirmed winner, which may be the default. Raises InputError if params.yaml differs
    from the study in a parameter that was not searched.
    """
    study = find_study(sweep, project_root())
    best, shared = require_best(study), study.user_attrs[SHARED]
    name, values = f"trial {best.number}", best.user_attrs[VALUES]
    if confirmed := study.user_attrs.get(CONFIRMED):
        if not any(compared.items() <= values.items() for compared in confirmed["compared"]):
            print(f"{name} has the lowest cost, and was not compared: `python -m pipeline sweep confirm` does it")
        name, values = confirmed["name"], confirmed["values"]
    print(f"applying {name}, {'the confirmed winner' if confirmed else 'the trial with the lowest cost'}")
    config = RunConfig.of(with_values(load_params(path), values, sweep.micro_batch_tokens))
    searched = sweep.updated(space=shared["space"], objective=shared["objective"])
    weighted = config.with_weights(project_root() / "data")
    require_same(study, shared_settings(searched, weighted, shared["data_sha256"]))
    keys = {key for name in values for key in ((name,) if name != STEP_TOKENS else BATCH_KEYS)}
    number = name.removeprefix("trial ")
    applied = {"sweep.applied": None if number == "default" else f"{sweep.study}/{number}/{config.digest}"}
    with locked_params(path):
        print(write_values(values_of(config, sorted(keys)) | applied, path))


def open_dashboard(sweep: SweepConfig) -> None:
    """Serve Optuna's dashboard for the study's storage, on localhost only, until interrupted."""
    from optuna_dashboard import run_server

    find_study(sweep, root := project_root())
    print(f"study {sweep.study}: http://127.0.0.1:{(port := _free_port())}/dashboard (Ctrl-C ends it)", flush=True)
    storage = open_storage(sweep.storage, root, sweep.heartbeat_timeout_s)
    run_server(storage, host="127.0.0.1", port=port)


def _free_port() -> int:
    """DASHBOARD_PORT, or another port if a program uses it."""
    try:
        server = socket.create_server(("127.0.0.1", DASHBOARD_PORT))
    except OSError:
        server = socket.create_server(("127.0.0.1", 0))
    with server:
        return int(server.getsockname()[1])


def _supervise(study: Study, sweep: SweepConfig, configs: list[WorkerConfig], stop: StopSignals) -> WorkersDied | None:
    """Run the workers until there is no work left, the time limit is reached, or a signal arrives. Then stop them.

    When a worker dies, its trial is re-queued at once and the worker is replaced. Return WorkersDied if so many died
    that they were not replaced, and trials are left.
    """
    deadline = time.monotonic() + (sweep.budget_s or float("inf"))
    workers = {number: start_module(worker.__name__, line=config._asdict()) for number, config in enumerate(configs)}
    deaths, stopping = 0, False
    while workers:
        time.sleep(POLL_S)
        if not stopping and (stop.received is not None or time.monotonic() > deadline):
            stopping = True
            for process in workers.values():
                process.terminate()
        for number, process in list(workers.items()):
            if process.poll() is None:
                continue
            del workers[number]
            for trial in study.get_trials(states=(TrialState.RUNNING,)):
                if trial.user_attrs.get(WORKER) == worker_name(configs[number].sweep_id, process.pid):
                    requeue(study, trial, died=True)
            if process.returncode and not stopping:
                deaths += 1
                print(f"worker {process.pid} died, exit code {process.returncode}", flush=True)
            if not workers and not stopping:
                _wait_for_others(study, sweep, stop, deadline)
            if not stopping and deaths <= MAX_RETRIES * len(configs) and has_work(study, sweep):
                workers[number] = start_module(worker.__name__, line=configs[number]._asdict())
    if stopping or not has_work(study, sweep):
        return None
    return WorkersDied(f"{deaths} workers died, see above, and trials are left: fix the cause, repeat the command")


def _wait_for_others(study: Study, sweep: SweepConfig, stop: StopSignals, deadline: float) -> None:
    """Wait, for one heartbeat timeout at most, for trials on other machines; re-queue those without a heartbeat."""
    deadline = min(deadline, time.monotonic() + sweep.heartbeat_timeout_s + 1)
    while study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) and not has_work(study, sweep):
        if stop.received is not None or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
        fail_stale_trials(study)


def require_best(study: Study) -> FrozenTrial:
    if (best := best_trial(study)) is None:
        failed = {why for trial in latest_trials(study) if (why := failure_of(trial))}
        why = f" ({'; '.join(sorted(failed)[:3])})" if failed else ""
        is_list = not study.user_attrs[SHARED]["space"]
        hint = "raise optim.max_epochs" if is_list else "raise optim.max_epochs, widen the space, or allow more trials"
        hint = f"correct the {'parameters' if is_list else 'space'}" if failed else hint
        raise TargetNotReached(f"no trial of study {study.study_name} has reached the target{why}: {hint}")
    return best


def _search_outcome(study: Study, figures: Path) -> Outcome:
    """The best trial of a search so far."""
    draw_study(study, figures)
    if (best := best_trial(study)) is None:
        return Outcome(_summary(study))
    metrics = {f"best/{(objective := study.user_attrs[SHARED]['objective'])}": float(best.value)}
    tags = {"best_trial": str(best.number), "best_values": json.dumps(best.user_attrs[VALUES])}
    return Outcome(_summary(study), metrics, tags, f"best {best.value:,.6g} {objective}")


def _summary(study: Study) -> str:
    trials, best = latest_trials(study), best_trial(study)
    trials = [trial for trial in trials if not _is_new(trial)]
    states = [trial.state for trial in trials]
    words = (
        f"study {study.study_name}: {len(trials)} of {study.user_attrs['trials']} trials started, "
        f"{states.count(TrialState.COMPLETE)} reached the target, {states.count(TrialState.PRUNED)} did not, "
        f"{states.count(TrialState.FAIL)} failed"
    )
    if unfinished := sum(not state.is_finished() for state in states):
        words += f", {unfinished} unfinished"
    if best is None:
        return words
    cost = sum(map(_last_step, trials)) / _last_step(best)
    unit = UNITS[study.user_attrs[SHARED]["objective"]]
    return f"{words}; best: trial {best.number}, {best.value:,.6g} {unit}; all trials together: {cost:.1f} times that"


def _row(trial: FrozenTrial) -> dict[str, Any]:
    states = {TrialState.COMPLETE: "reached", TrialState.PRUNED: "stopped"}
    return {
        "trial": trial.number,
        "state": states.get(trial.state, trial.state.name.lower()),
        "value": trial.value if trial.state is TrialState.COMPLETE else math.nan,  # a pruned trial's is its loss
        "spent": f"{_last_step(trial):,}",
        "last loss": trial.intermediate_values.get(_last_step(trial)),
        **trial.user_attrs.get(VALUES, {}),
        "why": failure_of(trial) or "",
    }


def _is_new(trial: FrozenTrial) -> bool:
    """Whether a trial is queued and has never been started."""
    return trial.state is TrialState.WAITING and not RetryHeartbeatStaleTrialCallback.retry_history(trial)


def _last_step(trial: FrozenTrial) -> int:
    """The step of the last report, which is what the trial has spent."""
    return max(trial.intermediate_values, default=0)
