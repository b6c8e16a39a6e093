"""Runs left RUNNING by the dead, and rows that a store missed: settled once, and never while somebody is at it."""

import os
import shutil
import socket
from functools import partial
from uuid import uuid4

import pytest
from fixtures_mlflow import (
    an_identity,
    append_steps,
    assert_holds_just_the_journal,
    recording,
    root_of,
)

from pipeline.ops.stale_runs import examine_journals, examine_running, run_holder
from pipeline.sweep.mlflow_run import open_study_run
from pipeline.system.errors import Interrupted, RunLocked
from pipeline.system.files import locked, write_json, write_text
from pipeline.tracking.fingerprint import IDENTITY
from pipeline.tracking.journal import STEPS, TIMES, Journal
from pipeline.tracking.mlflow_tracker import RUN_ID
from pipeline.tracking.recorder import RECORDER_LOCK

PARAMS = {  # of a run of 20 steps of 8 tokens
    "target": {
        "loss": 0.01, "rule": "corpus", "average_steps": 100, "eval_interval": None, "early_stopping_patience": None,
    },
    "windows": {"seq_len": 8, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "order": "shuffled"},
    "optim": {
        "name": "adamw", "lr": 0.002, "muon_lr": 0.02, "momentum": 0.95, "betas": [0.9, 0.95], "eps": 1e-8,
        "weight_decay": 0.0, "max_grad_norm": 1.0, "max_tokens": 160, "schedule": "constant", "warmup": 0.0,
        "decay": 0.0, "initial_lr": 0.0, "min_lr_ratio": 0.0,
    },
}  # fmt: skip


@pytest.fixture
def root(tmp_path):
    return tmp_path / "project"


@pytest.fixture
def run_folder(root):
    """Makes the folder of a run that has taken so many steps; no store has heard of it."""

    def make(steps=12, name=None, params=PARAMS):
        identity = an_identity() | {"params": params}
        folder = root / "checkpoints" / (name or identity["fingerprint"])
        folder.mkdir(parents=True)
        write_json(folder / IDENTITY, identity)
        journal = Journal(folder)
        append_steps(journal, 0, steps)
        journal.close()
        return folder, identity

    return make


def recorded(store, folder, identity, error=None):
    """Have the store record what the folder has; return the run's id."""
    with recording(root_of(store), folder, identity, error):
        pass
    return (folder / RUN_ID).read_text().strip()


def left_running(store, folder, identity):
    """A run whose process and recorder were killed."""
    run_id = recorded(store, folder, identity)
    store.client.update_run(run_id, status="RUNNING")
    store.client.delete_tag(run_id, "ended")
    return run_id


def about(findings, name):
    return [finding for finding in findings if name in finding.what]


def grow(folder, start, stop):
    journal = Journal(folder)
    append_steps(journal, start, stop)
    journal.close()


# -- runs left RUNNING


@pytest.fixture
def short_pages(store, monkeypatch):
    """The store finds one thing at a time, as a large one finds a thousand."""
    monkeypatch.setattr(store.client, "search_runs", partial(store.client.search_runs, max_results=1))


@pytest.mark.fault
def test_the_run_of_a_dead_process_is_closed_as_killed_when_its_last_row_was_logged(store, root, run_folder):  # C1
    folder, identity = run_folder()
    run_id = left_running(store, folder, identity)
    (finding,) = about(examine_running(store, root), run_id)
    assert finding.mark == "to fix"
    finding.fix()
    run = store.client.get_run(run_id)
    assert (run.info.status, run.data.tags["ended"]) == ("KILLED", "killed")
    assert run.info.end_time == 1_700_000_000_000 + 7 * 12  # of the last of its rows, not of today
    assert not about(examine_running(store, root), run_id)


@pytest.mark.fault
@pytest.mark.parametrize("which", ["run", "recorder"])
def test_a_run_that_somebody_is_at_is_left_alone_also_by_a_fix_that_comes_late(store, root, run_folder, which):
    folder, identity = run_folder()
    run_id = left_running(store, folder, identity)
    (late,) = about(examine_running(store, root), run_id)
    with locked(folder.with_suffix(".lock") if which == "run" else folder / RECORDER_LOCK):
        (finding,) = about(examine_running(store, root), run_id)
        assert finding.mark == "ok"
        with pytest.raises(RunLocked):
            late.fix()
    assert store.client.get_run(run_id).info.status == "RUNNING"


@pytest.mark.parametrize(("tag", "value"), [("host", "elsewhere"), ("run_folder", None)])
def test_of_a_run_of_unknown_whereabouts_nothing_is_claimed(store, root, run_folder, tag, value):
    folder, identity = run_folder()
    run_id = left_running(store, folder, identity)
    store.client.set_tag(run_id, tag, value) if value else store.client.delete_tag(run_id, tag)
    (finding,) = about(examine_running(store, root), run_id)
    assert finding.mark == "note"
    assert "on another machine as far as can be told" in finding.what


@pytest.mark.fault
def test_every_run_left_running_is_found(store, root, run_folder, short_pages):
    for name in left_running(store, *run_folder()), left_running(store, *run_folder()):
        assert about(examine_running(store, root), name)


@pytest.mark.fault
def test_a_run_whose_folder_is_gone_is_closed(store, root, run_folder):
    folder, identity = run_folder()
    run_id = left_running(store, folder, identity)
    shutil.rmtree(folder)
    (finding,) = about(examine_running(store, root), run_id)
    finding.fix()
    assert store.client.get_run(run_id).info.status == "KILLED"
    assert not folder.exists()
    assert not folder.with_suffix(".lock").exists()


@pytest.mark.fault
def test_a_studys_run_is_closed_once_its_sweep_is_dead(store):  # D2
    study = f"study-{uuid4().hex[:8]}"
    run_id = open_study_run(store, None, study, {})
    root = root_of(store)
    with locked(root / "checkpoints" / f"{study}.lock"):
        (finding,) = about(examine_running(store, root), study)
        assert finding.mark == "ok"
    (finding,) = about(examine_running(store, root), study)
    finding.fix()
    assert store.client.get_run(run_id).info.status == "KILLED"


def test_a_studys_run_in_a_store_that_others_share_cannot_be_told(store, root):
    study = f"study-{uuid4().hex[:8]}"
    run_id = open_study_run(store, None, study, {})
    (finding,) = about(examine_running(store, root), study)  # whose own store is another
    assert finding.mark == "note"
    store.client.set_terminated(run_id)


# -- rows that the store lacks


@pytest.mark.fault
@pytest.mark.parametrize("error", [None, Interrupted("SIGTERM", 15)])
def test_rows_that_a_dead_recorder_did_not_send_are_sent_once_and_the_status_stays(
    store, root, run_folder, error
):  # C3
    folder, identity = run_folder(steps=12)
    run_id = recorded(store, folder, identity, error)
    before = store.client.get_run(run_id).info
    grow(folder, 12, 19)
    (finding,) = about(examine_journals(store, root), folder.name)
    assert "lacks 7 of the 19 steps" in finding.what
    finding.fix()
    assert_holds_just_the_journal(store, run_id, folder)
    after = store.client.get_run(run_id)
    assert (after.info.status, after.info.end_time) == (before.status, before.end_time)
    (finding,) = examine_journals(store, root)
    assert (finding.mark, "19 steps" in finding.what) == ("ok", True)


@pytest.mark.fault
@pytest.mark.parametrize(("steps", "status"), [(12, "KILLED"), (20, "FINISHED")])
def test_a_run_that_no_store_heard_of_is_made_from_its_journal(store, root, run_folder, steps, status):
    folder, _ = run_folder(steps)
    write_text(folder / "samples" / "step-000010.txt", "ROMEO")
    (finding,) = about(examine_journals(store, root), folder.name)
    assert f"lacks {steps} of the {steps} steps" in finding.what
    assert not (folder / RUN_ID).exists()
    finding.fix()
    run_id = (folder / RUN_ID).read_text().strip()
    assert_holds_just_the_journal(store, run_id, folder)
    run = store.client.get_run(run_id)
    assert run.info.status == status
    assert (run.info.start_time, run.info.end_time) == (1_700_000_000_007, 1_700_000_000_000 + 7 * steps)
    assert (run.data.tags["rebuilt"], run.data.tags["host"]) == ("true", socket.gethostname())
    assert [file.path for file in store.client.list_artifacts(run_id, "samples")] == ["samples/step-000010.txt"]
    (finding,) = examine_journals(store, root)
    assert finding.mark == "ok"


def test_a_run_of_params_that_this_code_does_not_know_is_killed_rather_than_finished(store, root, run_folder):
    folder, _ = run_folder(params={"optim": {"lr": 1}})
    (finding,) = about(examine_journals(store, root), folder.name)
    finding.fix()
    assert store.client.get_run((folder / RUN_ID).read_text().strip()).info.status == "KILLED"


def test_a_trial_that_no_store_heard_of_names_its_study(store, root, run_folder):
    folder, _ = run_folder(name="search/0f")
    (finding,) = about(examine_journals(store, root), "search/0f")
    finding.fix()
    assert store.client.get_run((folder / RUN_ID).read_text().strip()).data.tags["study"] == "search"


@pytest.mark.fault
def test_a_run_that_is_rebuilt_already_is_not_made_twice(store, root, run_folder):
    folder, identity = run_folder()
    run_id = recorded(store, folder, identity)
    (folder / RUN_ID).unlink()
    (finding,) = examine_journals(store, root)
    assert finding.mark == "ok"
    grow(folder, 12, 14)
    (finding,) = about(examine_journals(store, root), folder.name)
    finding.fix()
    assert_holds_just_the_journal(store, run_id, folder)


def test_a_run_that_a_user_deleted_stays_deleted(store, root, run_folder):
    folder, identity = run_folder()
    run_id = recorded(store, folder, identity)
    grow(folder, 12, 14)
    store.client.delete_run(run_id)
    (finding,) = examine_journals(store, root)
    assert finding.mark == "ok"


@pytest.mark.fault
def test_a_run_that_is_being_trained_is_left_to_its_recorder(store, root, run_folder):
    folder, _ = run_folder()
    (late,) = about(examine_journals(store, root), folder.name)
    with locked(folder.with_suffix(".lock")):
        found = about(examine_journals(store, root), folder.name)
        assert [finding.mark for finding in found] == ["ok"]
        with pytest.raises(RunLocked):
            late.fix()
    assert not (folder / RUN_ID).exists()


@pytest.mark.fault
def test_a_store_that_fails_again_while_rows_are_sent_leaves_no_second_run(store, root, run_folder, monkeypatch):
    folder, identity = run_folder()
    (finding,) = about(examine_journals(store, root), folder.name)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.ops.stale_runs.log_records", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            finding.fix()
    (finding,) = about(examine_journals(store, root), folder.name)
    finding.fix()
    found = store.client.search_runs([store.experiment_id], f"tags.fingerprint = '{identity['fingerprint']}'")
    assert [run.info.run_id for run in found] == [(folder / RUN_ID).read_text().strip()]
    assert found[0].info.status == "KILLED"
    assert_holds_just_the_journal(store, found[0].info.run_id, folder)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "text"), [(IDENTITY, "{"), (IDENTITY, "[]"), (STEPS, "\0\0\n"), (TIMES, '{"step": 1}\n')]
)
def test_a_folder_whose_files_cannot_be_read_is_named_and_the_others_are_looked_at(store, root, run_folder, name, text):
    folder, _ = run_folder(name="a")
    run_folder(name="b")
    (folder / name).write_text(text)
    unreadable, unsent = examine_journals(store, root)
    assert (unreadable.mark, unreadable.fix) == ("to fix", None)
    assert "checkpoints/a cannot be read" in unreadable.what
    assert "lacks 12 of the 12 steps of checkpoints/b" in unsent.what


@pytest.mark.fault
def test_two_that_fix_the_same_folder_one_after_the_other_make_one_run(store, root, run_folder):
    folder, identity = run_folder()
    first, second = (about(examine_journals(store, root), folder.name)[0] for _ in range(2))
    first.fix()
    second.fix()
    assert len(store.client.search_runs([store.experiment_id], f"tags.fingerprint = '{identity['fingerprint']}'")) == 1


def test_looking_changes_nothing(store, root, run_folder):
    run_folder()
    n_runs = len(store.client.search_runs([store.experiment_id]))
    before = {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}
    assert [*examine_journals(store, root), *examine_running(store, root)]
    assert {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))} == before
    assert len(store.client.search_runs([store.experiment_id])) == n_runs


def test_who_holds_a_lock_is_told_without_making_or_changing_one(tmp_path):
    assert run_holder(tmp_path / "x") is None
    assert not [*tmp_path.glob("x*")]
    with locked(tmp_path / "x.lock"):
        assert run_holder(tmp_path / "x") == f"process {os.getpid()}"
    (tmp_path / "x.lock").write_text("123")
    assert run_holder(tmp_path / "x") is None
    assert (tmp_path / "x.lock").read_text() == "123"
