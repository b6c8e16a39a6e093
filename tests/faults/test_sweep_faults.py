"""A sweep whose worker, whose machine, or which itself is killed loses no trial."""

import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

from pipeline.sweep.replicate import RESULTS
from pipeline.sweep.study import WORKER, join_study, open_storage
from pipeline.system.errors import InputError
from pipeline.system.files import read_json
from pipeline.tracking.fingerprint import IDENTITY
from pipeline.tracking.journal import Journal
from pipeline.training.run import RESUMES
from tests.fixtures_mlflow import runs_in
from tests.studies import ROOT, list_folder, shared_by, study_here, sweep_config, sweep_project
from tests.trainings import change
from tests.waiting import is_alive, wait_until

COMMAND = """if True:
    import sys
    from pipeline.__main__ import main
    from pipeline.sweep import controller
    controller.repro_stage = lambda _: None  # runs in tests/faults/test_repro.py
    sys.exit(main())
    """


def start_sweep(trials, *flags):
    return start("sweep", "--trials", str(trials), "--workers", "2", *flags)


def start(*arguments):
    command = [sys.executable, "-c", COMMAND, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, **pipes, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def running_trials(before_step=10**6, study="tiny"):
    """The running trials that a worker has begun, and whose newest checkpoint is of an earlier step than this."""
    try:
        running = study_here(study).get_trials(states=(TrialState.RUNNING,))
    except InputError:  # the study has not been created yet
        return []
    started = [trial for trial in running if WORKER in trial.user_attrs]
    return [trial for trial in started if 0 < newest_checkpoint(trial, study) < before_step]


def newest_checkpoint(trial, study="tiny"):
    """The step of a trial's newest checkpoint; 0 before there is one."""
    folder = Path("checkpoints", study, trial.user_attrs.get("fingerprint", "none"))
    return max((int(path.name.removeprefix("step-")) for path in folder.glob("step-*")), default=0)


def kill_a_worker():
    """Kill a worker in the first half of a trial, after a checkpoint; return the trial, or None when there is none."""
    for trial in running_trials(before_step=30):
        os.kill(int(trial.user_attrs[WORKER].rpartition(":")[2]), signal.SIGKILL)
        return trial
    return None


def retry_of(trial):
    """The last retry of a trial; None before there is one."""
    newest_first = reversed(study_here().trials)
    return next((t for t in newest_first if trial.number in RetryHeartbeatStaleTrialCallback.retry_history(t)), None)


def test_no_trial_is_lost_when_workers_the_sweep_or_the_machine_die(tmp_path, monkeypatch, store, prepared):  # D1, D2
    sweep_project(prepared, tmp_path)
    change(tmp_path, **{"target.loss": 3.0, "sweep.heartbeat_timeout_s": 5})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    # A worker is killed: the sweep re-queues its trial at once and starts another worker.
    sweep = start_sweep(trials=100)  # more than a worker could finish alone while the test waits for its end
    killed = wait_until(lambda: kill_a_worker() or sweep.poll() is not None, 180)
    assert sweep.poll() is None, sweep.communicate()[0]
    assert wait_until(lambda: retry_of(killed), 60).params == killed.params
    # The sweep is killed, and with it a worker that cannot re-queue its trial, as when the machine dies.
    assert wait_until(lambda: len(running_trials()) == 2, 180)
    workers = wait_until(lambda: psutil.Process(sweep.pid).children(), 60)
    sweep.send_signal(signal.SIGSTOP)
    lost = wait_until(kill_a_worker, 180)
    sweep.kill()
    assert wait_until(lambda: not any(map(is_alive, workers)), 60)  # the other worker ends with the sweep
    assert study_here().trials[lost.number].state is TrialState.RUNNING
    sweep.communicate()
    # The same command retries both trials, from their checkpoints and in their MLflow runs.
    said, _ = (again := start_sweep(trials=3)).communicate(timeout=300)
    assert again.returncode == 0, said
    trials = study_here().trials
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.FAIL}
    assert 3 <= sum(trial.state is TrialState.COMPLETE for trial in trials) < 50
    for trial in (killed, lost):
        retry = retry_of(trial)
        assert (retry.state, retry.params) == (TrialState.COMPLETE, trial.params)
        folder = Path("checkpoints", "tiny", retry.user_attrs["fingerprint"])
        assert int((folder / "resumes").read_text().split()[0]) >= 5
        (run,) = runs_in(store, folder)
        assert (run.info.status, run.data.tags["trial"]) == ("FINISHED", str(retry.number))
    assert all(trial.state is TrialState.COMPLETE or retry_of(trial) for trial in trials)


def finish_trials(sweep, root, told):
    """Finish trials without end; write the number of each to the file `told` when the study has it."""
    study = join_study(sweep, shared_by(sweep), open_storage(sweep.storage, root, 60))
    with told.open("a", buffering=1) as file:
        while True:
            study.tell(trial := study.ask(), float(trial.number))
            file.write(f"{trial.number}\n")


def test_killed_writers_neither_damage_the_journal_of_a_study_nor_stop_the_others(tmp_path, chance):  # D1
    sweep, fork = sweep_config(storage="journal:///studies"), multiprocessing.get_context("fork")
    told = [tmp_path / str(number) for number in range(20)]

    def start(path):
        process = fork.Process(target=finish_trials, args=(sweep, tmp_path, path))
        process.start()
        return process

    writers = [start(path) for path in told[:3]]
    for path in told[3:]:
        before = sum(map(lines_in, told))
        assert wait_until(lambda before=before: sum(map(lines_in, told)) > before + chance.randrange(20), 60)
        (writer := writers.pop(0)).kill()
        writer.join()
        writers.append(start(path))
    for writer in writers:
        writer.kill()
        writer.join()
    study = join_study(sweep, shared_by(sweep), open_storage(sweep.storage, tmp_path, 60))
    states = {trial.number: trial.state for trial in study.trials}
    finished = [int(line) for path in told if path.is_file() for line in path.read_text().split("\n")[:-1]]
    assert len(finished) == len(set(finished)) > 20
    assert {states[number] for number in finished} == {TrialState.COMPLETE}


def lines_in(path):
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_a_set_of_seeds_survives_the_death_of_the_machine_and_trains_each_seed_once(
    tmp_path, monkeypatch, store, prepared
):  # D2
    sweep_project(prepared, tmp_path)
    change(tmp_path, **{"target.loss": 3.0, "sweep.heartbeat_timeout_s": 5})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)

    def kill_in_the_second_seed(head):
        """Kill the worker and the sweep in the first half of the second seed; return whether it did."""
        if (folder := list_folder("replicate")) is None or len(list(folder.glob(f"*/{IDENTITY}"))) < 2:
            return False
        if not (running := running_trials(before_step=30, study=folder.name)):
            return False
        head.send_signal(signal.SIGSTOP)  # it cannot re-queue the trial
        os.kill(int(running[0].user_attrs[WORKER].rpartition(":")[2]), signal.SIGKILL)
        head.kill()
        return True

    head = start("replicate", "--seeds", "3", "--workers", "1")
    assert wait_until(lambda: kill_in_the_second_seed(head) or head.poll() is not None, 180)
    assert head.wait(60) == -signal.SIGKILL, head.communicate()[0]
    said, _ = (again := start("replicate", "--seeds", "3", "--workers", "1")).communicate(timeout=300)
    assert again.returncode == 0, said
    assert "3 of 3 seeds trained, 3 reached the target (100%)" in said
    runs = read_json((folder := list_folder("replicate")) / RESULTS)["runs"]
    assert [(run["seed"], run["state"]) for run in runs] == [(1, "reached"), (2, "reached"), (3, "reached")]
    assert len(list(folder.glob(f"*/{IDENTITY}"))) == 3
    for run in runs:
        steps = Journal(folder / run["fingerprint"])
        with closing(steps):
            assert steps.records[-1].step == len(steps.records) == run["steps"]
        (tracked,) = runs_in(store, folder / run["fingerprint"])
        assert (tracked.info.status, tracked.info.run_id) == ("FINISHED", run["mlflow_run_id"])
    assert (folder / runs[1]["fingerprint"] / RESUMES).read_text().split() != []  # it did not start again
    assert not (folder / runs[0]["fingerprint"] / RESUMES).exists()
