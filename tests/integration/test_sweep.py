"""controller: whole studies of tiny runs, with workers that are killed, stopped and started again."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from optuna.storages import fail_stale_trials
from optuna.trial import TrialState

from pipeline.config.params import load_params
from pipeline.config.recipes import apply_recipe
from pipeline.config.sections import SweepConfig
from pipeline.data.encode import write_tokens
from pipeline.sweep.controller import apply_best, print_best, print_status
from pipeline.sweep.search_space import overridden
from pipeline.sweep.study import find_study
from pipeline.sweep.worker import WORKER
from pipeline.system.errors import InputError, TargetNotReached
from pipeline.training.config import RunConfig
from tests.trainings import change
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.fault]
ROOT = Path(__file__).parents[2]
SPACE = {"optim": {"lr": {"low": 0.003, "high": 0.006, "log": True}}}
COMMAND = """if True:
    import runpy
    from pipeline.sweep import controller as sweep
    sweep._prepare_tokens = lambda: None  # DVC's part has its own test
    runpy.run_module("pipeline", run_name="__main__")
    """


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, bpe, tokenizer, shakespeare):
    """The smoke recipe with its tokens, and a target that its runs reach in about a second."""
    folder = tmp_path_factory.mktemp("prepared")
    shutil.copy(ROOT / "params.yaml", folder)
    apply_recipe("smoke", folder / "params.yaml", ROOT / "recipes")
    change(
        folder,
        **{
            "sweep.study": "tiny",
            "sweep.space": SPACE,
            "sweep.sampler": "random",
            "target.loss": 4.0,
            "checkpoint.interval_steps": 5,
            "train.threads": 1,
        },
    )
    shutil.copytree(bpe, folder / "data" / "tokenizer")
    write_tokens(shakespeare, tokenizer, folder / "data" / "tokens", fraction=0.005)
    return folder


@pytest.fixture
def workspace(prepared, store, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    return tmp_path / "w"


def start(*arguments):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMMAND, "sweep", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def run(*arguments):
    return ended(start(*arguments))


def ended(process):
    said = process.communicate(timeout=600)[0]
    return process.returncode, said


def config(**changes):
    return overridden(load_params(), changes).section(SweepConfig)


def study():
    return find_study(config(), Path.cwd())


def child_runs(store):
    parent = study().user_attrs["mlflow_run_id"]
    experiment = store.client.get_run(parent).info.experiment_id
    return store.client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}'")


def waited_for(is_so):
    found = wait_until(is_so, 180)
    assert found, "waited in vain"
    return found


def with_checkpoint():
    """The pid of a worker whose trial has saved a checkpoint, and the trial."""
    if not Path("optuna.db").is_file():
        return None
    try:
        running = study().get_trials(states=(TrialState.RUNNING,))
    except InputError:  # not created yet
        return None
    for trial in running:
        folder = Path("checkpoints/tiny") / trial.user_attrs.get("fingerprint", "none")
        if list(folder.glob("step-*")):
            return int(trial.user_attrs[WORKER].rpartition(":")[2]), trial
    return None


def stopped_between_transactions(pid):
    """Stop a process; whether SQLite can be written to then: in the midst of a write it would keep all others out."""
    os.kill(pid, signal.SIGSTOP)
    with closing(sqlite3.connect("optuna.db", timeout=1, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN EXCLUSIVE")
            return True
        except sqlite3.OperationalError:
            os.kill(pid, signal.SIGCONT)
            return False


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_study_finds_a_best_tracks_every_trial_and_its_best_is_applied(workspace, store, capsys):
    code, said = run("--trials", 4)
    assert code == 0, said
    states = [trial.state for trial in study().trials]
    assert len(states) == 4
    assert TrialState.COMPLETE in states
    assert set(states) <= {TrialState.COMPLETE, TrialState.PRUNED}
    best = study().best_trial
    # Each trial is a run of its own under the study's, with all its steps.
    runs = {run.data.tags["trial"]: run for run in child_runs(store)}
    assert runs.keys() == {"0", "1", "2", "3"}
    for number, trial in enumerate(study().trials):
        child = runs[str(number)]
        assert child.info.status == "FINISHED"
        assert child.data.tags["ended"].startswith("PRUNED" if trial.state is TrialState.PRUNED else "done")
        assert child.data.tags["study"] == "tiny"
        assert "git_commit" in child.data.tags
        assert child.info.run_id == trial.user_attrs["mlflow_run_id"]
        history = store.client.get_metric_history(child.info.run_id, "loss")
        rows = (Path("checkpoints/tiny") / trial.user_attrs["fingerprint"] / "steps.jsonl").read_text().splitlines()
        assert len(history) == len(rows)
    # The first trial is what params.yaml says; the value is what its journal says.
    assert study().trials[0].user_attrs["values"] == {"optim.lr": 0.004}
    journal = Path("checkpoints/tiny") / best.user_attrs["fingerprint"] / "steps.jsonl"
    assert json.loads(journal.read_text().splitlines()[-1])["tokens"] == best.value
    assert not list(Path("checkpoints/tiny").glob("*/step-*"))
    # The study's own run has the outcome and the figures.
    parent = store.client.get_run(study().user_attrs["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["best/tokens"] == best.value
    figures = {file.path for file in store.client.list_artifacts(parent.info.run_id, "figures")}
    assert {"figures/curves.png", "figures/history.png"} <= figures
    # What was found can be printed and applied; the run that follows says where its settings come from.
    print_status(config())
    print_best(config())
    looked = capsys.readouterr().out
    assert f"best: trial {best.number}" in looked
    apply_best(config(), Path("params.yaml"))
    params = load_params()
    assert params.values["optim"]["lr"] == best.user_attrs["values"]["optim.lr"]
    assert RunConfig.of(params).origin(params) == {"study": "tiny", "trial": str(best.number)}
    change(workspace, **{"optim.max_grad_norm": 0.5})
    assert RunConfig.of(load_params()).origin(load_params()) == {}
    with pytest.raises(InputError, match=r"optim.max_grad_norm 1.0 -> 0.5"):
        apply_best(config(), Path("params.yaml"))
    # With another space it is another study, which is said before anything is trained.
    change(
        workspace,
        **{"optim.max_grad_norm": 1.0, "sweep.space": {"optim": {"lr": {"low": 0.003, "high": 0.007, "log": True}}}},
    )
    code, said = run("--trials", 8)
    assert code == 2, said
    assert said.splitlines()[-1].startswith("error: study tiny has other settings: ")  # D5
    assert "space.optim.lr.high 0.006 -> 0.007" in said
    assert len(study().trials) == 4


def test_a_killed_workers_trial_resumes_from_its_checkpoint_in_the_same_run(workspace, store):  # D1
    change(workspace, **{"target.loss": 0.3, "sweep.pruner": "none"})
    sweep = start("--trials", 3, "--workers", 2)
    pid, left = waited_for(with_checkpoint)
    os.kill(pid, signal.SIGKILL)
    code, said = ended(sweep)
    assert code == 0, said
    trials = study().trials
    assert sum("failed_trial" not in trial.system_attrs for trial in trials) in (3, 4)  # one more at most
    again = next(trial for trial in trials if trial.system_attrs.get("failed_trial") == left.number)
    assert again.params == left.params
    assert again.state in (TrialState.COMPLETE, TrialState.PRUNED)
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    assert [trial.number for trial in trials if trial.state is TrialState.FAIL] == [left.number]
    folder = Path("checkpoints/tiny") / again.user_attrs["fingerprint"]
    assert int((folder / "resumes").read_text().split()[0]) >= 5  # not from the start
    runs = [run for run in child_runs(store) if run.data.tags["fingerprint"] == again.user_attrs["fingerprint"]]
    assert [(run.data.tags["trial"], run.info.status) for run in runs] == [(str(again.number), "FINISHED")]


@pytest.mark.parametrize("dies", ["the sweep", "the machine"])
def test_a_sweep_that_is_killed_takes_its_workers_along_and_loses_no_trial(workspace, dies):  # D2
    change(workspace, **{"target.loss": 0.3, "sweep.pruner": "none", "sweep.heartbeat_timeout_s": 5})
    sweep = start("--trials", 2)
    pid, left = waited_for(with_checkpoint)
    sweep.kill()
    if dies == "the machine":  # the worker, too, has no time to re-queue its trial
        os.kill(pid, signal.SIGKILL)
    sweep.communicate()
    assert wait_until(lambda: not is_alive(pid), 30)
    assert (study().trials[left.number].state is TrialState.RUNNING) is (dies == "the machine")
    code, said = run("--trials", 2)
    assert code == 0, said
    trials = study().trials
    again = next(trial for trial in trials if trial.system_attrs.get("failed_trial") == left.number)
    assert again.params == left.params
    assert again.state is TrialState.COMPLETE
    assert int((Path("checkpoints/tiny") / again.user_attrs["fingerprint"] / "resumes").read_text().split()[0]) >= 5
    assert sum("failed_trial" not in trial.system_attrs for trial in trials) == 2


def test_an_interrupted_sweep_keeps_everything_and_says_so(workspace, store):
    change(workspace, **{"target.loss": 0.3, "sweep.pruner": "none"})
    sweep = start("--trials", 2)
    waited_for(with_checkpoint)
    sweep.send_signal(signal.SIGTERM)
    code, said = ended(sweep)
    assert code == 143, said
    assert "run the same command again to resume" in said.splitlines()[-1]
    assert store.client.get_run(study().user_attrs["mlflow_run_id"]).info.status == "KILLED"
    assert TrialState.RUNNING not in {trial.state for trial in study().trials}
    assert TrialState.WAITING in {trial.state for trial in study().trials}


def test_a_slow_worker_that_lives_keeps_its_trial_and_a_second_sweep_names_the_first(workspace):  # D3
    change(workspace, **{"target.loss": 0.3, "sweep.pruner": "none"})
    sweep = start("--trials", 2, "--workers", 2, "--heartbeat-timeout-s", 30)
    pid, slow = waited_for(with_checkpoint)
    waited_for(lambda: stopped_between_transactions(pid))
    code, said = run("--trials", 2)  # a second sweep of the study here, which takes a fraction of the timeout
    fail_stale_trials(find_study(config(heartbeat_timeout_s=30), Path.cwd()))  # as a worker does that begins a trial
    os.kill(pid, signal.SIGCONT)
    assert code == 6, said
    assert f"is held by process {sweep.pid}" in said
    code, said = ended(sweep)
    assert code == 0, said
    assert study().trials[slow.number].state in (TrialState.COMPLETE, TrialState.PRUNED)
    assert len(study().trials) in (2, 3)


def test_a_trial_that_fails_says_why_and_the_sweep_goes_on(workspace, store):  # D4
    space = {
        "windows": {"micro_batch_size": [4, 1_000_000]}
    }  # of the second, not one forward pass fits into any memory
    change(workspace, **{"sweep.space": space, "optim.max_tokens": 10**8, "optim.warmup": 0})
    code, said = run("--trials", 6, "--pruner", "none")
    assert code == 0, said
    failed = [trial for trial in study().trials if trial.state is TrialState.FAIL]
    assert failed
    assert all(
        trial.user_attrs["reason"].startswith("OutOfSpaceError: windows.micro_batch_size 1000000") for trial in failed
    )
    first, *others = [trial for trial in study().trials if trial.state is TrialState.COMPLETE]
    assert first.number == 0
    assert {trial.value for trial in others} == {first.value}
    assert not any("fingerprint" in trial.user_attrs for trial in others)  # the same settings are trained once


def test_a_study_in_which_every_trial_fails_has_no_best(workspace):  # D4
    change(workspace, **{"optim.lr": 1e30, "optim.muon_lr": 1e30, "sweep.space": {"optim": {"lr": [1e29, 1e30]}}})
    code, said = run("--trials", 2)
    assert code == 8, said
    assert re.search(r"no trial of study tiny has reached the target \(DivergedError: .*step \d+", said)
    assert {trial.state for trial in study().trials} == {TrialState.FAIL}
    with pytest.raises(TargetNotReached):
        apply_best(config())


def test_a_budget_in_seconds_ends_a_call_and_leaves_the_study_to_the_next(workspace):
    change(workspace, **{"target.loss": 0.02, "sweep.pruner": "none"})
    code, said = run("--trials", 50, "--budget-s", 12)
    assert code in (0, 8), said
    assert len(study().trials) < 50
    assert TrialState.RUNNING not in {trial.state for trial in study().trials}
