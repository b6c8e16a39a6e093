"""The `dvc exp` commands of docs/guides/parameters.md, with a text of one's own, which git ignores."""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml
from fixtures_network import ROOT

from tests.trainings import change
from tests.waiting import wait_until

GUIDE = (ROOT / "docs/guides/parameters.md").read_text()
COMMANDS = re.findall(r"^dvc exp run .*?(?=  |$)", GUIDE, re.MULTILINE)


def test_the_experiments_of_the_guide_run_once_dvc_tracks_the_text(tmp_path, copy_project, commit_all):
    copy_project(tmp_path)
    stages = yaml.safe_load((tmp_path / "dvc.yaml").read_text())["stages"]
    first = {name: stages[name] for name in ("download", "tokenizer", "tokenize", "train")}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": first}))
    (tmp_path / "dvc.lock").unlink(missing_ok=True)
    own = {"corpus.source": "texts/mine.txt", "corpus.sha256": None, "corpus.mirrors": [], "corpus.fraction": 1.0}
    tiny = {"model.n_layer": 1, "model.n_head": 1, "model.n_embd": 12, "optim.max_epochs": 1.0, "train.threads": 1}
    change(tmp_path, **own, **tiny)
    commit_all(tmp_path)
    (tmp_path / "texts" / "mine.txt").write_text("Day 1: I fed the cat and slept.\n" * 300)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC", "MLFLOW"))}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"

    def run(command):
        done = subprocess.run(command, cwd=tmp_path, env=kept, shell=True, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    in_place, queued = COMMANDS
    assert run(f"git config user.name t && git config user.email t@example.com && {in_place}")[0] == 0
    code, said = run(queued.partition(" && ")[0].replace("--queue", "--temp"))
    assert code
    assert "error: texts/mine.txt is not in the experiment's copy of the project" in said
    assert run(f"{re.search('`(dvc add .*?)`', said)[1]} && {queued}")[0] == 0
    assert wait_until(lambda: re.search("Success|Failed", run("dvc queue status")[1]), 300)
    assert "Success" in run("dvc queue status")[1], run("dvc queue logs $(dvc queue status | awk 'NR == 2 {print $1}')")
    assert run("git add . && git ls-files texts")[1].split() == ["texts/README.md", "texts/mine.txt.dvc"]
