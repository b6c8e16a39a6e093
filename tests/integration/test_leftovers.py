"""What killed processes left: it goes, and nothing that lives, or that a user made, goes with it."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.ops import leftovers
from pipeline.ops.leftovers import examine_leftovers, lock_holder, run_holder
from pipeline.registry import artifacts as versions
from pipeline.registry import reproduce as retrain
from pipeline.registry.artifacts import TEMPORARY, temporary_prefix
from pipeline.system.files import UNFINISHED, locked
from pipeline.tracking.recorder import RECORDER_LOCK

HOUR_S = 3600


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """A temporary folder of the system's that nobody else uses."""
    (folder := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def root(tmp_path):
    (folder := tmp_path / "project").mkdir()
    return folder


@pytest.fixture
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(60)
    return process.pid


def leave(path, age_s=HOUR_S):
    """A folder with a file in it that was written so long ago."""
    path.mkdir(parents=True)
    (path / "weights").write_bytes(b"half")
    for place in (path / "weights", path):
        os.utime(place, (time.time() - age_s,) * 2)
    return path


def mend(root):
    """Call each fix; return what was found."""
    found = list(examine_leftovers(root))
    for finding in found:
        if finding.fix:
            finding.fix()
    return found


def test_a_tidy_project_is_one_line(root):
    (finding,) = examine_leftovers(root)
    assert finding.mark == "ok"
    assert not [*root.iterdir()]


@pytest.mark.fault
@pytest.mark.parametrize(
    "place",
    ["data/tokenizer", "models/model", "reports/figures/loss.png", "checkpoints/0f/step-00000009", "params.yaml"],
)
def test_what_a_killed_process_was_writing_goes_and_all_else_stays(root, place):
    (kept := root / place).parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("the one before")
    to_remove = leave(kept.parent / f"{UNFINISHED}{kept.name}")
    (finding,) = mend(root)
    assert (finding.mark, to_remove.exists(), kept.read_text()) == ("mend", False, "the one before")
    (finding,) = examine_leftovers(root)
    assert finding.mark == "ok"


@pytest.mark.fault
def test_an_unfinished_file_goes_too(root):
    (to_remove := root / "data" / f"{UNFINISHED}corpus.txt").parent.mkdir()
    to_remove.write_text("half")
    os.utime(to_remove, (0, 0))
    mend(root)
    assert not to_remove.exists()


@pytest.mark.fault
@pytest.mark.parametrize("lock", ["0f.lock", f"0f/{RECORDER_LOCK}"])
def test_what_a_living_training_may_be_writing_stays(root, lock):
    spared = leave(root / "checkpoints" / "0f" / "samples" / f"{UNFINISHED}step-000050.txt")
    with locked(root / "checkpoints" / lock):
        (finding,) = mend(root)
        assert finding.mark == "note"
        assert f"process {os.getpid()}" in finding.what
        assert spared.exists()
    (finding,) = mend(root)
    assert not spared.exists()


@pytest.mark.fault
def test_what_was_written_of_late_outside_of_a_run_stays(root):
    spared = leave(root / "models" / f"{UNFINISHED}model", age_s=leftovers.YOUNG_S / 2)
    (finding,) = mend(root)
    assert (finding.mark, spared.exists()) == ("note", True)


@pytest.mark.fault
def test_what_lies_in_a_project_with_a_stage_at_work_stays(root):
    spared = leave(root / "models" / f"{UNFINISHED}model")
    (root / "stages").mkdir()
    (root / "stages" / "train.py").write_text("print(flush=True); input()")
    with subprocess.Popen(
        [sys.executable, "-m", "stages.train"], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as stage:
        assert stage.stdout.readline(), "it runs"
        (finding,) = mend(root)
        stage.communicate(b"\n", timeout=60)
    assert (finding.mark, spared.exists()) == ("note", True)
    assert finding.what.endswith(f"process {stage.pid}, stages.train")


def test_the_shards_of_a_stopped_tokenize_are_gone_on_with(root):
    spared = leave(root / "data" / f"{UNFINISHED}tokens-0123")
    (finding,) = mend(root)
    assert (finding.mark, spared.exists()) == ("note", True)


def test_what_lies_in_something_unfinished_goes_with_it(root):
    leave(root / "data" / f"{UNFINISHED}bpe" / f"{UNFINISHED}vocab.json")
    leave(root / "data" / f"{UNFINISHED}bpe" / "more")
    os.utime(root / "data" / f"{UNFINISHED}bpe", (0, 0))
    assert len(mend(root)) == 1
    assert not [*(root / "data").iterdir()]


@pytest.mark.fault
def test_a_dead_processs_temporary_folder_goes_and_a_living_ones_and_strangers_stay(root, temporary, dead_pid):
    to_remove = leave(temporary / f"{TEMPORARY}{dead_pid}-abc")
    own = Path(tempfile.mkdtemp(prefix=temporary_prefix()))
    stranger = leave(temporary / "someone-elses")
    marks = sorted(finding.mark for finding in mend(root))
    assert marks == ["mend", "ok"]
    assert (to_remove.exists(), own.exists(), stranger.exists()) == (False, True, True)


@pytest.mark.fault
def test_a_process_that_got_a_dead_ones_number_does_not_keep_its_folder(root, temporary):
    to_remove = leave(temporary / f"{TEMPORARY}{os.getpid()}-abc", age_s=10**6)  # from before this process
    mend(root)
    assert not to_remove.exists()


@pytest.mark.fault
def test_a_dead_processs_folder_stays_while_what_it_started_is_at_work_there(root, temporary, dead_pid):
    folder = leave(temporary / f"{TEMPORARY}{dead_pid}-abc")
    with locked(folder / "project" / "checkpoints" / "0f" / RECORDER_LOCK):
        (finding,) = mend(root)
        assert (finding.mark, folder.exists()) == ("ok", True)
    mend(root)
    assert not folder.exists()


class ReachedError(Exception):
    """The code came to where the test looks."""


def test_a_version_is_put_together_in_a_folder_that_bears_its_makers_number(monkeypatch):
    def save_files(whole, *_):
        raise ReachedError(whole.parent.name)

    monkeypatch.setattr(versions, "_save_files", save_files)
    run = SimpleNamespace(info=SimpleNamespace(run_id="x"))
    with pytest.raises(ReachedError, match=f"^{TEMPORARY}{os.getpid()}-"):
        versions._log_files(None, Path(), run, "m")


def test_a_comparison_is_trained_in_a_folder_that_bears_its_makers_number(monkeypatch):
    def set_up(files, project):
        raise ReachedError(project.parent.name)

    monkeypatch.setattr(retrain, "_set_up", set_up)
    monkeypatch.setattr(retrain, "open_version", lambda *_: Path())
    for name in ("identity_of", "_identity_here", "_doubt", "sha256_file"):
        monkeypatch.setattr(retrain, name, lambda *_: {})
    with pytest.raises(ReachedError, match=f"^{TEMPORARY}{os.getpid()}-"):
        retrain.retrain(None, SimpleNamespace(name="x", version="1"), Path())


def git(root, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    return subprocess.run(
        ["git", "-C", root, *identity, *arguments], check=True, timeout=60, capture_output=True, text=True
    ).stdout


@pytest.mark.fault
@pytest.mark.parametrize("folder_is_there", [True, False])
def test_the_worktree_of_a_killed_comparison_goes_and_a_users_own_stays(
    root, temporary, dead_pid, tmp_path, folder_is_there
):
    git(root, "init", "-q")
    git(root, "commit", "-q", "--allow-empty", "-m", "x")
    code = temporary / f"{TEMPORARY}{dead_pid}-abc" / "code"
    git(root, "worktree", "add", "--detach", code)
    git(root, "worktree", "add", "--detach", tmp_path / "mine")
    (tmp_path / "mine").rename(tmp_path / "on a disk that is not there now")  # git would prune it
    if not folder_is_there:
        code.parent.rename(tmp_path / "swept by the system")
    (finding,) = mend(root)
    assert finding.mark == "mend"
    listing = git(root, "worktree", "list", "--porcelain")
    assert TEMPORARY not in listing
    assert str(tmp_path / "mine") in listing
    assert not code.parent.exists()


def test_who_holds_a_lock_is_told_without_making_or_changing_one(tmp_path):
    assert lock_holder(tmp_path / "x.lock") is None
    assert run_holder(tmp_path / "x") is None
    assert not [*tmp_path.glob("x*")]
    with locked(tmp_path / "x.lock"):
        assert run_holder(tmp_path / "x") == f"process {os.getpid()}"
    (tmp_path / "x.lock").write_text("123")
    assert run_holder(tmp_path / "x") is None
    assert (tmp_path / "x.lock").read_text() == "123"
