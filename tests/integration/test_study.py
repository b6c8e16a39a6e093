"""Studies in a database: heartbeats, missing databases, processes that create a study together; all figures."""

import multiprocessing
import socket
import sqlite3
import threading
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace as Namespace

import pytest
from fixtures_postgresql import postgresql_server
from optuna.storages import fail_stale_trials
from optuna.trial import TrialState
from PIL import Image

from pipeline.sweep import controller
from pipeline.sweep.figures import draw_study
from pipeline.sweep.study import find_study, join_study, latest_trials, open_storage, suggest
from pipeline.sweep.worker import WorkerConfig
from pipeline.system.errors import InputError
from pipeline.system.signals import StopSignals
from tests.studies import fill, new_study, shared_by, sweep_config
from tests.waiting import wait_until


def age_heartbeat(database, seconds):
    """Shift the last heartbeats into the past."""
    with closing(sqlite3.connect(database)) as connection, connection:
        shift = f"-{seconds} seconds"
        connection.execute("UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, ?)", [shift])


def test_a_database_requeues_a_trial_after_the_heartbeat_timeout_and_not_before(tmp_path):  # D1, D3
    sweep = sweep_config()
    storage = open_storage("sqlite:///optuna.db", tmp_path, heartbeat_timeout_s=600)
    study = join_study(sweep, shared_by(sweep), storage)
    left = study.ask()
    values = suggest(left, sweep)
    storage.record_heartbeat(left._trial_id)
    age_heartbeat(tmp_path / "optuna.db", 300)
    fail_stale_trials(study)  # as every worker does before a trial
    assert study.trials[0].state is TrialState.RUNNING
    age_heartbeat(tmp_path / "optuna.db", 301)
    fail_stale_trials(study)
    assert study.trials[0].state is TrialState.FAIL
    assert suggest(study.ask(), sweep) == values
    assert [trial.number for trial in latest_trials(study)] == [1]


def test_the_dashboard_shows_the_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    sweep = sweep_config()
    join_study(sweep, shared_by(sweep), open_storage(sweep.storage, tmp_path, 60))
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setattr(controller, "DASHBOARD_PORT", port := free.getsockname()[1])
    threading.Thread(target=controller.open_dashboard, args=(sweep,), daemon=True).start()
    address = f"http://127.0.0.1:{port}"
    assert wait_until(lambda: answer_of(f"{address}/dashboard/"), 60)
    assert sweep.study in answer_of(f"{address}/api/studies")


def answer_of(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.read().decode()
    except urllib.error.URLError:  # it does not listen yet
        return ""


def test_a_sweep_waits_for_a_trial_of_a_dead_machine_and_retries_it(monkeypatch, tmp_path):  # D2
    sweep = sweep_config(trials=2, heartbeat_timeout_s=2)
    storage = open_storage(sweep.storage, tmp_path, 2)
    study = join_study(sweep, shared_by(sweep), storage)
    storage.record_heartbeat(study.ask()._trial_id)  # the last one of the dead machine

    def finish_a_trial(*_, line):
        study.tell(study.ask(), 1.0)
        return Namespace(pid=1, returncode=0, poll=lambda: 0)

    monkeypatch.setattr(controller, "start_module", finish_a_trial)
    configs = [WorkerConfig("", {}, {}, {}, sweep_id="", threads=1, parent_run_id="", sweep_pid=0)]
    controller._supervise(study, sweep, configs, StopSignals())
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert study.trials[2].system_attrs["failed_trial"] == 0


@pytest.mark.parametrize("scheme", ["journal", "sqlite"])
def test_a_relative_file_is_in_the_project_and_looking_for_a_study_creates_none(scheme, tmp_path):
    sweep = sweep_config(storage=f"{scheme}:///studies")
    with pytest.raises(InputError, match=f"no study s in {scheme}:///studies"):
        find_study(sweep, tmp_path)
    assert not list(tmp_path.iterdir())
    join_study(sweep, shared_by(sweep), open_storage(sweep.storage, tmp_path, 60))
    assert (tmp_path / "studies").is_file()
    found = find_study(sweep_config(storage=f"{scheme}:///{tmp_path}/studies"), Path("/nowhere"))
    assert found.study_name == "s"


@pytest.mark.parametrize(
    "url",
    [
        *(f"{scheme}:///{path}" for scheme in ("journal", "sqlite") for path in ("folder.db", "nowhere/studies")),
        "postgresql://nobody@127.0.0.1:1/none",
    ],
)
def test_a_storage_that_does_not_answer_is_named_in_one_line(tmp_path, url):
    if url.startswith("postgresql"):
        pytest.importorskip("psycopg")
    (tmp_path / "folder.db").mkdir()
    fault = {"journal": "fix it, or name another file", "sqlite": "cannot be opened"}.get(
        url[: url.index(":")], "start it"
    )
    for open_it in (lambda: open_storage(url, tmp_path, 60), lambda: find_study(sweep_config(storage=url), tmp_path)):
        with pytest.raises(InputError, match=fault) as error:
            open_it()
        assert "\n" not in str(error.value)


def test_every_figure_is_drawn_and_none_is_empty(tmp_path):
    draw_study(fill(new_study(sweep_config())), tmp_path)
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names == {"curves", "history", "slices", "parallel", "importances", "contours"}
    for path in tmp_path.glob("*.png"):
        assert len(Image.open(path).convert("RGB").getcolors(1 << 24)) > 20


def add_five_trials(url, root):
    sweep = sweep_config(storage=url)
    study = join_study(sweep, shared_by(sweep), open_storage(url, root, 60))
    for _ in range(5):
        trial = study.ask()
        study.tell(trial, suggest(trial, sweep)["optim.lr"])


def create_together(url, roots):
    """Create the study in four processes at once, each of which adds five trials."""
    fork = multiprocessing.get_context("fork")  # with all imports done, so that they start at the same moment
    processes = [fork.Process(target=add_five_trials, args=(url, root)) for root in roots]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    study = find_study(sweep_config(storage=url), roots[0])
    assert sorted(trial.number for trial in study.trials) == list(range(20))


@pytest.mark.parametrize("scheme", ["journal", "sqlite"])
def test_processes_that_create_a_study_together_lose_no_trial(scheme, tmp_path):  # C4
    create_together(f"{scheme}:///studies", [tmp_path] * 4)


@pytest.fixture
def postgresql():
    """The URL of a new database on a server of this test; skips when PostgreSQL or its driver is not installed."""
    pytest.importorskip("psycopg")
    with postgresql_server() as port:
        yield f"postgresql://postgres@127.0.0.1:{port}/postgres"


def test_machines_that_share_a_postgresql_create_a_study_together_and_lose_no_trial(postgresql, tmp_path):  # C4
    create_together(postgresql, [tmp_path / str(i) for i in range(4)])  # four machines: no lock file in common
