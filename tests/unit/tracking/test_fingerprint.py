"""The fingerprint changes with whatever decides a run's numbers, and with nothing else."""

import ast
from pathlib import Path

import pytest
import torch

from pipeline.config.params import load_params
from pipeline.system.device import Machine
from pipeline.tracking import fingerprint
from pipeline.tracking.fingerprint import DECISIVE, differences, identify, source_hash
from pipeline.training.config import RunConfig

ROOT = Path(__file__).parents[3]
MACHINE = Machine(torch.device("cpu"), "fp32", 2)

# What training imports beside the files of DECISIVE, and why it decides nothing about a run's numbers.
UNDECISIVE = {
    "pipeline/config/params.py": "reads the parameters, whose values are in the fingerprint",
    "pipeline/data/corpus.py": "the text, of which the tokens are in the fingerprint",
    "pipeline/data/corpus_index.py": "the text",
    "pipeline/data/documents.py": "the text",
    "pipeline/data/tokenizer.py": "decodes samples; the tokens themselves are in the fingerprint",
    "pipeline/model/weights.py": "saves and loads: a finished run writes its model again",
    "pipeline/model/generator.py": "samples",
    "pipeline/model/prompt_lookup.py": "samples",
    "pipeline/model/decoder.py": "samples",
    "pipeline/model/sampling.py": "samples",
    "pipeline/system/errors.py": "events, which end a run without changing it",
    "pipeline/system/files.py": "reads and writes files whose bytes are checked",
    "pipeline/system/host.py": "facts of the host, which are in `environment`",
    "pipeline/system/signals.py": "a run that a signal stops is resumed with the same bits",
    "pipeline/tracking/fingerprint.py": "is what this test is about",
    "pipeline/tracking/journal.py": "records what the loop found",
    "pipeline/tracking/mlflow_store.py": "MLflow",
    "pipeline/tracking/recorder.py": "MLflow",
    "pipeline/tracking/mlflow_tracker.py": "MLflow",
    "pipeline/tracking/mlflow_runs.py": "MLflow",
    "pipeline/tracking/run_record.py": "MLflow",
    "pipeline/training/checkpoint.py": "whichever checkpoint a run is resumed from, it has the same bits",
    "pipeline/training/config.py": "refuses parameters, whose values are in the fingerprint",
    "pipeline/training/preflight.py": "refuses runs that do not fit",
    "pipeline/training/progress.py": "shows the run",
    "pipeline/training/results.py": "a finished run writes its results again; target.best_step chooses the model",
}


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


def test_how_often_to_sample_and_save_is_no_part_of_it():
    assert not {"checkpoint", "samples"} & identity()["params"].keys()


def test_changed_code_changes_it_and_is_named(monkeypatch):
    before = identity()
    monkeypatch.setattr(fingerprint, "source_hash", lambda text, name: name)
    assert identity()["fingerprint"] != before["fingerprint"]
    assert f"{DECISIVE[0]} changed" in differences(before, identity())


class Mutation(ast.NodeTransformer):
    """Changes the n-th number or operator."""

    OTHER = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Lt: ast.LtE, ast.GtE: ast.Gt}

    def __init__(self, n):
        self.left = n

    def _now(self):
        self.left -= 1
        return self.left == -1

    def visit_Constant(self, node):
        if type(node.value) in (int, float) and self._now():
            return ast.Constant(node.value + 1)
        return node

    def generic_visit(self, node):
        if isinstance(node, ast.Raise | ast.Assert) or (isinstance(node, ast.Expr) and is_print(node)):
            return node
        if type(node) in self.OTHER and self._now():
            return self.OTHER[type(node)]()
        return super().generic_visit(node)


def is_print(node):
    return isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "print"


def part_of(tree, name):
    for part in filter(None, name.split(".")):
        (tree,) = [node for node in ast.iter_child_nodes(tree) if part in fingerprint._names_of(node)]
    return tree


@pytest.mark.parametrize("entry", DECISIVE)
def test_every_changed_number_and_operator_of_the_deciding_code_changes_its_hash(entry):
    path, _, name = entry.partition(":")
    text = (ROOT / path).read_text()
    before, n = source_hash(text, name), 0
    while True:
        mutation, tree = Mutation(n), ast.parse(text)
        mutation.visit(part_of(tree, name))
        if mutation.left >= 0:  # there is no n-th
            break
        assert source_hash(ast.unparse(tree), name) != before, n
        n += 1


SOURCE = '''
def f(x: float) -> float:
    """Twice x."""
    if x < 0:
        raise ValueError(f"x is {x}")
    assert x < 9, "too large"
    print("doubling", x)
    return g(2 * x, description="twice")
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Twice x."""', '"""The double of x."""'),
        ("x: float) -> float", "x: int)"),
        ('ValueError(f"x is {x}")', 'ValueError(f"{x:.3g} is negative", 2)'),
        ('"too large"', '"large"'),
        ('    print("doubling", x)\n', ""),
        ('description="twice"', 'description="double"'),
        ("    return g(2 * x, ", "\n    # a comment\n    return g(\n        (2 * x), "),
    ],
)
def test_words_and_formatting_do_not_change_the_hash(old, new):
    assert old in SOURCE
    assert source_hash(SOURCE.replace(old, new)) == source_hash(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"), [("2 *", "3 *"), ("x < 0", "x <= 0"), ("ValueError(", "OSError("), ("g(", "h(")]
)
def test_what_the_code_does_changes_the_hash(old, new):
    assert source_hash(SOURCE.replace(old, new)) != source_hash(SOURCE)


def test_a_definition_is_hashed_by_itself():
    text = "A = 1\n\nclass C:\n    def f(self):\n        return A\n\n    def g(self):\n        return 2\n"
    assert source_hash(text, "C.f") == source_hash(
        text.replace("return 2", "return 3").replace("A = 1", "A = 4"), "C.f"
    )
    assert source_hash(text, "A") != source_hash(text.replace("A = 1", "A = 4"), "A")
    with pytest.raises(KeyError):
        source_hash(text, "C.h")


def test_every_file_that_training_imports_is_in_the_fingerprint_or_has_a_reason_not_to_be():
    decisive = {entry.partition(":")[0] for entry in DECISIVE}
    assert not decisive & UNDECISIVE.keys()
    assert not imported_by("pipeline/training/train.py") - decisive - UNDECISIVE.keys()


def imported_by(path):
    """Our own files with code that importing `path` loads, itself included."""
    found, waiting = set(), [path]
    while waiting:
        if (path := waiting.pop()) not in found:
            found.add(path)
            for node in ast.walk(ast.parse((ROOT / path).read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                files = [f"{name.replace('.', '/')}.py" for name in names if name.startswith("pipeline.")]
                waiting += [file for file in files if (ROOT / file).is_file()]
    return found
