"""Stores that fail during a run, or that several processes create: each record arrives in MLflow exactly once."""

import os
import resource
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from fixtures_mlflow import an_identity, append_steps, assert_has_exactly_the_journal, recording, root_of, run_id_of
from fixtures_postgresql import postgresql_server
from fixtures_registry import serving
from sqlalchemy import Engine, event

from pipeline.tracking import recorder
from pipeline.tracking.journal import Journal
from pipeline.tracking.mlflow_runs import logged_steps, runs_of
from tests.waiting import wait_until

DEADLINE_S = 240  # on a loaded machine


@pytest.fixture
def folder(tmp_path):
    (folder := tmp_path / "run").mkdir()
    return folder


@pytest.fixture
def warnings(monkeypatch):
    """What the recorder's thread prints; a line may be lost if pytest's capture is read at the same moment."""
    lines = []
    monkeypatch.setattr(recorder, "print", lambda line, file: lines.append(line), raising=False)
    return lines


def n_logged(store, identity):
    return sum(len(logged_steps(store, run.info.run_id)) for run in runs_of(store, identity["fingerprint"]))


def send_during_a_fault(store, root, folder, fail, repair, warnings):
    """Training continues with one warning while the store fails, and all records arrive when it is repaired."""
    identity, journal = an_identity(), Journal(folder)
    with recording(root, folder, identity):
        append_steps(journal, 0, 20)
        assert wait_until(lambda: n_logged(store, identity) == 20, DEADLINE_S)
        try:
            fail()
            append_steps(journal, 20, 100)
            assert wait_until(lambda: warnings, DEADLINE_S)
        finally:
            repair()
        append_steps(journal, 100, 110)
        assert wait_until(lambda: n_logged(store, identity) == 110, DEADLINE_S)
    (line,) = warnings
    assert line.startswith("warning: MLflow fails (")
    assert store.client.get_run(run_id_of(folder)).info.status == "FINISHED"
    assert_has_exactly_the_journal(store, folder)


def test_a_server_that_stalls_gets_all_records_once_it_answers(store, folder, tmp_path, monkeypatch, warnings):  # C3
    command = ["-m", "mlflow", "server", "--backend-store-uri", store.uri, "--workers", "1"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # as in compose.yaml
    with serving(command, "/health", tmp_path, environment) as (uri, group):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # seconds, instead of ten
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        stall, go_on = (partial(os.killpg, group, number) for number in (signal.SIGSTOP, signal.SIGCONT))
        send_during_a_fault(store, folder.parent, folder, stall, go_on, warnings)


def test_a_locked_database_gets_all_records_after_its_release(store, folder, warnings):  # C3
    def shorten(connection, cursor, statement, parameters, *_):
        """MLflow waits 20 seconds for a lock."""
        return statement.replace("busy_timeout = 20000", "busy_timeout = 100"), parameters

    event.listen(Engine, "before_cursor_execute", shorten, retval=True)
    try:
        with closing(sqlite3.connect(store.uri.removeprefix("sqlite:///"), isolation_level=None)) as other:
            lock = partial(other.execute, "BEGIN EXCLUSIVE")
            send_during_a_fault(store, root_of(store), folder, lock, other.rollback, warnings)
    finally:
        event.remove(Engine, "before_cursor_execute", shorten)


def test_a_database_on_a_full_disk_gets_all_records_once_there_is_space(store, folder, warnings):  # C3
    database = Path(store.uri.removeprefix("sqlite:///"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))

    send_during_a_fault(
        store, root_of(store), folder, lambda: limit(database.stat().st_size // 2), lambda: limit(before[0]), warnings
    )


AT_ONCE = """
import os, sys, time
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store  # once, since it takes seconds; it opens nothing
from mlflow import MlflowClient
from pipeline.tracking.mlflow_store import open_store
create = MlflowClient.create_experiment
MlflowClient.create_experiment = lambda *names: time.sleep(0.3) or create(*names)  # all four get there
wait, go = os.pipe()
for root in sys.argv[1:]:
    if os.fork() == 0:
        os.close(go)
        os.read(wait, 1)  # until the parent closes the pipe
        open_store(Path(root))
        sys.exit(0)
os.close(go)
sys.exit(any([os.wait()[1] for _ in range(4)]))
"""


def create_at_once(*roots):
    command = [sys.executable, "-c", AT_ONCE, *map(str, roots)]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], timeout=DEADLINE_S).returncode == 0


def test_four_processes_create_a_store_at_once(tmp_path):  # C4
    create_at_once(*[tmp_path] * 4)


def test_four_projects_create_a_file_that_they_share_at_once(tmp_path, monkeypatch):  # C4
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/shared.db")
    create_at_once(*(tmp_path / str(i) for i in range(4)))


def test_four_projects_create_the_tables_of_a_postgresql_at_once(tmp_path, monkeypatch):  # C4
    pytest.importorskip("psycopg")
    with postgresql_server() as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://postgres@127.0.0.1:{port}/postgres")
        create_at_once(*(tmp_path / str(i) for i in range(4)))
