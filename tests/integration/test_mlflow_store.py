"""Stores and servers that are not what is expected: each is named with its cause, and nothing in it is changed."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fixtures_mlflow import an_identity, append_steps, recording
from mlflow.store.tracking.dbmodels.initial_models import Base
from sqlalchemy import create_engine, text

from pipeline.__main__ import main
from pipeline.registry.catalog import find_version, open_registry
from pipeline.system.errors import ModelMissing
from pipeline.tracking.journal import Journal
from pipeline.tracking.mlflow_store import EXPERIMENT, open_store

ROOT = Path(__file__).parents[2]
FOUND = f'{{"experiment": {{"experiment_id": "1", "name": "{EXPERIMENT}", "lifecycle_stage": "active"}}}}'
PAGE = "<!DOCTYPE html>\n<html>Start the server? Log in: connection refused</html>"
HOST = "Invalid Host header - possible DNS rebinding attack detected"
DENIED = '{"error_code": "PERMISSION_DENIED", "message": "not yours"}'
OLD = '{"error_code": "INVALID_PARAMETER_VALUE", "message": " Model registry functionality is unavailable; got ..."}'
DISABLED = '{"error_code": "FEATURE_DISABLED", "message": "The registry is off"}'
LACKING = '{"error_code": "ENDPOINT_NOT_FOUND", "message": "No API found"}'


class Handler(BaseHTTPRequestHandler):
    """Answers as `server.answer` says: a status and a body; a redirect leads to the page /login."""

    def do_GET(self) -> None:
        status, body = (200, PAGE) if self.path == "/login" else self.server.answer
        if status is None:  # MLflow without a registry
            status, body = (200, FOUND) if "/experiments/" in self.path else (404, body)
        self.send_response(status)
        self.send_header("Location", "/login")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_arguments) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.answer = True, (200, PAGE)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


def message(root):
    with pytest.raises(ModelMissing) as raised:
        find_version(open_registry(root), "x", "champion")
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, PAGE), "its answers are not those of MLflow, but of a proxy, a login page or another program"),
        ((302, ""), "its answers are not those of MLflow"),
        ((200, "{}"), "its answers are not those of MLflow"),
        ((200, "[1]"), "its answers are not those of MLflow"),
        ((404, '{"detail": "Not Found"}'), "its answer is not one of MLflow: {'detail': 'Not Found'}"),
        ((401, PAGE), "it requires a login or refuses this one): set MLFLOW_TRACKING_USERNAME"),
        ((403, PAGE), "this account has no permission (403)"),
        ((403, HOST), "it does not answer to this host name): name it in `mlflow server --allowed-hosts`"),
        ((403, DENIED), "(PERMISSION_DENIED: not yours): ask for permission"),
        ((404, PAGE), "there is no MLflow at this address (404)): correct MLFLOW_TRACKING_URI"),
        ((502, PAGE), "(HTTP status 502): see the log of the server"),
        ((None, PAGE), "it has no model registry): use an MLflow 3 server with a database"),
        ((None, OLD), "it has no model registry"),
        ((None, DISABLED), "(x: FEATURE_DISABLED: The registry is off): use an MLflow 3 server with a database"),
        ((404, LACKING), "(ENDPOINT_NOT_FOUND: No API found): use an MLflow 3 server with a database"),
    ],
)
def test_a_server_that_runs_is_named_with_what_it_answers_and_nobody_is_told_to_start_it(
    server, tmp_path, answer, words
):
    server.answer = answer
    found = message(tmp_path)
    assert words in found
    assert "start it" not in found


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://127.0.0.1:9", "(connection refused by 127.0.0.1:9): start it, or correct MLFLOW_TRACKING_URI"),
        ("postgresql://127.0.0.1:9/x", "(connection refused by 127.0.0.1:9): start it, or"),
        ("postgresql+nope://h/x", "(MLflow has no such stores): correct MLFLOW_TRACKING_URI"),
        ("https://127.0.0.1:{port}", "(it does not use TLS): write http instead of https"),
        ("http://mlflow.invalid", "(its host name is unknown): correct MLFLOW_TRACKING_URI"),
        ("http://mlflow.example", "(the proxy does not let the request through): correct HTTP_PROXY"),
        ("mlflow.example://x", "(MLflow has no such stores): correct MLFLOW_TRACKING_URI to http://HOST:PORT"),
        ("mysql://127.0.0.1/x", "(the Python package MySQLdb is missing): install it"),
    ],
)
def test_a_server_that_cannot_be_reached_is_named_with_the_reason(server, tmp_path, monkeypatch, uri, words):
    monkeypatch.setenv("no_proxy", "127.0.0.1,mlflow.invalid")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(port=server.server_port))
    assert words in message(tmp_path)


RUN = "INSERT INTO experiments (experiment_id, name) VALUES (1, 'theirs')"
VERSION = "CREATE TABLE alembic_version AS SELECT '{}' AS version_num"


def database(path, *statements, is_mlflow=True):
    """A database with the tables of MLflow 0.9, and what the statements add."""
    engine = create_engine(f"sqlite:///{path}")
    if is_mlflow:
        Base.metadata.create_all(engine)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()
    return path


@pytest.mark.parametrize(
    ("statements", "is_mlflow", "words"),
    [
        (["CREATE TABLE customers (id)"], False, "is a database of another program (its tables: customers, ...)"),
        (
            [VERSION.format("v3.2.0.a"), "CREATE TABLE studies (id)"],
            False,
            "of another program (its tables: alemb",
        ),
        ([RUN], True, "was made by an older MLflow than"),
        (
            [RUN, VERSION.format("f5a4f2784254")],
            True,
            "(its schema is f5a4f2784254): back it up, then `mlflow",
        ),
        ([VERSION.format("ffffffffffff")], True, "a newer one or of another program (its schema is ffffffffffff)"),
    ],
)
def test_no_command_changes_a_database_of_another_program_or_version(
    tmp_path, monkeypatch, capfd, statements, is_mlflow, words
):
    path = database(tmp_path / "mlflow.db", *statements, is_mlflow=is_mlflow)
    before = path.read_bytes()
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    for command in (["models"], ["generate", "x"], ["export", "hf", "folder"]):
        assert main(command) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"error: sqlite:///{path} ")
        assert words in line
    assert main(["doctor"]) == 1
    assert words in capfd.readouterr().out
    (folder := tmp_path / "run").mkdir()
    journal = Journal(folder)
    append_steps(journal, 0, 3)
    with recording(tmp_path, folder, an_identity()):
        pass
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: MLflow fails (sqlite:///{path} ")
    assert path.read_bytes() == before


def test_tables_that_a_killed_process_left_unfinished_are_completed(tmp_path):
    database(tmp_path / "mlflow.db")
    store = open_store(tmp_path)
    assert store.client.get_experiment_by_name(EXPERIMENT).experiment_id == store.experiment_id
