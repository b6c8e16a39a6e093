"""Runs in a real MLflow store: what they contain, and how they end, are replaced or are created from a journal."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
from fixtures_mlflow import (
    STARTED_MS,
    an_identity,
    append_steps,
    assert_has_exactly_the_journal,
    recording,
    root_of,
    run_id_of,
    trained_project,
)
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.system.errors import Interrupted, ModelMissing
from pipeline.system.files import read_json, write_text
from pipeline.tracking.descriptions import Result
from pipeline.tracking.journal import TIMES, Journal, StepRecord
from pipeline.tracking.mlflow_runs import (
    NOTE,
    JournalTail,
    create_run,
    describe_inputs,
    describe_run,
    ensure_run,
    report_numbers,
    runs_of,
)
from pipeline.tracking.mlflow_tracker import RUN_ID
from pipeline.tracking.recorder import Recorder
from tests.waiting import wait_until

DEADLINE_S = 240  # for a recorder's process on a loaded machine


@pytest.fixture(autouse=True)
def _nearly_normal_priority(monkeypatch):
    """At the lowest priority, a recorder beside busy cores would take minutes."""
    set_priority = os.setpriority
    monkeypatch.setattr(os, "setpriority", lambda which, pid, _: set_priority(which, pid, 1))


@pytest.fixture
def folder(tmp_path):
    (folder := tmp_path / "run").mkdir()
    return folder


@dataclass
class WithToy(StepRecord):
    """A record with one more metric."""

    toy: float | None = None


@pytest.fixture
def _part_of_a_gpu(monkeypatch):
    """A GPU that has no utilization, as MIG; all that NVML says of it."""
    answers = {"Init": None, "DeviceGetCount": 1, "DeviceGetHandleByIndex": 0}
    answers["DeviceGetMemoryInfo"] = SimpleNamespace(used=1e9, total=2e9)
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, f"nvml{name}", lambda *_, answer=answer: answer)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", raising(pynvml.NVMLError(3)))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", raising(pynvml.NVMLError(3)))


def raising(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.usefixtures("_part_of_a_gpu")
def test_a_run_has_its_records_samples_parameters_data_and_machine(store, folder, capfd):
    identity, journal = an_identity(), Journal(folder)
    with recording(root_of(store), folder, identity, Result(5 / 60, 61, 488, True)):
        append_steps(journal, 0, 60)  # more than one batch
        journal.append(WithToy(**vars(journal.records[-1]) | {"step": 61, "tokens": 8 * 61}, toy=2.5))
        write_text(folder / "samples" / "step-000020.txt", "ROMEO: O")
    run = store.client.get_run(run_id_of(folder))
    assert (run.info.status, run.info.start_time) == ("FINISHED", STARTED_MS)
    assert run.info.run_name == "text dddddddd 0.0833 in 61 steps"
    assert "from scratch on a text" in run.data.tags[NOTE]
    assert run.data.params == {"optim.lr": "0.002", "optim.betas": "[0.9, 0.95]", "windows.seq_len": "8"}
    assert run.data.tags["fingerprint"] == identity["fingerprint"]
    assert run.data.tags["environment.precision"] == "fp32"
    assert {"git_commit", "tree_clean", "host", "run_folder"} <= run.data.tags.keys()
    assert run.inputs.dataset_inputs[0].dataset.digest == identity["data_sha256"][:36]
    usage = {"system/cpu_utilization_percentage", "system/gpu_0_memory_usage_megabytes"}
    assert {*usage, "toy"} <= run.data.metrics.keys()
    assert capfd.readouterr().err.count("collect GPU utilization metrics") == 1
    assert_has_exactly_the_journal(store, folder)
    artifacts = Path(run.info.artifact_uri)
    assert artifacts.is_relative_to(root_of(store) / "mlruns")
    assert (artifacts / "samples" / "step-000020.txt").read_text() == "ROMEO: O"
    assert "python" in read_json(artifacts / "environment.json")


def test_a_run_is_resumed_and_replaced_if_its_id_was_lost_or_it_was_deleted(store, folder):
    identity, ids = an_identity(), []
    append_steps(Journal(folder), 0, 3)
    keep, lose_id = (lambda: None), (folder / RUN_ID).unlink
    for lose in (keep, lose_id, lambda: store.client.delete_run(ids[-1]), keep):
        with recording(root_of(store), folder, identity):
            pass
        ids.append(run_id_of(folder))
        store.client.update_run(ids[-1], status="RUNNING")  # as a kill leaves it
        lose()
    resumed, again, replaced, last = ids
    assert resumed == again
    statuses = {run.info.run_id: run.info.status for run in runs_of(store, identity["fingerprint"])}
    assert statuses == {resumed: "KILLED", last: "RUNNING"}
    assert replaced not in (resumed, last)


@pytest.mark.parametrize("ended", ["killed", "Interrupted: at step 3"])
def test_a_recorder_sends_the_rest_of_a_training_that_was_stopped(ended, store, folder):  # C1
    opened = Recorder(root_of(store))
    recording = opened.recording(folder, an_identity(), {})
    recording.__enter__()
    append_steps(Journal(folder), 0, 3)
    if ended == "killed":
        opened._process.stdin.close()  # as the system does for a killed process, which tells no end
        opened._end = lambda *_: None
    else:
        recording.__exit__(Interrupted, Interrupted("at step 3", signal.SIGTERM), None)  # waits ten seconds at most
    assert wait_until((folder / RUN_ID).is_file, DEADLINE_S)
    assert wait_until(lambda: store.client.get_run(run_id_of(folder)).info.status == "KILLED", DEADLINE_S)
    assert store.client.get_run(run_id_of(folder)).data.tags["ended"] == ended
    assert_has_exactly_the_journal(store, folder)


def test_a_store_that_is_down_causes_a_warning_in_the_run_and_one_at_its_end(folder, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # no server
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    printed = []

    def has_warned():
        printed.extend(capfd.readouterr().err.splitlines())
        return printed

    with Recorder(folder.parent, tick_s=0.05) as opened, opened.recording(folder, an_identity(), {}):
        assert wait_until(has_warned, DEADLINE_S)
    has_warned()
    assert [line.split("(")[0] for line in printed[:-1]] == ["warning: MLflow fails "]
    assert printed[-1] == "warning: MLflow lacks a part of the run: `python -m pipeline doctor --fix` sends it"


def test_a_run_that_the_store_lacks_is_created_once_from_its_journal_and_reports(store, tmp_path):
    project = trained_project(tmp_path / "project")
    identity = read_json(project / "models" / "run.json")
    run, again = ensure_run(store, project, identity, None), ensure_run(store, project, identity, None)
    assert run.info.run_id == again.info.run_id
    assert (run.info.status, run.data.tags["rebuilt"]) == ("FINISHED", "true")
    first = JournalTail(project / "models").read()[0]
    assert run.info.start_time == first["logged_ms"] - 1000 * first["wall_s"]  # before the first step
    assert_has_exactly_the_journal(store, project / "models", run.info.run_id)
    assert report_numbers(run)["to_target.sliding.steps"] == 20
    assert not any("/" in key for key in run.data.metrics)  # no metric, and so no chart, of one value
    assert (Path(run.info.artifact_uri) / "reports" / "figures" / "loss.png").read_bytes() == b"a picture"

    found = describe_run(root_of(store), identity["fingerprint"])
    assert (found["run_id"], found["status"], found["steps"]) == (run.info.run_id, "FINISHED", 20)
    assert run.info.run_id in found["link"]
    with pytest.raises(ModelMissing, match="register"):
        describe_run(root_of(store), "0" * 16)

    times = project / "models" / TIMES  # those of a repeated training
    times.write_text(times.read_text().replace('"logged_ms": 17', '"logged_ms": 18'))
    assert ensure_run(store, project, identity, None).info.run_id != run.info.run_id


def test_a_dataset_that_another_run_logs_at_the_same_moment_is_logged_too(store, monkeypatch):
    identity = an_identity()
    log, runs = MlflowClient.log_inputs, [create_run(store, identity, {}) for _ in range(2)]

    def log_second(client, run_id, inputs):
        monkeypatch.setattr(MlflowClient, "log_inputs", log)
        log(client, runs[1], inputs)  # the other run is first
        raise MlflowException("UNIQUE constraint failed: datasets.experiment_id, datasets.name, datasets.digest")

    monkeypatch.setattr(MlflowClient, "log_inputs", log_second)
    describe_inputs(store, runs[0], identity)
    logged = [store.client.get_run(run_id).inputs.dataset_inputs for run_id in runs]
    assert [[each.dataset.digest for each in inputs] for inputs in logged] == [[identity["data_sha256"][:36]]] * 2


def test_the_recorder_and_the_registry_import_neither_torch_nor_mlflow():
    modules = "pipeline.tracking.recorder, pipeline.registry.promotion, pipeline.registry.register"
    code = f"import sys, {modules}; sys.exit(not sys.modules.keys().isdisjoint(['mlflow', 'torch']))"
    assert subprocess.run([sys.executable, "-c", code], timeout=DEADLINE_S).returncode == 0
