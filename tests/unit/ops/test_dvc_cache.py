"""Entries of DVC's cache that are not what their names say."""

import hashlib
import json
import subprocess
import sys

import pytest
import yaml

from pipeline.ops import dvc_cache
from pipeline.ops.dvc_cache import cache_of, examine_cache


def entry(root, data, suffix=""):
    """Put bytes into the cache; return their hash and their path."""
    md5 = hashlib.md5(data).hexdigest() + suffix
    path = root / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return md5, path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """One output of one file, one of a folder with a file, and a file of before."""
    monkeypatch.setattr(dvc_cache, "cache_of", lambda root: root / ".dvc" / "cache")  # asking DVC takes a second
    inner = entry(tmp_path, b"tokens")
    folder = entry(tmp_path, json.dumps([{"md5": inner[0], "relpath": "train.bin"}]).encode(), ".dir")
    single, before = entry(tmp_path, b"corpus"), entry(tmp_path, b"an older corpus")
    outs = [{"path": "data/tokens", "md5": folder[0]}, {"path": "data/corpus.txt", "md5": single[0]}]
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": {"x": {"outs": outs}}}))
    return tmp_path, {"train.bin": inner[1], "tokens": folder[1], "corpus": single[1], "before": before[1]}


def test_a_sound_cache_is_one_line(project):
    (finding,) = examine_cache(project[0])
    assert (finding.mark, finding.what) == ("ok", "4 files, 0 MB, each with its own hash")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("which", "place"),
    [("corpus", "a copy of data/corpus.txt"), ("train.bin", "a copy of data/tokens/train.bin"),
     ("tokens", "a copy of data/tokens"), ("before", "dvc.lock does not name it")],
)  # fmt: skip
def test_a_flipped_bit_is_named_with_the_path_and_the_cure(project, which, place):
    root, paths = project
    data = bytearray(paths[which].read_bytes())
    data[len(data) // 2] ^= 1
    paths[which].write_bytes(data)
    (finding,) = examine_cache(root)
    shown = paths[which].relative_to(root)
    assert finding.mark == "mend"
    assert finding.what.startswith(f"{shown} is altered")
    assert finding.what.endswith(place)
    assert f"`rm -f {shown}`" in finding.hint
    assert finding.fix is None  # what is in a cache may be all that is left of something


@pytest.mark.fault
def test_what_dvc_is_still_writing_is_no_entry(project):
    root, paths = project
    (paths["corpus"].parent / "tmp.8d0f").write_bytes(b"half")
    (finding,) = examine_cache(root)
    assert finding.mark == "ok"


@pytest.mark.parametrize("lock", [None, "", "stages: 3", "{"])
def test_without_a_readable_lock_an_altered_entry_is_still_named(project, lock):
    root, paths = project
    (root / "dvc.lock").unlink() if lock is None else (root / "dvc.lock").write_text(lock)
    paths["corpus"].write_bytes(b"c0rpus")
    (finding,) = examine_cache(root)
    assert "dvc.lock does not name it" in finding.what


def dvc(root, *arguments):
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, check=True, timeout=120, capture_output=True)


def test_the_cache_is_where_dvc_says_and_else_in_its_default_place(tmp_path):
    assert cache_of(tmp_path) == tmp_path / ".dvc" / "cache"
    assert not [*tmp_path.iterdir()]
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\nno_scm = true\n[cache]\ndir = ../elsewhere\n")
    assert cache_of(tmp_path).resolve() == tmp_path / "elsewhere"


@pytest.mark.fault
@pytest.mark.slow
def test_the_cure_that_is_printed_brings_the_entry_and_the_file_back(tmp_path):  # B6
    dvc(tmp_path, "init", "--no-scm")
    stage = {"cmd": "printf text > out.txt", "outs": ["out.txt"]}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"x": stage}}))
    dvc(tmp_path, "repro")
    (path,) = (tmp_path / ".dvc" / "cache" / "files" / "md5").glob("??/*")
    path.chmod(0o644)
    path.write_bytes(b"tExt")
    path.chmod(0o444)
    (tmp_path / "out.txt").unlink()
    dvc(tmp_path, "checkout")  # DVC trusts the entry
    assert (tmp_path / "out.txt").read_bytes() == b"tExt"
    (finding,) = examine_cache(tmp_path)
    command = finding.hint.split("`")[1]
    subprocess.run(command.split(), cwd=tmp_path, check=True, timeout=60)
    dvc(tmp_path, "repro")
    assert (tmp_path / "out.txt").read_bytes() == path.read_bytes() == b"text"
    (finding,) = examine_cache(tmp_path)
    assert finding.mark == "ok"
