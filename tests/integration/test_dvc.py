"""The stages under DVC itself: a kill of `dvc repro`, an altered cache, a second run."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config.recipes import apply_recipe
from pipeline.system.files import sha256_file
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.fault]
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture
def params(project):
    """The project's params.yaml, put back afterwards."""
    path = project / "params.yaml"
    original = path.read_text()
    yield path
    path.write_text(original)


@pytest.fixture(scope="module")
def project(tmp_path_factory, copy_project, commit_all):
    """A repository of its own, under a difficult name, with the smoke recipe."""
    folder = tmp_path_factory.mktemp("dvc") / "a project with späces"
    copy_project(folder)
    (folder / "dvc.lock").unlink(missing_ok=True)
    apply_recipe("smoke", folder / "params.yaml", folder / "recipes")
    commit_all(folder)
    return folder


def environment():
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC", "MLFLOW"))}
    return {**kept, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "LC_ALL": "C"}


def repro(project, *arguments):
    return subprocess.Popen(
        ["dvc", "repro", *arguments],
        cwd=project,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_of(process):
    said = process.communicate(timeout=600)[0]
    return process.returncode, said


def rows(project):
    return sum(path.read_text().count("\n") for path in project.glob("checkpoints/*/times.jsonl"))


def trainers(project):
    """Process ids of the stage `train` that run in the project."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, place = (path / "cmdline").read_bytes().split(b"\0"), os.readlink(path / "cwd")
        except OSError:
            continue
        if b"stages.train" in words and place == str(project):
            found.append(int(path.name))
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a child of its parent's death")
@pytest.mark.parametrize(("number", "shell"), [(signal.SIGTERM, "/bin/bash"), (signal.SIGKILL, "/bin/sh")])
def test_the_trainer_ends_with_dvc_and_the_next_repro_goes_on(project, params, monkeypatch, number, shell):  # A10
    monkeypatch.setenv("SHELL", shell)  # DVC runs its commands with it; only some replace themselves by the command
    original = params.read_text()
    longer = original.replace("max_tokens: 76800", f"max_tokens: {150_000 + number}").replace(
        "loss: 0.1 #", "loss: 0.001 #"
    )
    params.write_text(longer)  # a run that DVC does not have in its cache, and that lasts
    before = rows(project)
    process = repro(project, "train")
    assert wait_until(lambda: rows(project) > before + 5, 300), process.communicate()[0]
    process.send_signal(number)
    process.wait()
    assert wait_until(lambda: not trainers(project), 60)  # 2 s where nothing else is at work
    code, said = output_of(repro(project, "train"))
    assert code == 0, said
    assert "resumes from step" in said


def test_a_whole_repro_can_be_repeated_and_then_does_nothing(project):
    code, said = output_of(repro(project))
    assert code == 0, said
    assert "champion" in said
    code, said = output_of(repro(project))
    assert "up to date" in said


def test_every_stage_run_twice_writes_the_same_bytes(project):  # B8
    before, _ = hashes_of(project)
    assert {"models/model/model.safetensors", "reports/metrics.json", "reports/figures/loss.png"} <= before.keys()
    subprocess.run([sys.executable, "-m", "pipeline", "clean"], cwd=project, env=environment(), check=True)
    code, said = output_of(repro(project, "--force"))
    assert code == 0, said
    assert hashes_of(project)[0] == before


def test_an_altered_cache_entry_is_refused_by_the_stage_that_reads_it(project):  # B6
    tokens = project / "data" / "tokens" / "train-00000.bin"
    entry = next(p for p in (project / ".dvc" / "cache" / "files").rglob("*") if p.is_file() and same(p, tokens))
    entry.chmod(0o644)
    altered = bytearray(entry.read_bytes())
    altered[100] ^= 1
    shutil.rmtree(project / "data" / "tokens")
    entry.write_bytes(altered)
    entry.chmod(0o444)
    subprocess.run(["dvc", "checkout", "data/tokens"], cwd=project, env=environment(), check=False, capture_output=True)
    code, said = output_of(repro(project, "train", "--force", "--single-item"))
    assert code == 255
    assert "train-00000.bin" in said
    assert "chmod -R u+w .dvc/cache" in said
    subprocess.run(["chmod", "-R", "u+w", ".dvc/cache"], cwd=project, check=True)
    assert output_of(repro(project, "--force", "tokenize"))[0] == 0
    assert output_of(repro(project, "train"))[0] == 0


def same(a, b):
    return a.stat().st_size == b.stat().st_size and sha256_file(a) == sha256_file(b)


TIMED = {"models/times.jsonl", "reports/timing.json", "reports/figures/speed.png", "reports/registered.json"}


def hashes_of(project):
    """Of every file that the stages left, and of every out in dvc.lock, but for those that tell of time."""
    found = [path for part in ("data", "models", "reports") for path in (project / part).rglob("*") if path.is_file()]
    files = {str(path.relative_to(project)): sha256_file(path) for path in found}
    stages = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    outs = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}
    return [{name: each for name, each in hashes.items() if name not in TIMED} for hashes in (files, outs)]


def test_two_clean_clones_come_to_the_same_bytes_wherever_they_are(project, tmp_path, monkeypatch):  # B8
    code, said = output_of(repro(project))
    assert code == 0, said
    clone = tmp_path / "another place" / "ünd a much longer name, of a clone in another zone and another language"
    subprocess.run(["git", "clone", "-q", project, clone], check=True, timeout=60)
    assert not (clone / "data").exists()  # a clean clone: nothing of what the stages made, and no cache
    assert not (clone / "dvc.lock").exists()
    for name, value in {"TZ": "Pacific/Apia", "LANG": "C.UTF-8", "PYTHONHASHSEED": "7"}.items():
        monkeypatch.setenv(name, value)
    elsewhere = {**environment(), "LC_ALL": "C.UTF-8"}
    monkeypatch.setattr(sys.modules[__name__], "environment", lambda: elsewhere)
    code, said = output_of(repro(clone))
    assert code == 0, said
    (files, outs), (other_files, other_outs) = hashes_of(project), hashes_of(clone)
    assert {"models/model/model.safetensors", "models/steps.jsonl", "reports/metrics.json"} <= files.keys()
    assert {"models/model", "data/tokens", "data/corpus.txt"} <= outs.keys()
    assert files == other_files
    assert outs == other_outs
    assert (project / "models/times.jsonl").read_bytes() != (clone / "models/times.jsonl").read_bytes()  # each its own
    for folder in (project, clone):
        assert "up to date" in output_of(repro(folder))[1]
