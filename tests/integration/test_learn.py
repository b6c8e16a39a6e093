"""`learn` on a text of one's own: a registered champion, nothing to do the second time, and no other text's model."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.__main__ import main
from pipeline.config.recipes import write_values
from pipeline.system.files import read_json

VERSE = "In the {} house by the sea, where nobody lives, a lamp is lit at {} and the door stands open.\n"
HOURS = ("one", "two", "three", "four", "five", "six")
PLACES = ("first", "second", "third", "fourth", "fifth", "sixth")

COMMANDS = {  # that README and the guides show to newcomers, and words of what they print
    "plan texts/poem.txt": "poem",
    "recipe": "laptop",
    "check": "params.yaml is valid",
    "run": "FINISHED",
    "models": "champion",
    "models verify": "poem version 1",
    "generate First --max-tokens 5": "First",
    "export hf DIR": "poem version 1",
}


@pytest.fixture
def clone(tmp_path, copy_project, commit_all, bpe, monkeypatch):
    """A project as after a clone, in a folder of its own, with GPT-2's tokenizer; commands run in it."""
    copy_project(folder := tmp_path / "a project with späces")
    (folder / "dvc.lock").unlink(missing_ok=True)
    write_values({"train.threads": 1}, folder / "params.yaml")  # other programs run at the same time
    commit_all(folder)
    shutil.copytree(bpe, folder / "data" / "tokenizer")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr("pipeline.__main__.is_other_code", lambda folder: False)  # the folder has a copy of this code
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # not activated: `learn` finds DVC and Python beside itself
    return folder


def test_learn_ends_with_a_champion_under_the_name_of_the_text(clone, tmp_path, capfd):
    text = "".join(VERSE.format(place, hour) for place, hour in zip(PLACES, HOURS, strict=True))
    (tmp_path / "poem.txt").write_text(text)
    assert main(["learn", str(tmp_path / "poem.txt"), "--yes"]) == 0
    said = capfd.readouterr().out
    registered = read_json(Path("reports/registered.json"))
    assert (registered["model"], registered["champion"]) == ("poem", True)
    assert "reached     loss 0.0" in said
    assert "poem version 1 continues the beginning of its text:\n\nIn the first house by the sea" in said
    assert "`make app` serves this model" in said
    assert (tmp_path / "poem.txt").read_text() == text
    sample = max(Path("checkpoints").glob("*/samples/*.txt"))
    assert sample.read_text().startswith("In the first house")  # samples.prompts: null

    params, lock = Path("params.yaml").read_bytes(), Path("dvc.lock").read_bytes()
    assert main(["learn", "texts/poem.txt", "--yes"]) == 0  # nothing is trained again
    assert "Running stage" not in capfd.readouterr().out
    assert (Path("params.yaml").read_bytes(), Path("dvc.lock").read_bytes()) == (params, lock)
    for arguments, words in COMMANDS.items():
        assert main([word.replace("DIR", str(tmp_path / "exported")) for word in arguments.split()]) == 0
        assert words in capfd.readouterr().out
    assert yaml.safe_load(params)["registry"]["model"] == "poem"
    assert Path(sys.executable).parent.as_posix() not in params.decode()  # no path of this machine
