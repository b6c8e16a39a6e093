"""Files are complete or absent, a manifest finds every change, and a lock has one holder."""

import json
import os
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.system import files
from pipeline.system.errors import InputError, IntegrityError, RunLocked
from pipeline.system.files import MANIFEST, UNFINISHED, atomic_folder, locked, read_json, verify_manifest, write_json


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
        (lambda folder: (folder / MANIFEST).write_text('{"a.txt": 3}'), "is not a manifest"),
        (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), "is not a manifest"),
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


LEAF = st.none() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.booleans(), max_size=3)
ENTRY = LEAF | st.dictionaries(st.sampled_from(["size_bytes", "sha256"]), LEAF, max_size=2)
JSON = ENTRY | st.dictionaries(st.sampled_from(["a.txt", "b.txt", "../f/a.txt"]), ENTRY, max_size=3)


@settings(max_examples=20, deadline=None)
@given(content=st.binary(max_size=80) | JSON.map(json.dumps).map(str.encode))
def test_any_bytes_as_a_manifest_are_refused(tmp_path_factory, content):
    if not (folder := tmp_path_factory.getbasetemp() / "any").exists():
        fill(folder)
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(IntegrityError, match=str(folder)):
        verify_manifest(folder)
    with suppress(IntegrityError):
        read_json(folder / MANIFEST)


def test_unfinished_files_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / f"{UNFINISHED}folder").mkdir()
    for name in (f"{UNFINISHED}folder/x", f"{UNFINISHED}file", "kept"):
        (tmp_path / name).touch()
    files.sweep_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["kept"]


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
