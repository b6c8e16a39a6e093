import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from fixtures_mlflow import (
    an_identity,
    append_steps,
    assert_holds_just_the_journal,
    recording,
    root_of,
    trained_project,
)
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from pipeline.system.errors import DivergedError, Interrupted, ModelMissing, Pruned
from pipeline.system.files import read_json, write_json, write_text
from pipeline.tracking.journal import STEPS, TIMES, Journal
from pipeline.tracking.mlflow_runs import (
    JournalTail,
    create_run,
    describe_inputs,
    describe_run,
    ensure_run,
    logged_steps,
    runs_of,
)
from pipeline.tracking.mlflow_store import Store, project_root, store_uri
from pipeline.tracking.mlflow_tracker import RUN_ID
from pipeline.tracking.recorder import Recorder, ending
from tests.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 240  # for anything at all, on a machine that others use too
AS_OTHERS = "import os; os.setpriority = lambda *_: None"  # at the lowest priority, a recorder beside busy cores stands


@pytest.fixture(autouse=True)
def _as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorder runs at the priority of the tests that wait for it."""
    monkeypatch.setattr(os, "setpriority", lambda *_: None)


@pytest.fixture
def identity() -> dict:
    return an_identity()


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(make_folder(tmp_path / "run"))


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def ensured(store: Store, project: Path) -> Run:
    return ensure_run(store, project, read_json(project / "models" / "run.json"))


def noted_id(journal: Journal) -> str:
    return (journal.folder / RUN_ID).read_text().strip()


@contextmanager
def recorder_of(root: Path, folder: Path, identity: dict, capfd: pytest.CaptureFixture) -> Iterator[list[str]]:
    """A process beside a training, as `Recorder` starts it; yields what has been told so far, in lines."""
    told: list[str] = []
    with Recorder(root, folder, identity, {}, tick_s=0.05):
        yield told
    told += capfd.readouterr().err.splitlines()


def has_warned(told: list[str], capfd: pytest.CaptureFixture) -> bool:
    told += capfd.readouterr().err.splitlines()
    return any("training continues" in line for line in told)


def python(code: str, *arguments: object) -> subprocess.Popen:
    """Start Python on `code`, with our packages and the tests' fixtures at hand."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    command = [sys.executable, "-c", f"{AS_OTHERS}\n{code}", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})


def test_a_run_has_its_rows_samples_parameters_data_and_machine(store: Store, journal: Journal, identity: dict):
    with recording(root_of(store), journal.folder, identity):
        append_steps(journal, 0, 25)
        write_text(journal.folder / "samples" / "step-000020.txt", "ROMEO: O")
    run = store.client.get_run(noted_id(journal))
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optim.lr": "0.002", "optim.betas": "[0.9, 0.95]", "windows.seq_len": "8"}
    assert run.data.tags["fingerprint"] == identity["fingerprint"]
    assert run.data.tags["environment.precision"] == "fp32"
    assert {"git_commit", "tree_clean", "host", "run_folder"} <= run.data.tags.keys()
    assert run.inputs.dataset_inputs[0].dataset.digest == identity["data_sha256"][:36]
    assert "system/cpu_utilization_percentage" in run.data.metrics
    assert_holds_just_the_journal(store, run.info.run_id, journal.folder)
    artifacts = Path(run.info.artifact_uri)
    assert artifacts.is_relative_to(root_of(store) / "mlruns")
    assert (artifacts / "samples" / "step-000020.txt").read_text() == "ROMEO: O"
    assert "python" in read_json(artifacts / "environment.json")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (ValueError("no"), "FAILED"),
        (Interrupted("s", 15), "KILLED"),
        (Pruned("too slow"), "FINISHED"),
        (KeyboardInterrupt(), "KILLED"),
    ],
)
def test_how_training_ended_is_how_the_run_ends(error: BaseException | None, status: str):
    assert ending(error)["status"] == status


@pytest.mark.fault
@pytest.mark.parametrize(
    ("error", "status", "ended"),
    [
        (Interrupted("at step 3", signal.SIGTERM), "KILLED", "Interrupted: at step 3"),
        pytest.param(DivergedError("loss nan\nat step 3"), "FAILED", "DivergedError: loss nan", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_a_signal_or_an_error_ends_says_so_and_has_all_its_rows(  # C1
    error: Exception, status: str, ended: str, store: Store, journal: Journal, identity: dict
):
    def train() -> None:
        with Recorder(root_of(store), journal.folder, identity, {}):
            append_steps(journal, 0, 3)
            raise error

    with pytest.raises(type(error)):
        train()  # after a signal it waits a second at most, and the recorder continues by itself
    assert wait_until((journal.folder / RUN_ID).is_file, PATIENCE_S)
    assert wait_until(lambda: store.client.get_run(noted_id(journal)).info.status == status, PATIENCE_S)
    assert store.client.get_run(noted_id(journal)).data.tags["ended"] == ended
    assert_holds_just_the_journal(store, noted_id(journal), journal.folder)


@pytest.mark.fault
@pytest.mark.parametrize("recorder_too", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_after_a_kill_the_same_run_goes_on_with_each_row_once(  # C1, C2
    recorder_too: bool, store: Store, tmp_path: Path
):
    write_json(make_folder(folder := tmp_path / "run") / "identity.json", identity := an_identity())
    process = python(
        """if True:
        import sys, time
        from pathlib import Path
        from fixtures_mlflow import append_steps
        from pipeline.system.files import read_json
        from pipeline.tracking.journal import Journal
        from pipeline.tracking.recorder import Recorder
        root, folder = map(Path, sys.argv[1:])
        journal = Journal(folder)
        with Recorder(root, folder, read_json(folder / "identity.json"), {}, tick_s=0.05):
            for step in range(100_000):
                append_steps(journal, step, step + 1)
                time.sleep(0.01)
        """,
        root_of(store),
        folder,
    )

    def found() -> tuple[str, str, int]:
        """Id, status and number of steps of the one run there is."""
        (run,) = runs_of(store, identity["fingerprint"])
        return run.info.run_id, run.info.status, len(logged_steps(store, run.info.run_id))

    try:
        assert wait_until(lambda: runs_of(store, identity["fingerprint"]) and found()[2] >= 5, PATIENCE_S)
    finally:
        for to_remove in (*(psutil.Process(process.pid).children() if recorder_too else ()), process):
            to_remove.kill()
        process.wait()
    if not recorder_too:
        assert wait_until(
            lambda: runs_of(store, identity["fingerprint"])[0].info.status == "KILLED", 60
        )  # by the other
    before, journal = found(), Journal(folder)
    steps = len(journal.records)
    if recorder_too:
        assert before[1] == "RUNNING"  # nobody was left to close it
    else:
        assert before[2] == steps
    with recording(root_of(store), folder, identity):
        append_steps(journal, steps // 2, steps + 100)  # the last checkpoint is older than the last row
    assert found() == (before[0], "FINISHED", steps + 100)
    assert_holds_just_the_journal(store, before[0], folder)


@pytest.mark.fault
def test_a_run_that_lost_its_folders_note_or_was_deleted_is_closed_and_replaced(store, journal, identity):
    for spoil in (lambda: (journal.folder / RUN_ID).unlink(), lambda: store.client.delete_run(noted_id(journal))):
        with recording(root_of(store), journal.folder, identity):
            pass
        store.client.update_run(before := noted_id(journal), status="RUNNING")
        spoil()
        with recording(root_of(store), journal.folder, identity):
            pass
        assert noted_id(journal) != before
        assert "RUNNING" not in {run.info.status for run in runs_of(store, identity["fingerprint"])}


class Gate:
    """A way to a server, for which whoever comes in has to wait while it is stalled, and which can be shut."""

    def __init__(self, port: int) -> None:
        self._target, self._way = port, threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.open()

    def open(self) -> None:
        """Let all through, also what has waited."""
        if self._listener.fileno() < 0:
            self._listener = socket.create_server(("127.0.0.1", self.port))
        self._way.set()
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stall(self) -> None:
        self._way.clear()

    def shut(self) -> None:
        """Refuse connections, and end those that there are as soon as they are used."""
        self._way.clear()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client = listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self._target))
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError), source, sink:
            while data := source.recv(1 << 16):
                while not self._way.wait(0.05):
                    if self._listener.fileno() < 0:
                        return
                sink.sendall(data)


@pytest.fixture(scope="module")
def tracking_server(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of MLflow's own server of the session's store."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("tracking server")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store.uri, "--host", "127.0.0.1"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--workers", "1"], cwd=folder, stdout=log, stderr=log, process_group=0
        )

    def answers() -> bool:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
        assert server.poll() is None, (folder / "log").read_text()
        return False

    try:
        assert wait_until(answers, PATIENCE_S), (folder / "log").read_text()
        yield port
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(30)


def ships_once_it_can(store, journal, identity, capfd, root: Path, fail, repair) -> None:
    """Train while the store fails and is repaired: training continues, one warning, and all rows arrive, once each."""
    fingerprint = identity["fingerprint"]

    def shipped_steps() -> int:
        runs = runs_of(store, fingerprint)
        return len(logged_steps(store, runs[0].info.run_id)) if runs else 0

    with recorder_of(root, journal.folder, identity, capfd) as told:
        append_steps(journal, 0, 50)
        assert wait_until(lambda: shipped_steps() == 50, PATIENCE_S)
        fail()
        append_steps(journal, 50, 400)
        assert wait_until(lambda: has_warned(told, capfd), PATIENCE_S)
        repair()
        append_steps(journal, 400, 410)
        assert wait_until(lambda: shipped_steps() == 410, PATIENCE_S)
    (line,) = [line for line in told if line.startswith("warning")]
    assert line.startswith("warning: MLflow fails (")
    assert store.client.get_run(noted_id(journal)).info.status == "FINISHED"
    assert_holds_just_the_journal(store, noted_id(journal), journal.folder)


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["shut", "stall"])
def test_a_server_that_is_down_or_slow_in_mid_run_gets_everything_once_it_is_back(  # C3
    fault, store, journal, identity, tracking_server, tmp_path, monkeypatch, capfd
):
    gate = Gate(tracking_server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{gate.port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")  # seconds, of ten, so that the test is short
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    ships_once_it_can(store, journal, identity, capfd, tmp_path, getattr(gate, fault), gate.open)


@pytest.mark.fault
@pytest.mark.slow
def test_a_database_that_is_locked_in_mid_run_gets_everything_once_it_is_free(store, journal, identity, capfd):  # C3
    blocker = sqlite3.connect(store.uri.removeprefix("sqlite:///"), isolation_level=None)
    lock, free = (lambda: blocker.execute("BEGIN EXCLUSIVE")), blocker.rollback
    ships_once_it_can(store, journal, identity, capfd, root_of(store), lock, free)


@pytest.mark.fault
@pytest.mark.slow
def test_a_database_on_a_full_disk_gets_everything_once_there_is_room(store, journal, identity, capfd):  # C3
    database = Path(store.uri.removeprefix("sqlite:///"))

    def limit(size_bytes: int) -> None:
        (recorder,) = (
            child for child in psutil.Process().children() if "pipeline.tracking.recorder" in child.cmdline()
        )
        before = resource.prlimit(recorder.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(recorder.pid, resource.RLIMIT_FSIZE, (size_bytes, before[1]))

    def fill() -> None:
        limit(database.stat().st_size // 2)

    ships_once_it_can(store, journal, identity, capfd, root_of(store), fill, lambda: limit(resource.RLIM_INFINITY))


@pytest.mark.fault
def test_a_store_that_is_down_costs_one_warning_and_register_ships_the_run(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    project = trained_project(tmp_path / "project")
    identity = read_json(project / "models" / "run.json")
    with monkeypatch.context() as down:
        down.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
        down.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with recorder_of(tmp_path, make_folder(tmp_path / "run"), identity, capfd) as told:
            assert wait_until(lambda: has_warned(told, capfd), PATIENCE_S)
    assert [line.split(":")[0] for line in told] == ["warning", "warning"]  # in the run, and at its end
    assert "training continues" in told[0]
    assert "register" in told[1]
    run = ensured(store, project)
    assert (run.info.status, run.data.tags["rebuilt"]) == ("FINISHED", "true")
    assert_holds_just_the_journal(store, run.info.run_id, project / "models")


@pytest.mark.fault
def test_a_store_that_fails_in_mid_run_gets_everything_once_it_is_back(store, journal, identity, monkeypatch, capfd):
    broken, failed, arrived = threading.Event(), threading.Semaphore(0), threading.Event()
    log_batch = type(store.client).log_batch

    def failing(*arguments, **named):
        if broken.is_set():
            failed.release()
            raise OSError("disk full\nand more")
        log_batch(*arguments, **named)
        arrived.set()

    monkeypatch.setattr(type(store.client), "log_batch", failing)
    with recording(root_of(store), journal.folder, identity):
        append_steps(journal, 0, 5)
        assert arrived.wait(PATIENCE_S)
        broken.set()
        append_steps(journal, 5, 250)
        assert all(failed.acquire(timeout=PATIENCE_S) for _ in range(3))  # more than one failure, and one warning
        broken.clear()
        append_steps(journal, 250, 260)
    assert capfd.readouterr().err.splitlines() == ["warning: MLflow fails (disk full): training continues"]
    assert_holds_just_the_journal(store, noted_id(journal), journal.folder)


@pytest.mark.fault
def test_four_processes_start_on_a_fresh_store_at_once(tmp_path: Path):
    folders = [make_folder(tmp_path / f"run{i}") for i in range(4)]
    for folder in folders:
        write_json(folder / "identity.json", an_identity())
    code = """if True:
        import os, sys, time
        from pathlib import Path
        import mlflow.store.tracking.sqlalchemy_store  # once, for it takes seconds; it opens nothing
        from mlflow import MlflowClient
        from fixtures_mlflow import append_steps, assert_holds_just_the_journal, recording
        from pipeline.system.files import read_json
        from pipeline.tracking.journal import Journal
        from pipeline.tracking.mlflow_tracker import RUN_ID
        from pipeline.tracking.mlflow_store import open_store
        root, *folders = map(Path, sys.argv[1:])
        create = MlflowClient.create_experiment
        MlflowClient.create_experiment = lambda *names: time.sleep(0.3) or create(*names)  # all four get there
        wait, go = os.pipe()
        for folder in folders:
            if os.fork() == 0:
                os.close(go)
                os.read(wait, 1)
                store = open_store(root)  # where the recorder would try again
                journal = Journal(folder)
                with recording(root, folder, read_json(folder / "identity.json")):
                    append_steps(journal, 0, 150)
                assert_holds_just_the_journal(store, (folder / RUN_ID).read_text().strip(), folder)
                sys.exit(0)
        os.close(go)
        sys.exit(any([os.wait()[1] for _ in folders]))
        """
    assert python(code, tmp_path, *folders).wait(timeout=60) == 0


@pytest.mark.fault
def test_data_that_another_run_logs_at_the_same_moment_is_logged_all_the_same(
    store: Store, identity: dict, monkeypatch
):
    log, runs = MlflowClient.log_inputs, [create_run(store, identity, {}) for _ in range(2)]

    def meet(client: MlflowClient, run_id: str, inputs: list) -> None:
        monkeypatch.setattr(MlflowClient, "log_inputs", log)
        log(client, runs[1], inputs)  # the other one is first
        raise MlflowException("UNIQUE constraint failed: datasets.experiment_id, datasets.name, datasets.digest")

    monkeypatch.setattr(MlflowClient, "log_inputs", meet)
    describe_inputs(store, runs[0], identity)
    noted = [store.client.get_run(run_id).inputs.dataset_inputs for run_id in runs]
    assert [[each.dataset.digest for each in of] for of in noted] == [[identity["data_sha256"][:36]]] * 2


def test_a_run_that_the_store_lacks_is_rebuilt_once_with_its_reports(store: Store, tmp_path: Path):
    project = trained_project(tmp_path / "project")
    run, again = ensured(store, project), ensured(store, project)
    assert run.info.run_id == again.info.run_id
    assert run.info.start_time == 1_700_000_000_007  # the first step's
    assert_holds_just_the_journal(store, run.info.run_id, project / "models")
    assert run.data.metrics["metrics/to_target.corpus.steps"] == 20
    assert len(store.client.get_metric_history(run.info.run_id, "metrics/corpus_loss")) == 1
    assert (Path(run.info.artifact_uri) / "reports" / "figures" / "loss.png").read_bytes() == b"a picture"


def test_a_training_that_was_repeated_is_a_run_of_its_own(store: Store, tmp_path: Path):
    project = trained_project(tmp_path / "project")
    first = ensured(store, project)
    times = project / "models" / TIMES
    times.write_text(times.read_text().replace('"logged_ms": 17', '"logged_ms": 18'))
    assert ensured(store, project).info.run_id != first.info.run_id


def test_the_command_line_learns_which_run_made_a_model(store: Store, tmp_path: Path):
    run = ensured(store, trained_project(tmp_path / "project"))
    found = describe_run(root_of(store), run.data.tags["fingerprint"])
    assert (found["run_id"], found["status"], found["steps"]) == (run.info.run_id, "FINISHED", 20)
    assert run.info.run_id in found["link"]
    with pytest.raises(ModelMissing, match="register"):
        describe_run(root_of(store), "0" * 16)


def test_the_tail_returns_whole_pairs_of_rows_only(journal: Journal):
    append_steps(journal, 0, 3)
    tail = JournalTail(journal.folder)
    with (journal.folder / STEPS).open("a") as file:
        file.write('{"step": 4, "tokens": 32, "loss": 1.0}\n{"step": 5, "tok')
    assert [row["step"] for row in tail.read()] == [1, 2, 3]
    assert tail.read() == []
    with (journal.folder / TIMES).open("a") as file:
        file.write('{"step": 4, "step_s": 0.5, "logged_ms": 1}\n')
    assert [row["tokens_per_s"] for row in tail.read()] == [16.0]


def test_store_and_checkpoints_are_the_repositorys_own_within_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert project_root() == tmp_path
    monkeypatch.setenv("DVC_ROOT", "/elsewhere")
    assert project_root() == Path("/elsewhere")
    assert store_uri(project_root()) == "sqlite:////elsewhere/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///shared/runs.db")
    assert store_uri(project_root()) == "sqlite:////elsewhere/shared/runs.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert store_uri(project_root()) == "https://mlflow.example"


def test_neither_the_recorder_nor_the_registry_imports_torch_or_mlflow_before_it_needs_them():
    modules = "pipeline.tracking.recorder, pipeline.registry.promotion, pipeline.registry.register"
    code = f"import sys, {modules}; sys.exit(not sys.modules.keys().isdisjoint(['mlflow', 'torch']))"
    assert python(code).wait() == 0
