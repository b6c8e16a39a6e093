"""The doctor closes runs of ended processes and sends records that the store lacks, except of runs in use."""

import os
import re
import shutil
import socket
from functools import partial
from types import SimpleNamespace as Namespace
from uuid import uuid4

import pytest
from fixtures_mlflow import an_identity, append_steps, assert_has_exactly_the_journal, root_of, run_id_of

from pipeline.ops import stale_runs
from pipeline.ops.stale_runs import examine_journals, examine_running
from pipeline.sweep.mlflow_run import open_study_run
from pipeline.system.errors import RunLocked
from pipeline.system.files import locked, read_json, write_json, write_text
from pipeline.tracking.fingerprint import IDENTITY
from pipeline.tracking.journal import STEPS, TIMES, Journal
from pipeline.tracking.mlflow_runs import JournalTail, create_run, log_records, runs_of
from pipeline.tracking.mlflow_tracker import RUN_ID
from pipeline.tracking.recorder import RECORDER_LOCK
from tests.studies import sweep_config

START_MS = 1_700_000_000_000


@pytest.fixture
def root(tmp_path):
    return tmp_path / "project"


@pytest.fixture
def make(store, root):
    """Makes the folder of a run of some steps; it is finished if the last one has both losses of the whole text, as
    every tenth has. The store has `logged` of the steps, or no such run."""

    def make_run(steps=12, logged=0, name=None, status="RUNNING"):
        identity = an_identity()
        folder = root / "checkpoints" / (name or identity["fingerprint"])
        folder.mkdir(parents=True)
        write_json(folder / IDENTITY, identity)
        append_steps(Journal(folder), 0, steps)
        if logged:
            tags = {"host": socket.gethostname(), "run_folder": str(folder)}
            write_text(folder / RUN_ID, run_id := create_run(store, identity, tags))
            log_records(store, run_id, JournalTail(folder).read()[:logged])
            if status != "RUNNING":
                store.client.set_terminated(run_id, status)
        return folder

    return make_run


def running(store, root):
    """The findings about runs that are RUNNING, by the runs' ids."""
    found = [(re.search(r"\((\w{32})\)", finding.what), finding) for finding in examine_running(store, root)]
    return {match[1]: finding for match, finding in found if match}


def test_runs_left_running_are_closed_unless_a_process_may_still_have_them(store, root, make, monkeypatch):  # C1, D2
    monkeypatch.setattr(store.client, "search_runs", partial(store.client.search_runs, max_results=1))  # many pages
    folders = [make(logged=12) for _ in range(5)]
    ended, removed, trained, elsewhere, unplaced = map(run_id_of, folders)
    (lock := folders[0].with_suffix(".lock")).write_text("123")
    shutil.rmtree(folders[1])
    store.client.set_tag(elsewhere, "host", "elsewhere")
    store.client.delete_tag(unplaced, "run_folder")
    name = f"study-{uuid4().hex[:8]}"
    study = open_study_run(store, None, sweep_config(study=name), {})
    study_lock = root_of(store) / "checkpoints" / f"{name}.lock"

    before = running(store, root_of(store))
    assert lock.read_text() == "123"
    for held in (folders[2].with_suffix(".lock"), folders[2] / RECORDER_LOCK):
        with locked(held), locked(study_lock):
            found = running(store, root_of(store))
            for run_id in (trained, study):
                assert (found[run_id].mark, f"process {os.getpid()}" in found[run_id].what) == ("ok", True)
                with pytest.raises(RunLocked):
                    before[run_id].fix()  # found before the process had the lock
                assert store.client.get_run(run_id).info.status == "RUNNING"
    assert running(store, root)[study].mark == "note"  # this project has another store
    with monkeypatch.context() as patch:  # the sweep was interrupted, its job on Slurm still runs
        patch.setattr("pipeline.cluster.jobs.find_live", {f"study-{name}": Namespace(id="7")}.get)
        found = running(store, root_of(store))
        assert [finding.mark for finding in found.values() if "is RUNNING in job 7" in finding.what] == ["ok"]
        assert found[study].mark == "ok"
    for run_id in (elsewhere, unplaced):
        assert (found[run_id].mark, found[run_id].fix) == ("note", None)
        store.client.set_terminated(run_id)

    for run_id in (ended, removed, study):
        assert before[run_id].mark == "to fix"
        before[run_id].fix()
        run = store.client.get_run(run_id)
        assert (run.info.status, run.data.tags["ended"]) == ("KILLED", "killed")
    assert store.client.get_run(ended).info.end_time == START_MS + 7 * 12  # its last record's time
    assert not folders[1].exists()
    assert not folders[1].with_suffix(".lock").exists()
    assert not {ended, removed, study} & running(store, root_of(store)).keys()


def lacking(store, root):
    """The findings about journals, by their folders."""
    found = {finding.what.split("checkpoints/")[1].split()[0]: finding for finding in examine_journals(store, root)}
    return {root / "checkpoints" / name: finding for name, finding in found.items()}


def test_records_that_the_store_lacks_are_sent_to_their_run_or_to_a_new_one(store, root, make, monkeypatch):  # C3
    make(logged=12)  # complete
    store.client.delete_run(run_id_of(make(logged=10)))  # by a user
    killed, finished = make(19, logged=12, status="KILLED"), make(20, logged=12, status="FINISHED")
    unnoted = make(14, logged=12)  # the folder has lost the run's id
    unnoted_id = run_id_of(unnoted)
    (unnoted / RUN_ID).unlink()
    unknown, unknown_finished, trial = make(), make(60), make(name="search/0f")
    write_text(unknown / "samples" / "step-000010.txt", "ROMEO")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(stale_runs, "log_records", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        lacking(store, root)[unknown].fix()
    ended = {folder: store.client.get_run(run_id_of(folder)).info.end_time for folder in (killed, finished)}

    found = lacking(store, root)
    expected = {
        killed: (7, 19, "KILLED"),
        finished: (8, 20, "FINISHED"),
        unnoted: (2, 14, "KILLED"),
        unknown: (12, 12, "KILLED"),
        unknown_finished: (60, 60, "FINISHED"),  # more than one batch
        trial: (12, 12, "KILLED"),
    }
    assert found.keys() == expected.keys()
    for folder, (n_missing, n_steps, status) in expected.items():
        assert f"lacks {n_missing} of the {n_steps} steps" in found[folder].what
        for _ in range(2):  # the second fix, as by another process, changes nothing
            found[folder].fix()
            run_id = unnoted_id if folder is unnoted else run_id_of(folder)
            runs = runs_of(store, read_json(folder / IDENTITY)["fingerprint"])
            assert [(run.info.run_id, run.info.status) for run in runs] == [(run_id, status)]
            assert_has_exactly_the_journal(store, folder, run_id)
    assert {folder: store.client.get_run(run_id_of(folder)).info.end_time for folder in ended} == ended

    created = store.client.get_run(run_id_of(unknown))
    assert (created.info.start_time, created.info.end_time) == (START_MS + 7 - 600, START_MS + 7 * 12)
    assert (created.data.tags["rebuilt"], created.data.tags["host"]) == ("true", socket.gethostname())
    (sample,) = store.client.list_artifacts(created.info.run_id, "samples")
    assert sample.path == "samples/step-000010.txt"
    assert store.client.get_run(run_id_of(trial)).data.tags["study"] == "search"
    (finding,) = examine_journals(store, root)
    assert finding.mark == "ok"


def test_a_run_in_use_and_folders_that_cannot_be_read_are_left_alone(store, root, make):
    in_use = make()
    late = lacking(store, root)[in_use]
    damages = ((IDENTITY, "{"), (IDENTITY, "[]"), (STEPS, "\0\0\n"), (TIMES, '{"step": 1}\n'))
    for name, (file, text) in zip("abcd", damages, strict=True):
        (make(name=name) / file).write_text(text)
    n_runs, before = len(store.client.search_runs([store.experiment_id])), modified(root)
    with locked(in_use.with_suffix(".lock")):
        found = lacking(store, root)
        assert found[in_use].mark == "ok"
        with pytest.raises(RunLocked):
            late.fix()
    assert not (in_use / RUN_ID).exists()
    for name in "abcd":
        unreadable = found[root / "checkpoints" / name]
        assert (unreadable.mark, unreadable.fix) == ("to fix", None)
        assert f"checkpoints/{name} cannot be read" in unreadable.what
    assert "lacks 12 of the 12 steps" in lacking(store, root)[in_use].what
    in_use.with_suffix(".lock").unlink()
    assert modified(root) == before
    assert len(store.client.search_runs([store.experiment_id])) == n_runs


def modified(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
