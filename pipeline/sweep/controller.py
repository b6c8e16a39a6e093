"""sweep: params.yaml -> a study of the settings that reach the target for the least; the best of them -> params.yaml.

This process founds the study, keeps its workers at work and draws what they find; they train.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from optuna.storages import fail_stale_trials
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pipeline.config.params import PARAMS, Params, load_params
from pipeline.config.recipes import write_values
from pipeline.config.sections import SweepConfig
from pipeline.data.token_files import data_sha256
from pipeline.sweep import worker
from pipeline.sweep.figures import UNITS, draw_study
from pipeline.sweep.mlflow_run import close_study_run, open_study_run
from pipeline.sweep.search_space import BATCH_KEYS, STEP_TOKENS, check_space, values_of, with_values
from pipeline.sweep.study import (
    RETRIES,
    absolute_url,
    ask_for,
    best_trial,
    find_study,
    has_work,
    join_study,
    open_storage,
    question_of,
    take_up_again,
    taken_up_again,
)
from pipeline.sweep.worker import WORKER, WorkerConfig, worker_name
from pipeline.system.device import cores
from pipeline.system.errors import InputError, TargetNotReached
from pipeline.system.files import locked
from pipeline.system.host import SOURCE_ROOT
from pipeline.system.signals import StopSignals
from pipeline.tracking.fingerprint import differences
from pipeline.tracking.mlflow_store import naming_dead_store, open_store, project_root
from pipeline.training.config import RunConfig

DASHBOARD_PORT = 8080
LOOK_S = 0.2  # how often the workers are looked after


def run_sweep(params: Params, sweep: SweepConfig) -> None:
    """Go on with the study until its trials, its time or its patience are spent, or a signal comes.

    Raises RunLocked where this checkout already works at it; TargetNotReached where no trial has reached the target.
    """
    config = RunConfig.of(params)
    check_space(sweep, params)
    root = project_root()
    _prepare_tokens()
    question = question_of(sweep, config, data_sha256(root / "data" / "tokens"))
    home = root / "checkpoints" / sweep.study
    with locked(home.parent / f"{sweep.study}.lock"), StopSignals() as stop:
        study = join_study(sweep, question, open_storage(sweep.storage, root, sweep.heartbeat_timeout_s))
        _leave_none_running(study, root)
        own = values_of(config, list(sweep.axes))
        if not study.get_trials(deepcopy=False) and not ask_for(study, sweep, own):
            print("the space does not hold the values of params.yaml: they are not tried")
        with naming_dead_store(root, "then sweep again"):
            store = open_store(root)
            run_id = open_study_run(store, study.user_attrs.get("mlflow_run_id"), sweep.study, sweep.model_dump())
        study.set_user_attr("mlflow_run_id", run_id)
        study.set_user_attr("trials", sweep.trials)
        threads = max(1, cores() // sweep.workers) if config.train.threads == "auto" else config.train.threads
        orders = [
            WorkerConfig(str(root), sweep.model_dump(mode="json"), params.values, question, index, threads, run_id)
            for index in range(sweep.workers)
        ]
        print(f"study {sweep.study}: {sweep.workers} workers of {threads} threads", flush=True)
        if sweep.objective == "train_s" and sweep.workers > 1:
            print("train_s is what the clock says while the workers share this machine: nothing is corrected")
        _work(study, sweep, orders, stop)
        draw_study(study, home / "figures")
        with naming_dead_store(root, "then sweep again"):
            status = "FINISHED" if stop.received is None else "KILLED"
            close_study_run(store, run_id, status, home / "figures", *_outcome(study))
        print(_summary(study))
        stop.raise_if_received(f"all kept in {sweep.storage} and {home}")
        _require_best(study)


def print_status(sweep: SweepConfig) -> None:
    """Print every trial of the study as it stands, the one that is best so far first."""
    study = find_study(sweep, project_root())
    again = taken_up_again(study)
    best = best_trial(study)
    rows = [_row(trial) for trial in study.trials if trial.number not in again]
    rows.sort(key=lambda row: (row["state"] != "reached", row["value"] if row["value"] is not None else row["trial"]))
    print(_summary(study))
    if rows:
        table = pd.DataFrame(rows).drop(columns="value" if best is None else [])
        print(table.to_string(index=False, na_rep="", float_format=lambda value: f"{value:,.6g}"))


def print_best(sweep: SweepConfig) -> None:
    """Print the best trial, what it changes, and where its run is."""
    study = find_study(sweep, project_root())
    best = _require_best(study)
    print(_summary(study))
    for key, value in best.user_attrs["values"].items():
        print(f"  {key} {value}")
    print(
        f"MLflow run {best.user_attrs.get('mlflow_run_id', 'unknown')}; `python -m pipeline sweep apply` takes it over"
    )


def apply_best(sweep: SweepConfig, path: Path = PARAMS) -> None:
    """Write the best trial's values into params.yaml, which then names the trial that they come from.

    Raises InputError where params.yaml sets what was not searched otherwise than the study did.
    """
    study = find_study(sweep, project_root())
    best = _require_best(study)
    values = best.user_attrs["values"]
    founded = study.user_attrs["question"]
    params = load_params(path)
    config = RunConfig.of(with_values(params, values, sweep.micro_batch_tokens))
    searched = sweep.updated(space=founded["space"], objective=founded["objective"])
    if changed := differences(founded, question_of(searched, config, founded["data_sha256"])):
        raise InputError(f"{path} is not what study {sweep.study} was about: {', '.join(changed)}: set it back first")
    keys = {key for name in values for key in ((name,) if name != STEP_TOKENS else BATCH_KEYS)}
    applied = {"sweep.applied": f"{sweep.study}/{best.number}/{config.digest}"}
    print(write_values(values_of(config, sorted(keys)) | applied, path))


def open_dashboard(sweep: SweepConfig) -> None:
    """Serve Optuna's dashboard on the study's database, on this machine alone, until interrupted."""
    from optuna_dashboard import run_server

    find_study(sweep, root := project_root())
    print(f"study {sweep.study}: http://127.0.0.1:{DASHBOARD_PORT}/dashboard (Ctrl-C ends it)", flush=True)
    run_server(absolute_url(sweep.storage, root), host="127.0.0.1", port=DASHBOARD_PORT)


def _prepare_tokens() -> None:
    """Bring data/tokens up to date with DVC, so that no trial learns stale ones."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "tokenize"]  # another one is done in seconds
    if subprocess.run(command, env={**os.environ, "PATH": path}, check=False).returncode:
        raise InputError("sweep: `dvc repro tokenize` failed, as told above: mend that first")


def _work(study: Study, sweep: SweepConfig, orders: list[WorkerConfig], stop: StopSignals) -> None:
    """Keep the workers at work until there is none, the time is spent, or a signal comes; stop them then.

    A worker that dies leaves its trial to be taken up again, and is replaced.
    """
    deadline = time.monotonic() + (sweep.budget_s or float("inf"))
    working = {order.worker: _start(order) for order in orders}
    deaths, told = 0, False
    while working:
        time.sleep(LOOK_S)
        if not told and (told := stop.received is not None or time.monotonic() > deadline):
            for process in working.values():
                process.terminate()
        for index, process in list(working.items()):
            if process.poll() is None:
                continue
            del working[index]
            _leave_none_running(study, Path(orders[index].root))
            if process.returncode and not told:
                deaths += 1
                print(f"worker {process.pid} died, exit code {process.returncode}", flush=True)
            if not working:
                fail_stale_trials(study)  # of other machines
            if not told and deaths <= RETRIES * sweep.workers and has_work(study, sweep):
                working[index] = _start(orders[index])


def _leave_none_running(study: Study, root: Path) -> None:
    """Have the trials of workers of this project that are no more taken up again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        pid = str(trial.user_attrs.get(WORKER, "")).rpartition(":")[2]
        if trial.user_attrs.get(WORKER) == worker_name(root, pid) and not psutil.pid_exists(int(pid)):
            take_up_again(study, trial.number, RETRIES)


def _start(orders: WorkerConfig) -> "subprocess.Popen[str]":
    path = os.pathsep.join([str(SOURCE_ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", worker.__name__],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        process_group=0,  # Ctrl-C is for the sweep, which then stops them
        text=True,
    )
    assert process.stdin is not None, "a pipe, as asked for"
    process.stdin.write(json.dumps(orders._asdict()) + "\n")
    process.stdin.close()
    return process


def _require_best(study: Study) -> FrozenTrial:
    if (best := best_trial(study)) is None:
        failed = {str(trial.user_attrs["reason"]) for trial in study.trials if "reason" in trial.user_attrs}
        why = f" ({'; '.join(sorted(failed)[:3])})" if failed else ""
        hint = "mend the space" if failed else "raise optim.max_tokens, widen the space, or give it more trials"
        raise TargetNotReached(f"no trial of study {study.study_name} has reached the target{why}: {hint}")
    return best


def _outcome(study: Study) -> tuple[dict[str, float], dict[str, str]]:
    """Figures and tags of the study's own run in MLflow."""
    best, states = best_trial(study), [trial.state for trial in study.trials]
    metrics = {f"trials/{state.name.lower()}": float(states.count(state)) for state in TrialState}
    metrics["tokens"] = float(_tokens(study))
    if best is None:
        return metrics, {}
    metrics[f"best/{study.user_attrs['question']['objective']}"] = float(best.value or 0)
    values = best.user_attrs["values"]
    return metrics, {"best_trial": str(best.number), "best_values": json.dumps(values)}


def _summary(study: Study) -> str:
    trials, best = study.get_trials(deepcopy=False), best_trial(study)
    own = sum("failed_trial" not in trial.system_attrs for trial in trials)
    states = [trial.state for trial in trials]
    reached, stopped = states.count(TrialState.COMPLETE), states.count(TrialState.PRUNED)
    failed = states.count(TrialState.FAIL) - len(taken_up_again(study))
    begun = f"{own} of {study.user_attrs['trials']} trials begun"
    words = f"study {study.study_name}: {begun}, {reached} reached the target, {stopped} did not, {failed} failed"
    if best is None:
        return words
    objective = study.user_attrs["question"]["objective"]
    cost = _tokens(study) / max(best.intermediate_values)
    found = f"best: trial {best.number}, {best.value:,.6g} {UNITS[objective]}"
    return f"{words}; {found}; all of them took {cost:.1f} times its tokens"


def _tokens(study: Study) -> int:
    """What all trials have seen; what was taken up again, or only repeated, counts once."""
    once = [t for t in study.trials if t.number not in taken_up_again(study) and "same_as" not in t.user_attrs]
    return sum(max(trial.intermediate_values, default=0) for trial in once)


def _row(trial: FrozenTrial) -> dict[str, Any]:
    states = {TrialState.COMPLETE: "reached", TrialState.PRUNED: "stopped"}
    tokens = max(trial.intermediate_values, default=0)
    facts: dict[str, Any] = {
        "trial": trial.number,
        "state": states.get(trial.state, trial.state.name.lower()),
        "value": trial.value if trial.state is TrialState.COMPLETE else None,
        "tokens": f"{tokens:,}",
        "loss of last pass": trial.intermediate_values.get(tokens),
    }
    facts |= trial.user_attrs.get("values", {})
    return facts | {"why": trial.user_attrs.get("reason", "")}
