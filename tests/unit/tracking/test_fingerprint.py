"""The fingerprint changes with all that decides a run's numbers, and with nothing else."""

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

# Why the files in pipeline/ that training imports, but that are not in DECISIVE, do not decide a run's numbers.
UNDECISIVE = {
    "reads the text, whose tokens are in the fingerprint": "data/corpus data/corpus_index data/documents data/tables "
    "data/remote",
    "checks and converts published weights, whose hash is in the fingerprint": "model/published_files",
    "converts a loss to another unit": "data/statistics",
    "names and describes runs": "config/text_name training/target_result",
    "makes samples": "data/openings data/tokenizer model/generator model/prompt_lookup model/decoder model/sampling",
    "reads or refuses parameters, which are in the fingerprint": "config/params training/config training/preflight",
    "ends a run, which resumes with the same bits": "system/errors system/signals",
    "saves and loads files, whose bytes are checked": "system/files model/weights training/checkpoint",
    "the host and its threads, which are in `environment`": "system/host system/limits",
    "starts other programs": "system/processes",
    "shows the progress": "system/progress training/progress",
    "stores what training computed": "tracking/fingerprint tracking/journal "
    "tracking/mlflow_errors tracking/mlflow_store tracking/mlflow_runs tracking/mlflow_tracker tracking/recorder "
    "tracking/run_record tracking/descriptions",
    "copies the state at a step up to which all numbers are the same": "training/extension",
    "times a throw-away model": "training/forecast",
    "a finished run writes its results again; target.best_step chooses the model": "training/results",
}


def identity(data="d" * 64, machine=MACHINE, **sections):
    config = RunConfig.of(load_params())
    changed = [s.updated(**sections.get(s.section_name, {})) for s in config.decisive]
    return identify(data, changed, machine)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optim": {"lr": 0.5}}, "optim.lr 0.005 -> 0.5"),
        ({"train": {"seed": 9}}, "train.seed 1 -> 9"),
        ({"target": {"loss": 0.2}}, "target.loss 0.02 -> 0.2"),
        ({"data": "e" * 64}, "data_sha256 ddd"),
    ],
)
def test_changed_parameters_and_data_change_it_and_are_named(change, words):
    here, other = identity(), identity(**change)
    assert other["fingerprint"] != here["fingerprint"]
    (found,) = differences(here, other)
    assert found.startswith(words)


def test_another_environment_keeps_it_but_is_named(monkeypatch):
    here = identity()
    assert identity() == here
    other = identity(machine=MACHINE._replace(threads=1))
    assert other["fingerprint"] == here["fingerprint"]
    assert differences(here, other) == ["threads 2 -> 1"]
    for amx in (True, False):  # processors may differ in this unit alone
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert (" AMX, " in identity()["environment"]["device"]) == amx
    monkeypatch.setattr(fingerprint, "cpu_name", lambda: "Another CPU")
    (found,) = differences(here, identity())
    assert found.startswith("device cpu ")
    assert found.endswith(", Another CPU")


def test_the_intervals_of_samples_and_checkpoints_are_not_part_of_it():
    assert not {"checkpoint", "samples"} & identity()["params"].keys()


def test_changed_code_changes_it_and_is_named(monkeypatch):
    before = identity()
    monkeypatch.setattr(fingerprint, "source_hash", lambda text, name: name)
    assert identity()["fingerprint"] != before["fingerprint"]
    assert f"{DECISIVE[0]} changed" in differences(before, identity())


def statements(entry):
    """The syntax trees of a definition, or of a module's statements."""
    path, _, name = entry.partition(":")
    tree = ast.parse((ROOT / path).read_text())
    for part in filter(None, name.split(".")):
        (tree,) = [node for node in ast.iter_child_nodes(tree) if part in fingerprint._names_of(node)]
    return tree.body if isinstance(tree, ast.Module) else [tree]


def is_message(node):
    is_print = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    return is_print or isinstance(node, ast.Raise | ast.Assert)


def mutations(tree):
    """Change each number and operator in turn; yield after each change, and undo it then."""
    messages = {child for node in ast.walk(tree) if is_message(node) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if node in messages:
            continue
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            changed, before, after = "value", node.value, node.value + 1
        elif isinstance(node, ast.BinOp) and not isinstance(node.op, ast.BitOr):  # `int | float` is an annotation
            changed, before, after = "op", node.op, ast.LShift()  # which the code does not use
        elif isinstance(node, ast.Compare):
            other = ast.Lt() if isinstance(node.ops[0], ast.LtE) else ast.LtE()
            changed, before, after = "ops", node.ops, [other, *node.ops[1:]]
        else:
            continue
        setattr(node, changed, after)
        yield ast.unparse(node)
        setattr(node, changed, before)


def test_every_changed_number_and_operator_of_decisive_code_changes_its_hash():
    n_mutants = 0
    for entry in DECISIVE:
        for tree in statements(entry):
            before = source_hash(ast.unparse(tree))
            for mutant in mutations(tree):
                assert source_hash(ast.unparse(tree)) != before, f"{entry}: {mutant}"
                n_mutants += 1
    assert n_mutants > 300


SOURCE = '''
def f(x: float) -> float:
    """Twice x."""
    if x < 0:
        raise ValueError(f"x is {x}")
    assert x < 9, "too large"
    print("doubling", x)
    return g(2 * x, description="twice")
'''


def test_messages_and_formatting_do_not_change_the_hash_but_other_code_does():
    same = {
        '"""Twice x."""': '"""The double of x."""',
        "x: float) -> float": "x: int)",
        'ValueError(f"x is {x}")': 'ValueError(f"{x:.3g} is negative", 2)',
        '"too large"': '"large"',
        '    print("doubling", x)\n': "",
        'description="twice"': 'description="double"',
        "    return g(2 * x, ": "\n    # a comment\n    return g(\n        (2 * x), ",
    }
    other = {"2 *": "3 *", "x < 0": "x <= 0", "ValueError(": "OSError(", "g(": "h("}
    for old, new in (same | other).items():
        assert old in SOURCE
        assert (source_hash(SOURCE.replace(old, new)) == source_hash(SOURCE)) == (old in same), old


def test_a_definition_is_hashed_by_itself():
    text = "A = 1\n\nclass C:\n    def f(self):\n        return A\n\n    def g(self):\n        return 2\n"
    other = text.replace("return 2", "return 3").replace("A = 1", "A = 4")
    assert source_hash(text, "C.f") == source_hash(other, "C.f")
    assert source_hash(text, "A") != source_hash(other, "A")
    with pytest.raises(KeyError):
        source_hash(text, "C.h")


def test_every_file_that_training_imports_is_in_the_fingerprint_or_has_a_reason_not_to_be():
    decisive = {entry.partition(":")[0] for entry in DECISIVE}
    undecisive = {f"pipeline/{name}.py" for names in UNDECISIVE.values() for name in names.split()}
    assert not decisive & undecisive
    assert not imported_by("pipeline/training/train.py") - decisive - undecisive


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
