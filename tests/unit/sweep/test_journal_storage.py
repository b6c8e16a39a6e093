"""A study in a journal file: leases instead of heartbeats, incomplete and damaged lines, files that are no journal."""

import os

import pytest
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import fail_stale_trials
from optuna.trial import TrialState

from pipeline.sweep import journal_storage
from pipeline.sweep.study import find_study, join_study, latest_trials, open_storage, suggest, translate_storage_errors
from pipeline.system.errors import InputError
from tests.studies import shared_by, sweep_config

SWEEP = sweep_config(storage="journal:///s.journal", heartbeat_timeout_s=60)
STATES = {"state": TrialState.COMPLETE, "values": [1.0]}


@pytest.fixture
def opened(tmp_path):
    """Opens the study as another process does, with a storage of its own."""
    return lambda: join_study(SWEEP, shared_by(SWEEP), open_storage(SWEEP.storage, tmp_path, 60))


def leases(folder):
    return sorted(path.name for path in (folder / "s.journal.leases").iterdir())


def age(lease, seconds):
    """Shift a lease's last heartbeat into the past."""
    renewed_s = lease.stat().st_mtime - seconds
    os.utime(lease, (renewed_s, renewed_s))


def test_a_trial_is_requeued_when_its_lease_is_older_than_the_timeout_and_not_before(tmp_path, opened):  # D1, D3
    study, lease = opened(), tmp_path / "s.journal.leases" / "0"
    values = suggest(trial := study.ask(), SWEEP)
    study._storage.record_heartbeat(trial._trial_id)
    age(lease, 59)
    fail_stale_trials(other := opened())  # as every worker does before a trial
    assert other.trials[0].state is TrialState.RUNNING
    study._storage.record_heartbeat(trial._trial_id)
    age(lease, 59)
    fail_stale_trials(other)
    assert other.trials[0].state is TrialState.RUNNING
    age(lease, 2)
    fail_stale_trials(other)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    fail_stale_trials(study)  # it is queued once
    assert suggest(other.ask(), SWEEP) == values
    assert [trial.number for trial in latest_trials(study)] == [1]
    # The first owner was only slow: its heartbeats and its result change nothing, and leave no lease.
    study._storage.record_heartbeat(trial._trial_id)
    with pytest.raises(UpdateFinishedTrialError):
        study._storage.set_trial_state_values(trial._trial_id, **STATES)
    assert leases(tmp_path) == ["clock"]


def test_a_trial_whose_process_died_before_its_first_heartbeat_is_requeued_too(tmp_path, opened):
    opened().ask()
    fail_stale_trials(study := opened())
    assert study.trials[0].state is TrialState.RUNNING
    age(tmp_path / "s.journal.leases" / "0", 61)
    fail_stale_trials(study)
    assert study.trials[0].state is TrialState.FAIL


def test_a_trial_that_has_ended_has_no_lease(tmp_path, opened):
    study = opened()
    study.optimize(lambda trial: suggest(trial, SWEEP)["optim.lr"], n_trials=2)
    assert leases(tmp_path) == []
    assert [trial.state for trial in opened().trials] == [TrialState.COMPLETE] * 2


@pytest.mark.parametrize("left", [b"{", b'{"op_code":5,"worker_id":"a"}', bytes(10_000)])
def test_an_incomplete_line_of_a_killed_process_is_removed_by_the_next_writer(tmp_path, opened, left):
    study = opened()
    study.set_user_attr("key", 1)
    whole = (tmp_path / "s.journal").read_bytes()
    (tmp_path / "s.journal").write_bytes(whole + left)
    assert opened().user_attrs["key"] == 1
    study.set_user_attr("key", 2)
    assert (tmp_path / "s.journal").read_bytes().startswith(whole + b'{"op_code":')
    assert (study.user_attrs["key"], opened().user_attrs["key"]) == (2, 2)


def test_the_first_line_may_be_incomplete(tmp_path, opened):
    (tmp_path / "s.journal").write_bytes(b'{"op_c')
    opened().set_user_attr("key", 1)
    assert opened().user_attrs["key"] == 1


@pytest.mark.parametrize("content", [b"my notes", b'{"op_codes": 1}\n', b"SQLite format 3\0"])
def test_another_file_is_refused_and_not_changed(tmp_path, opened, content):
    (tmp_path / "s.journal").write_bytes(content)
    with pytest.raises(InputError, match=r"s\.journal is not a journal of studies: name another file"):
        opened()
    assert (tmp_path / "s.journal").read_bytes() == content


def test_a_damaged_line_and_a_lost_file_are_named_in_one_line(tmp_path, opened):
    study, journal = opened(), tmp_path / "s.journal"
    line = journal.read_bytes().splitlines(keepends=True)[0]
    with journal.open("ab") as file:
        file.write(b"{broken}\n" + line)
    before = journal.read_bytes().count(b"\n") - 2
    with pytest.raises(InputError) as error:
        opened()
    said = (
        f"sweep.storage: line {before + 1} of {journal} is damaged (Expecting property name enclosed in double quotes"
    )
    assert str(error.value).startswith(said)
    assert str(error.value).endswith(f"or keep the lines before (`head -n {before}`); or name another file")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=rf"^sweep\.storage: line {before + 1} of "), translate_storage_errors(SWEEP):
        study.set_user_attr("key", 1)  # it has read the lines before
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:before]))
    assert opened().user_attrs == study.user_attrs
    journal.unlink()
    with (
        pytest.raises(InputError, match=r"storage: .*s\.journal: no such file or directory: fix it"),
        translate_storage_errors(SWEEP),
    ):
        study.set_user_attr("key", 1)
    assert not journal.exists()


def test_a_study_on_a_read_only_disk_is_shown_and_not_changed(tmp_path, opened, monkeypatch):
    opened().set_user_attr("key", 1)

    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(journal_storage, "_open_to_append", read_only)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert find_study(SWEEP, tmp_path).user_attrs["key"] == 1
    with pytest.raises(InputError, match=r"s\.journal: read-only file system: fix it"), translate_storage_errors(SWEEP):
        opened()


def test_a_folder_is_refused(tmp_path, opened):
    (tmp_path / "s.journal").mkdir()
    with pytest.raises(
        InputError, match=r"^sweep\.storage: .*s\.journal: is a directory: fix it, or name another file$"
    ):
        opened()


def test_looking_for_a_study_creates_no_journal(tmp_path):
    with pytest.raises(InputError, match=r"no study s in journal:///s\.journal"):
        find_study(SWEEP, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_a_journal_that_others_can_use(tmp_path, opened, monkeypatch):
    study = opened()

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StorageInternalError, match="no space left on device"):
        patch.setattr(os, "fsync", full)
        study.set_user_attr("key", 1)
    opened().set_user_attr("key", 2)
    assert study.user_attrs["key"] == 2


def test_what_a_running_trial_writes_is_synced_with_its_end(tmp_path, opened, monkeypatch):
    study, synced = opened(), []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(file.seek(0, os.SEEK_END)))
    trial = study.ask()
    begun = len(synced)
    trial.suggest_float("lr", 0.1, 0.2)
    trial.set_user_attr("worker", "here")
    trial.report(5.0, 1)
    assert len(synced) == begun > 0
    study.tell(trial, 1.0)
    assert len(synced) == begun + 1
    assert synced[-1] == (tmp_path / "s.journal").stat().st_size
