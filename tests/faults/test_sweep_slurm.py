"""A sweep on a real Slurm cluster: tasks requeued, stopped or killed in a trial, and a head that is interrupted."""

import signal
from pathlib import Path

import psutil
from fixtures_slurm import ask
from optuna.trial import TrialState

from pipeline.cluster.jobs import find_jobs
from pipeline.sweep.study import WORKER, latest_trials
from pipeline.system.files import read_json
from pipeline.tracking.journal import STEPS
from tests.faults.test_sweep_faults import retry_of, running_trials, start_sweep
from tests.fixtures_mlflow import runs_in
from tests.studies import study_here, sweep_project
from tests.trainings import Untracked, change, train
from tests.waiting import wait_until

ON_SLURM = ("--on", "slurm", "--cpus", "1", "--time", "30m")


def trial_to_stop(head, but=()):
    """A trial in its first half, after a checkpoint, of a task that is not among `but`; the number of the task."""
    found = wait_until(
        lambda: [t for t in running_trials(before_step=30) if task_of(t) not in but] or head.poll() is not None, 180
    )
    assert head.poll() is None, head.communicate()[0]
    return found[0], task_of(found[0])


def task_of(trial):
    return int(trial.user_attrs[WORKER].rpartition("_")[2])


def worker_of(task):
    """The process of a task's worker."""
    (found,) = (
        process
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"] and process.info["cmdline"][1:3] == ["-m", "pipeline.sweep.worker"]
        and process.info["cmdline"][3:] == [str(Path("checkpoints/tiny/workers.json").absolute()), str(task)]
    )  # fmt: skip
    return found


def test_a_sweep_on_slurm_ends_each_trial_once_whatever_ends_its_tasks_and_its_head(
    slurm, prepared, store, tmp_path, monkeypatch
):  # D1, D2
    sweep_project(prepared, project := tmp_path / "project")
    change(project, **{"target.loss": 4.5, "sweep.heartbeat_timeout_s": 3600})  # nothing waits for a heartbeat
    monkeypatch.chdir(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    head = start_sweep(4, *ON_SLURM)
    stopped, first = trial_to_stop(head)
    (job,) = find_jobs("study-tiny")
    ask("scontrol", "requeue", f"{job.id}_{first}")  # SIGTERM: the trial is saved, and queued by its worker
    head.send_signal(signal.SIGINT)
    said, _ = head.communicate(timeout=60)
    assert head.returncode == 130
    assert f"interrupted; job {job.id} (study-tiny) is still in Slurm" in said
    head = start_sweep(4, *ON_SLURM)
    killed, second = trial_to_stop(head, but=[first])
    (worker := worker_of(second)).suspend()  # it cannot save anything, as when a node dies
    ask("scontrol", "requeue", f"{job.id}_{second}")
    worker.kill()
    said, _ = head.communicate(timeout=300)
    assert head.returncode == 0, said
    assert f"job {job.id} runs the workers of study tiny: no others are submitted" in said
    assert len(find_jobs()) == 1
    assert [read_json(job.folder / f"task-{task}.json")["attempts"] for task in range(2)] == [2, 2]
    # Each of the four trials has ended once, in one MLflow run that has each step once.
    trials = latest_trials(study_here())
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4
    for trial in (stopped, killed):
        retry = retry_of(trial)
        assert (retry.state, retry.params) == (TrialState.COMPLETE, trial.params)
    for trial in trials:
        (run,) = runs_in(store, Path("checkpoints", "tiny", trial.user_attrs["fingerprint"]))
        assert (run.info.status, run.data.tags["trial"]) == ("FINISHED", str(trial.number))
        steps = [point.step for point in store.client.get_metric_history(run.info.run_id, "loss")]
        assert steps == list(range(1, len(steps) + 1))
    parent = store.client.get_run(study_here().user_attrs["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    assert store.client.list_artifacts(parent.info.run_id, "figures")
    # The killed trial, trained again alone, has the same journal.
    fingerprint, lr = killed.user_attrs["fingerprint"], killed.user_attrs["values"]["optim.lr"]
    sweep_project(prepared, alone := tmp_path / "alone")
    change(alone, **{"target.loss": 4.5, "optim.lr": lr})
    monkeypatch.chdir(alone)
    monkeypatch.setattr("pipeline.training.train.Recorder", Untracked)
    train()
    journal = project / "checkpoints" / "tiny" / fingerprint / STEPS
    assert (alone / "checkpoints" / fingerprint / STEPS).read_bytes() == journal.read_bytes()
