"""Files are complete or absent, a manifest finds every change, and a lock has one holder."""

import errno
import fcntl
import json
import os

import pytest

from pipeline.system import files
from pipeline.system.errors import InputError, IntegrityError, RunLocked
from pipeline.system.files import MANIFEST, atomic_folder, locked, read_json, verify_manifest, write_json


def fill(folder, text="new"):
    with atomic_folder(folder) as unfinished:
        (unfinished / "a.txt").write_text(text)
        (unfinished / "b.txt").write_text("b")


def test_a_file_or_a_folder_is_replaced_only_by_a_complete_one(tmp_path):
    files.write_text(file := tmp_path / "x.txt", "old")
    with pytest.raises(RuntimeError), files.atomic_file(file) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old"
    fill(folder := tmp_path / "f", "old")
    with pytest.raises(RuntimeError), atomic_folder(folder) as unfinished:
        (unfinished / "a.txt").write_text("half")
        raise RuntimeError
    verify_manifest(folder)
    assert (folder / "a.txt").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["f", "x.txt"]
    fill(folder, "new")
    assert (folder / "a.txt").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["f", "x.txt"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.txt").write_text("neW"), "a.txt is altered"),
        (lambda folder: (folder / "a.txt").write_text("newer"), "a.txt has 5 bytes, expected 3"),
        (lambda folder: (folder / "a.txt").unlink(), "a.txt is missing"),
        (lambda folder: (folder / "c.txt").write_text(""), "c.txt is not in its manifest"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "b.txt").unlink() or (folder / "b.txt").mkdir(), "b.txt is missing"),
    ],
)
def test_a_manifest_finds_every_change(tmp_path, damage, message):
    fill(tmp_path / "f")
    damage(tmp_path / "f")
    with pytest.raises(IntegrityError, match=message):
        verify_manifest(tmp_path / "f")


def test_a_manifest_is_not_valid_for_files_outside_its_folder(tmp_path):
    fill(tmp_path / "f")
    (tmp_path / "outside.txt").write_text("b")
    manifest = json.loads((tmp_path / "f" / MANIFEST).read_text())
    outside = ["../outside.txt", f"{tmp_path}/outside.txt", "./a.txt", "x" * 300, "a\0b", "", ".", "..", "\ud800"]
    for name in outside:
        (tmp_path / "f" / MANIFEST).write_text(json.dumps({**manifest, name: manifest["b.txt"]}))
        with pytest.raises(IntegrityError, match="is missing"):
            verify_manifest(tmp_path / "f")


NOT_MANIFESTS = ["[", "[" * 100_000, "\xff", "3", "[]x", "null", "[1]", '{"a.txt": 3}', '{"a.txt": {"size_bytes": 3}}']
OF_OTHER_TYPES = ["{}", '{"a.txt": {"size_bytes": "3", "sha256": 1}, "b.txt": {"size_bytes": NaN, "sha256": []}}']


def test_no_other_content_is_taken_for_a_manifest(tmp_path):
    fill(folder := tmp_path / "f")
    for content in (*NOT_MANIFESTS, *OF_OTHER_TYPES):
        (folder / MANIFEST).write_text(content, encoding="latin-1")
        with pytest.raises(IntegrityError, match="is not a manifest" if content in NOT_MANIFESTS else str(folder)):
            verify_manifest(folder)


def test_json_is_read_as_it_was_written_or_refused_with_a_hint(tmp_path):
    write_json(tmp_path / "x.json", value := {"b": 1.5, "a": [None, "ä"]})
    assert read_json(tmp_path / "x.json") == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "y.json", float("nan"))
    with pytest.raises(InputError, match=r"y.json not found: run"):
        read_json(tmp_path / "y.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(IntegrityError, match="is not JSON"):
        read_json(tmp_path / "x.json")


def test_a_lock_has_one_holder_whose_process_is_named(tmp_path):
    for _ in range(2):  # released at the end of the block
        with locked(tmp_path / "run.lock"), pytest.raises(RunLocked, match=f"run is held by process {os.getpid()}:"):
            locked(tmp_path / "run.lock").__enter__()


def test_the_holder_of_a_lock_on_a_shared_disk_is_named_with_its_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "n1")
    with locked(tmp_path / "run.lock"):
        monkeypatch.setattr("socket.gethostname", lambda: "n2")
        with pytest.raises(RunLocked, match=f"run is held by process {os.getpid()} on n1: wait for it"):
            locked(tmp_path / "run.lock").__enter__()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_named(tmp_path, monkeypatch, code):
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    for wait in (False, True):
        with pytest.raises(InputError, match=f"the disk of {tmp_path} cannot lock files \\(.+\\): move the project"):
            locked(tmp_path / "run.lock", wait).__enter__()


def test_json_that_is_missing_or_damaged_has_the_hint_of_its_reader(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(InputError, match=r"plan\.json not found: run `dvc repro`, which makes it$"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(IntegrityError, match=r"plan\.json is not JSON \(.*\): remove it$"):
        read_json(path, "remove it")
