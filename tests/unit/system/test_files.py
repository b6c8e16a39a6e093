"""Files are whole or absent; manifests find every change; a lock is held by one."""

import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.system.errors import InputError, IntegrityError, RunLocked
from pipeline.system.files import (
    MANIFEST,
    UNFINISHED,
    atomic_file,
    atomic_folder,
    locked,
    read_json,
    sweep_unfinished,
    verify_manifest,
    write_json,
    write_text,
)


def fill(folder, text="new"):
    with atomic_folder(folder) as unfinished:
        (unfinished / "a.txt").write_text(text)
        (unfinished / "b.txt").write_text("b")


def test_a_failed_write_leaves_what_was_there(tmp_path):
    write_text(path := tmp_path / "x.txt", "old")
    with pytest.raises(RuntimeError), atomic_file(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_a_failed_folder_leaves_what_was_there(tmp_path):
    fill(tmp_path / "f", "old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "f") as unfinished:
        (unfinished / "a.txt").write_text("half")
        raise RuntimeError
    verify_manifest(tmp_path / "f")
    assert (tmp_path / "f" / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_folder_takes_the_place_of_its_predecessor(tmp_path):
    fill(tmp_path / "f", "old")
    fill(tmp_path / "f", "new")
    assert (tmp_path / "f" / "a.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "a.txt").write_text("neW"), "a.txt is altered"),
        (lambda folder: (folder / "a.txt").write_text("newer"), "a.txt has 5 bytes, expected 3"),
        (lambda folder: (folder / "a.txt").unlink(), "a.txt is missing"),
        (lambda folder: (folder / "c.txt").write_text(""), "c.txt is not in its manifest"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not a manifest"),
        (lambda folder: (folder / "manifest.json").write_text('{"a.txt": 3}'), "is not a manifest"),
        (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "is not a manifest"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\0"), "is not a manifest"),
        (lambda folder: (folder / "b.txt").unlink() or (folder / "b.txt").symlink_to("nowhere"), "b.txt is missing"),
        (lambda folder: (folder / "b.txt").unlink() or (folder / "b.txt").mkdir(), "b.txt is missing"),
    ],
)
def test_a_manifest_finds_every_change(tmp_path, damage, words):
    fill(tmp_path / "f")
    damage(tmp_path / "f")
    with pytest.raises(IntegrityError, match=words):
        verify_manifest(tmp_path / "f")


@pytest.mark.security
@pytest.mark.parametrize(
    "name", ["../outside.txt", "{folder}/outside.txt", "./a.txt", "x" * 300, "a\0b", "", ".", "..", "\ud800"]
)
def test_a_manifest_vouches_for_nothing_outside_of_its_folder(tmp_path, name):
    fill(tmp_path / "f")
    (tmp_path / "outside.txt").write_text("b")
    manifest = json.loads((tmp_path / "f" / MANIFEST).read_text())
    manifest[name.format(folder=tmp_path)] = manifest["b.txt"]
    (tmp_path / "f" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match=r"is missing|is no file"):
        verify_manifest(tmp_path / "f")


@pytest.mark.security
@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=80) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["a.txt", "b.txt", "size_bytes", "sha256", "../f/a.txt"]), inner, max_size=3), max_leaves=6,
).map(json.dumps).map(str.encode))  # fmt: skip
def test_any_bytes_as_a_manifest_are_refused_in_words(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "any"
    fill(folder)
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(IntegrityError, match=str(folder)):
        verify_manifest(folder)
    with suppress(IntegrityError):
        read_json(folder / MANIFEST)


def test_leftovers_of_a_killed_writer_are_swept(tmp_path):
    (tmp_path / f"{UNFINISHED}folder").mkdir()
    (tmp_path / f"{UNFINISHED}folder" / "x").touch()
    (tmp_path / f"{UNFINISHED}file").touch()
    (tmp_path / "kept").touch()
    sweep_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["kept"]


def test_json_is_read_as_it_was_written(tmp_path):
    write_json(tmp_path / "x.json", value := {"b": 1.5, "a": [None, "ä"]})
    assert read_json(tmp_path / "x.json") == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "y.json", float("nan"))
    assert os.listdir(tmp_path) == ["x.json"]


def test_json_that_is_missing_or_broken_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="not found: run"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(IntegrityError, match="is not JSON"):
        read_json(tmp_path / "x.json")


@pytest.mark.fault
def test_a_lock_names_its_holder_and_goes_with_it(tmp_path):
    holder = "import sys; from pipeline.system.files import locked; from pathlib import Path\n"
    holder += f"with locked(Path({str(tmp_path / 'run.lock')!r})): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(RunLocked, match=rf"run is held by process {process.pid}:"), locked(tmp_path / "run.lock"):
            pass
        process.kill()
    with locked(tmp_path / "run.lock"):
        pass
