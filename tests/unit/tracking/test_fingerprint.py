"""The fingerprint changes with whatever decides a run's numbers, and with nothing else."""

from pathlib import Path

import pytest
import torch

from pipeline.config.params import load_params
from pipeline.system.device import Machine
from pipeline.tracking import fingerprint
from pipeline.tracking.fingerprint import differences, identify, sources_reachable_from
from pipeline.training.config import RunConfig

MACHINE = Machine(torch.device("cpu"), "fp32", 2)


def identity(data="d" * 64, machine=MACHINE, **sections):
    config = RunConfig.of(load_params())
    changed = [s.updated(**sections.get(s.section_name, {})) for s in config.decisive]
    return identify(data, changed, machine)


def test_equal_runs_have_equal_fingerprints():
    assert identity() == identity()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optim": {"lr": 0.5}}, "optim.lr 0.005 -> 0.5"),
        ({"train": {"seed": 9}}, "train.seed 1 -> 9"),
        ({"target": {"loss": 0.2}}, "target.loss 0.1 -> 0.2"),
        ({"data": "e" * 64}, "data_sha256 ddd"),
    ],
)
def test_what_decides_the_numbers_changes_it_and_is_named(change, words):
    assert identity(**change)["fingerprint"] != identity()["fingerprint"]
    (found,) = differences(identity(), identity(**change))
    assert found.startswith(words)


def test_another_machine_keeps_the_fingerprint_but_is_named():
    other = identity(machine=MACHINE._replace(threads=1))
    assert other["fingerprint"] == identity()["fingerprint"]
    assert differences(identity(), other) == ["threads 2 -> 1"]


def test_another_processor_is_named(monkeypatch):
    here = identity()
    monkeypatch.setattr(fingerprint, "cpu_name", lambda: "Another CPU")
    (found,) = differences(here, identity())
    assert found.startswith("device cpu ")
    assert found.endswith(", Another CPU")


@pytest.mark.parametrize("amx", [True, False])
def test_a_processor_that_differs_in_its_units_alone_is_named(amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert (" AMX, " in identity()["environment"]["device"]) == amx


def test_how_often_to_look_and_save_is_no_part_of_it():
    assert not {"checkpoint", "samples"} & identity()["params"].keys()


def test_changed_code_changes_it_and_is_named():
    before, now = identity(), identity()
    before["sources"] = {**before["sources"], "pipeline/model/gpt.py": "0"}
    assert differences(before, now) == ["pipeline/model/gpt.py changed"]


def test_sources_are_found_through_imports_of_every_form(tmp_path):
    (tmp_path / "pipeline").mkdir()
    files = {
        "__init__": "",
        "a": "def f():\n    from pipeline import b\n",
        "b": "import pipeline.c as c\nfrom os import path",
        "c": "from pipeline.d import x",
        "d": "x = 1",
        "unused": "",
    }
    for name, text in files.items():
        (tmp_path / "pipeline" / f"{name}.py").write_text(text)
    assert sources_reachable_from("pipeline/a.py", tmp_path) == [
        f"pipeline/{name}.py" for name in ("__init__", "a", "b", "c", "d")
    ]


def test_training_code_knows_nothing_of_tracking():
    sources = sources_reachable_from("pipeline/training/loop.py", Path(__file__).parents[3])
    assert not {f"pipeline/{name}.py" for name in ("tracking", "journal", "registry")} & set(sources)
