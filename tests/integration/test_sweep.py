"""Whole studies of tiny runs: results, tracking, failures, signals, seeds. The workers run in this process."""

import json
import os
import signal
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace as Namespace

import pytest
from optuna.trial import TrialState

from pipeline.__main__ import main
from pipeline.config.params import load_params
from pipeline.data.encode import write_tokens
from pipeline.sweep import controller, worker
from pipeline.sweep.study import latest_trials, requeue
from pipeline.sweep.worker import TrialReporter, Worker, WorkerConfig
from pipeline.system.files import locked
from pipeline.system.signals import StopSignals
from pipeline.training.config import RunConfig
from tests.studies import list_folder, study_here, sweep_project
from tests.trainings import Untracked, change

REPRO_STAGE = controller.repro_stage


@pytest.fixture
def workspace(prepared, store, tmp_path, monkeypatch):
    """A project in which a sweep's worker has ended, with all its work done, as soon as it is started."""
    stops = []

    def new_stop_signals():
        stops.append(StopSignals())
        return stops[-1]

    def work_here(_module, line):
        Worker(WorkerConfig(**json.loads(json.dumps(line))), stops[-1]).work()
        return Namespace(pid=os.getpid(), returncode=0, poll=lambda: 0, terminate=lambda: None)

    sweep_project(prepared, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    monkeypatch.setattr(controller, "StopSignals", new_stop_signals)
    monkeypatch.setattr(controller, "start_module", work_here)
    monkeypatch.setattr(controller, "repro_stage", lambda _: None)  # runs in tests/faults/test_repro.py
    return tmp_path


@pytest.fixture
def untracked(monkeypatch):
    """Trials without a recorder, and studies without figures."""
    monkeypatch.setattr(worker, "Recorder", Untracked)
    monkeypatch.setattr(controller, "draw_study", lambda study, folder: folder.mkdir(parents=True, exist_ok=True))


@pytest.fixture
def command(capfd):
    """Runs `python -m pipeline ...`; returns its exit code, its output and its last line on stderr."""

    def call(*arguments):
        code = main([*map(str, arguments)])
        out, err = capfd.readouterr()
        return code, out, (err.splitlines() or [""])[-1]

    return call


@pytest.fixture
def sweep(command):
    """Runs `python -m pipeline sweep ...`."""
    return lambda *arguments: command("sweep", *arguments)


def journal_of(trial, study="tiny"):
    path = Path("checkpoints", study) / trial.user_attrs["fingerprint"] / "steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def child_runs(store):
    parent = store.client.get_run(study_here().user_attrs["mlflow_run_id"])
    query = f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    runs = store.client.search_runs([parent.info.experiment_id], query)
    return parent, {run.data.tags["trial"]: run for run in runs}


def test_a_study_tracks_every_trial_and_its_best_values_are_applied(workspace, store, sweep, recorder_threads):
    code, _, err = sweep("--trials", 3, "--pruner", "extrapolation")
    assert code == 0, err
    trials, best = study_here().trials, study_here().best_trial
    assert len(trials) == 3
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert trials[0].user_attrs["values"] == {"optim.lr": 0.004}  # those of params.yaml
    assert journal_of(best)[-1]["tokens"] == best.value
    assert not list(Path("checkpoints/tiny").glob("*/step-*"))
    # Each trial is an MLflow run with all its steps, a child of the study's run, which has the result and the figures.
    parent, runs = child_runs(store)
    assert runs.keys() == {"0", "1", "2"}
    for trial in trials:
        child = runs[str(trial.number)]
        assert (child.info.status, child.info.run_id) == ("FINISHED", trial.user_attrs["mlflow_run_id"])
        assert child.data.tags["ended"].startswith("PRUNED" if trial.state is TrialState.PRUNED else "done")
        assert child.data.tags["study"] == "tiny"
        assert len(store.client.get_metric_history(child.info.run_id, "loss")) == len(journal_of(trial))
    assert parent.info.status == "FINISHED"
    assert float(parent.data.tags["best/tokens"]) == best.value
    assert parent.info.run_name.startswith("sweep tiny ")
    assert parent.info.run_name.endswith(f" best {best.value:,.6g} tokens")
    assert not parent.data.metrics
    figures = {file.path for file in store.client.list_artifacts(parent.info.run_id, "figures")}
    assert {"figures/curves.png", "figures/history.png"} <= figures
    # The result can be printed and applied; a later run names the trial that its settings come from.
    assert f"best: trial {best.number}" in sweep("status")[1]
    assert f"optim.lr {best.user_attrs['values']['optim.lr']}" in sweep("best")[1]
    assert sweep("apply")[0] == 0
    params = load_params()
    assert params.values["optim"]["lr"] == best.user_attrs["values"]["optim.lr"]
    assert RunConfig.of(params).origin(params) == {"study": "tiny", "trial": str(best.number)}
    change(workspace, **{"optim.max_grad_norm": 0.5})
    assert RunConfig.of(load_params()).origin(load_params()) == {}
    assert "optim.max_grad_norm 1.0 -> 0.5" in sweep("apply")[2]
    # A sweep with other shared settings is refused before anything is trained.
    code, _, err = sweep("--trials", 8)
    assert (code, len(study_here().trials)) == (2, 3)
    assert err.startswith("error: study tiny has other settings: optim.max_grad_norm 1.0 -> 0.5")  # D5


def test_a_study_minimises_the_seconds_to_a_validation_loss(workspace, sweep, untracked, tokenizer, shakespeare):
    write_tokens(shakespeare, tokenizer, Path("data/tokens"), fraction=0.01, val_fraction=0.1)
    change(workspace, **{"target.rule": "validation", "target.loss": 9.5, "target.eval_interval": 1})
    code, out, err = sweep("--trials", 3, "--objective", "train_s")
    assert code == 0, err
    best = study_here().best_trial
    steps = journal_of(best)
    assert [step["validation_loss"] < 9.5 for step in steps] == [*[False] * (len(steps) - 1), True]
    assert list(best.intermediate_values.values()) == [step["validation_loss"] for step in steps]
    assert "seconds of training" in out
    code, _, err = sweep("--trials", 3, "--study", "other", "--objective", "tokens")
    assert code == 0, err
    assert sweep("apply", "--study", "other")[0] == 0


def test_after_a_signal_everything_is_saved_and_the_same_command_resumes(
    workspace, store, sweep, monkeypatch, untracked
):
    after_step = TrialReporter.after_step

    def interrupted_after_7_steps(self, record):
        after_step(self, record)
        if record.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TrialReporter, "after_step", interrupted_after_7_steps)
        code, _, err = sweep("--trials", 1)
    assert code == 143
    assert "run the same command again to resume" in err
    assert child_runs(store)[0].info.status == "KILLED"
    assert [trial.state for trial in study_here().trials] == [TrialState.FAIL, TrialState.WAITING]
    code, out, err = sweep("--trials", 1)
    assert code == 0, err
    first, again = study_here().trials
    assert (again.state, again.params) == (TrialState.COMPLETE, first.params)
    assert "resumes from step 7 of" in out
    assert child_runs(store)[0].info.status == "FINISHED"


def test_a_failed_trial_has_its_reason_and_equal_settings_are_trained_once(workspace, sweep, untracked):  # D4
    space = {"windows": {"micro_batch_size": [4, 1_000_000]}}  # a batch of a million does not fit into any memory
    change(workspace, **{"sweep.space": space, "optim.max_epochs": 10**5, "optim.warmup": 0})
    code, _, err = sweep("--trials", 6)
    assert code == 0, err
    failed = [trial.user_attrs["reason"] for trial in study_here().trials if trial.state is TrialState.FAIL]
    assert failed
    assert all(reason.startswith("OutOfSpaceError: windows.micro_batch_size 1000000") for reason in failed)
    first, *others = [trial for trial in study_here().trials if trial.state is TrialState.COMPLETE]
    assert first.number == 0
    assert others
    assert {trial.value for trial in others} == {first.value}
    assert not any("fingerprint" in trial.user_attrs for trial in others)


def test_a_study_in_which_every_trial_fails_has_no_best(workspace, sweep, untracked):  # D4
    change(workspace, **{"optim.lr": 1e30, "optim.muon_lr": 1e30, "sweep.space": {"optim": {"lr": [1e29, 1e30]}}})
    code, _, err = sweep("--trials", 2)
    assert code == 8
    assert err.startswith("error: no trial of study tiny has reached the target (DivergedError: ")
    assert {trial.state for trial in study_here().trials} == {TrialState.FAIL}
    assert sweep("apply")[0] == 8


def test_a_worker_whose_trial_was_requeued_without_it_continues_with_the_next(workspace, sweep, monkeypatch, untracked):
    after_step = TrialReporter.after_step

    def requeued_after_7_steps(self, record):
        after_step(self, record)
        if self.trial.number == 0 and record.step == 7:
            requeue(self.trial.study, self.trial.study.trials[0])

    monkeypatch.setattr(TrialReporter, "after_step", requeued_after_7_steps)
    code, out, err = sweep("--trials", 1)
    assert code == 0, err
    assert "a trial of this worker was re-queued" in out
    assert [trial.state for trial in study_here().trials] == [TrialState.FAIL, TrialState.COMPLETE]


def test_a_second_sweep_names_the_first_and_a_sweep_without_tokens_does_not_start(workspace, sweep, monkeypatch):  # D3
    monkeypatch.setattr(controller, "repro_stage", REPRO_STAGE)  # fails: this is not a DVC repository
    with locked(Path("checkpoints/tiny.lock")):
        code, _, err = sweep()
    assert (code, f"is held by process {os.getpid()}" in err) == (6, True)
    assert sweep()[::2] == (2, "error: `dvc repro tokenize` failed, see the error above: fix it first")
    assert not Path("optuna.journal").exists()


def test_a_set_of_seeds_resumes_after_a_signal_and_grows_and_each_seed_is_trained_once(
    workspace, store, command, monkeypatch, untracked
):
    change(workspace, **{"target.loss": 8.0})  # about ten steps
    after_step, taken = TrialReporter.after_step, []

    def interrupted_in_the_second_seed(self, record):
        after_step(self, record)
        taken.append((self.run.config.train.seed, record.step))
        if taken[-1] == (2, 3) and taken.count((2, 3)) == 1:  # the last set of this test also has such a step
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrialReporter, "after_step", interrupted_in_the_second_seed)
    code, out, err = command("replicate", "--seeds", 3)
    assert code == 143, err
    assert "trial 0: starts (train.seed 1)\n" in out
    assert "1 of 3 seeds trained, 1 reached the target (100%)" in out
    code, out, err = command("replicate", "--seeds", 3)
    assert code == 0, err
    assert "resumes from step 3 of" in out
    study = study_here((folder := list_folder("replicate")).name)
    trials = {trial.user_attrs["values"]["train.seed"]: trial for trial in latest_trials(study)}
    assert [trial.state for _, trial in sorted(trials.items())] == [TrialState.COMPLETE] * 3
    journals = {seed: journal_of(trial, folder.name) for seed, trial in trials.items()}
    assert sorted(taken) == [(seed, step["step"]) for seed in (1, 2, 3) for step in journals[seed]]  # each step once
    assert len({step["loss"] for journal in journals.values() for step in journal[:1]}) == 3
    tokens = [journals[seed][-1]["tokens"] for seed in (1, 2, 3)]
    results = json.loads((folder / "results.json").read_text())
    assert results["tokens"] == pytest.approx(
        {"mean": fmean(tokens), "sd": stdev(tokens), "min": min(tokens), "max": max(tokens)}
    )
    assert [run["tokens"] for run in results["runs"]] == tokens
    # The study's run in MLflow has the same numbers, and the picture.
    run = store.client.get_run(study.user_attrs["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.run_name.startswith(f"{folder.name} ")
    assert run.info.run_name.endswith(f" mean {fmean(tokens):,.0f} tokens")
    assert float(run.data.tags["tokens/mean"]) == pytest.approx(fmean(tokens))
    assert float(run.data.tags["share_reached"]) == 1
    files = store.client.list_artifacts(run.info.run_id, "figures")
    assert [file.path for file in files] == ["figures/curves.png"]
    # A finished set is only shown; one more seed is added to it. The sweep's study does not exist.
    n_steps = len(taken)
    code, again, _ = command("replicate", "--seeds", 2)
    assert (code, len(taken)) == (0, n_steps)
    assert "3 of 3 seeds trained" in again
    assert command("replicate", "--seeds", 4)[0] == 0
    assert {seed for seed, _ in taken[n_steps:]} == {4}
    # A target out of reach is missed, and that is no failure; the changed parameters are another set.
    change(workspace, **{"target.loss": 0.001, "optim.max_epochs": load_params().values["optim"]["max_epochs"] / 100})
    code, out, err = command("replicate", "--seeds", 2)
    assert code == 8
    assert "2 of 2 seeds trained, 0 reached the target (0%)" in out
    assert err.endswith("has reached the target: raise optim.max_epochs")


def test_the_confirmed_winner_is_applied(workspace, store, sweep, untracked):
    change(workspace, **{"sweep.space": {"optim": {"lr": [0.012]}}, "target.loss": 8.0})  # params.yaml has 0.004
    code, _, err = sweep("confirm")
    assert (code, err) == (2, "error: no study tiny in journal:///optuna.journal: `python -m pipeline sweep` starts it")
    assert sweep("--trials", 1)[0] == 0
    code, out, err = sweep("confirm", "--top", 1, "--seeds", 2)
    assert code == 0, err
    study = study_here((folder := list_folder("tiny-confirm")).name)
    costs = {0.004: [], 0.012: []}
    for trial in study.trials:
        costs[trial.user_attrs["values"]["optim.lr"]].append(journal_of(trial, folder.name)[-1]["tokens"])
    assert {trial.user_attrs["values"]["train.seed"] for trial in study.trials} == {2, 3}
    assert len(study.trials) == 4
    winner = min(costs, key=lambda lr: fmean(costs[lr]))
    name = {0.004: "default", 0.012: "trial 0"}[winner]
    assert f"winner: {name}" in out
    assert store.client.get_run(study.user_attrs["mlflow_run_id"]).data.tags["winner"] == name
    assert f"applying {name}, the confirmed winner" in sweep("apply")[1]
    assert load_params().values["optim"]["lr"] == winner
    assert f"confirmed, winner: {name}" in sweep("best")[1]
