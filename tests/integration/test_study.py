"""study: databases and heartbeats, on SQLite and, where a server can be started, PostgreSQL."""

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from optuna.storages import fail_stale_trials
from optuna.trial import TrialState

from pipeline.sweep import controller
from pipeline.sweep.study import find_study, join_study, latest_trials, open_storage, suggest
from pipeline.sweep.worker import WORKER, WorkerConfig, worker_name
from pipeline.system.errors import InputError
from pipeline.system.signals import StopSignals
from tests.studies import ROOT, shared_by, sweep_config


@pytest.fixture
def sweep():
    return sweep_config()


@pytest.mark.fault
@pytest.mark.parametrize(("silent_s", "state"), [(300, TrialState.RUNNING), (601, TrialState.FAIL)])
def test_a_silent_workers_trial_is_requeued_after_the_heartbeat_timeout_and_not_before(  # D1, D3
    silent_s, state, sweep, tmp_path
):
    storage = open_storage("sqlite:///optuna.db", tmp_path, heartbeat_timeout_s=600)
    study = join_study(sweep, shared_by(sweep), storage)
    left = study.ask()
    values = suggest(left, sweep)
    storage.record_heartbeat(left._trial_id)
    with closing(sqlite3.connect(tmp_path / "optuna.db")) as database, database:  # as if it had been so long ago
        database.execute("UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, ?)", [f"-{silent_s} seconds"])
    fail_stale_trials(study)
    assert study.trials[0].state is state
    again = study.ask()
    assert ([trial.number for trial in latest_trials(study)] == [1]) is (state is TrialState.FAIL)
    assert (suggest(again, sweep) == values) is (state is TrialState.FAIL)


class Ended:
    """A worker's process that has done its work, a function of the study, as soon as it is started."""

    pid = 1

    def __init__(self, work, study):
        self.returncode = work(study)

    def poll(self):
        return self.returncode


def supervised(monkeypatch, sweep, study, *works):
    """What the sweep started: workers that do these works, one after the other."""
    waiting, started = list(works), []
    configs = [WorkerConfig("", {}, {}, {}, number=0, threads=1, parent_run_id="")]

    def start(*_, **__):
        started.append(Ended(waiting.pop(0), study))
        return started[-1]

    monkeypatch.setattr(controller, "start_module", start)
    controller._supervise(study, sweep, configs, StopSignals())
    assert not waiting
    return started


def dies_in_a_trial(study):
    study.ask().set_user_attr(WORKER, worker_name(Ended.pid))
    return -9


def finishes_a_trial(study):
    study.tell(study.ask(), 1.0)
    return 0


def test_the_trial_of_a_worker_that_dies_is_requeued_at_once_whatever_the_timeout(monkeypatch, tmp_path):  # D1
    sweep = sweep_config(trials=1, heartbeat_timeout_s=600, budget_s=10)
    study = join_study(sweep, shared_by(sweep), open_storage("sqlite:///optuna.db", tmp_path, 600))
    supervised(monkeypatch, sweep, study, dies_in_a_trial, finishes_a_trial)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]


def test_a_sweep_waits_for_a_trial_of_a_dead_machine_and_retries_it(monkeypatch, tmp_path):  # D2
    sweep = sweep_config(trials=2, heartbeat_timeout_s=2)
    storage = open_storage("sqlite:///optuna.db", tmp_path, 2)
    study = join_study(sweep, shared_by(sweep), storage)
    storage.record_heartbeat(study.ask()._trial_id)  # the other machine's last
    supervised(monkeypatch, sweep, study, finishes_a_trial, finishes_a_trial)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert study.trials[2].system_attrs["failed_trial"] == 0


def test_a_relative_sqlite_file_is_the_projects_in_any_working_directory(tmp_path, sweep):
    storage = open_storage("sqlite:///optuna.db", tmp_path, 60)
    join_study(sweep, shared_by(sweep), storage)
    assert (tmp_path / "optuna.db").is_file()
    found = find_study(sweep_config(storage=f"sqlite:///{tmp_path}/optuna.db"), Path("/nowhere"))
    assert found.study_name == "s"


def test_a_study_that_is_not_there_is_one_line(tmp_path, sweep):
    with pytest.raises(InputError, match=r"no study s in sqlite:///optuna\.db"):
        find_study(sweep, tmp_path)
    assert not list(tmp_path.iterdir())  # looking makes no database


def test_storage_that_does_not_answer_is_one_line(tmp_path):
    (tmp_path / "folder.db").mkdir()
    for url in ("sqlite:///folder.db", "sqlite:///nowhere/optuna.db"):
        with pytest.raises(InputError, match="does not answer") as error:
            open_storage(url, tmp_path, 60)
        assert "\n" not in str(error.value)
        with pytest.raises(InputError, match="does not answer"):
            find_study(sweep_config(storage=url), tmp_path)


@pytest.mark.fault
def test_a_postgresql_server_that_is_not_there_is_one_line(tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(InputError, match="does not answer"):
        open_storage("postgresql://nobody@127.0.0.1:1/none", tmp_path, 60)


CREATE = """if True:
    import sys
    from pathlib import Path
    from tests.studies import shared_by, sweep_config
    from pipeline.sweep.study import join_study, open_storage, suggest
    sweep = sweep_config(storage=sys.argv[1])
    study = join_study(sweep, shared_by(sweep), open_storage(sys.argv[1], Path(sys.argv[2]), 60))
    for _ in range(5):
        trial = study.ask()
        study.tell(trial, suggest(trial, sweep)["optim.lr"])
    """


def created_together(url, roots):
    """Four processes that create the study and add five trials each, at the same time."""
    command = [sys.executable, "-c", CREATE, url]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen([*command, str(root)], env=env, stderr=subprocess.PIPE, text=True) for root in roots]
    complaints = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, complaints


@pytest.mark.fault
def test_processes_that_create_a_study_together_lose_no_trial(tmp_path):  # C4
    created_together("sqlite:///optuna.db", [tmp_path] * 4)
    study = find_study(sweep_config(), tmp_path)
    assert sorted(trial.number for trial in study.trials) == list(range(20))


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory):
    """The URL of a fresh database on a server of our own; skips where there is no PostgreSQL, or no driver."""
    pytest.importorskip("psycopg")
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    initdb = shutil.which("initdb", path=os.pathsep.join([os.environ["PATH"], *map(str, binaries)]))
    if initdb is None:
        pytest.skip("no PostgreSQL here: Debian's package postgresql brings it")
    folder, as_user = tmp_path_factory.mktemp("pg"), {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        for path in (folder, *folder.parents):
            if path != Path("/"):
                path.chmod(path.stat().st_mode | 0o711)
        shutil.chown(folder, "nobody")
        as_user = {"user": "nobody", "cwd": "/"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = Path(initdb).resolve().parent
    made = subprocess.run([initdb, "-D", folder / "db", "-U", "t", "--auth=trust"], capture_output=True, **as_user)
    if made.returncode:
        pytest.skip(f"PostgreSQL makes no database here: {made.stderr.decode()[-200:]}")
    options = f"-p {port} -k '' -c listen_addresses=127.0.0.1"
    server = [commands / "pg_ctl", "-D", folder / "db", "-w", "-l", folder / "log", "-o", options]
    subprocess.run([*server, "start"], check=True, stdout=subprocess.DEVNULL, **as_user)
    yield f"postgresql://t@127.0.0.1:{port}/postgres"
    subprocess.run([*server, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL, **as_user)


@pytest.mark.fault
@pytest.mark.slow
def test_machines_that_share_a_postgresql_create_a_study_together_and_lose_no_trial(postgresql, tmp_path):
    roots = [tmp_path / str(i) for i in range(4)]  # four machines: no lock that they share
    created_together(postgresql, roots)
    study = find_study(sweep_config(storage=postgresql), tmp_path)
    assert sorted(trial.number for trial in study.trials) == list(range(20))
