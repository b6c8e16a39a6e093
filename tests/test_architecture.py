"""The architecture: modules import only what stands above them, and DVC knows each stage's sources and params."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import yaml

from pipeline.corpus import fetch_corpus
from pipeline.fingerprint import sources_reachable_from
from pipeline.run_config import RUN_SECTIONS

ROOT = Path(__file__).parent.parent
LAYERS = (
    "errors config distributed sharding files results documents corpus tokenizer tokens encode diagnose vocab windows "
    "cross_entropy machine model optim checkpoint provenance decoder sampling text_stream generate terminal evaluate "
    "train journal target timing facts fingerprint interrupt progress run_config text memory store runs recorder "
    "tracking run_folder serving versions registry catalog retrain run_results tracked_run drawing plots recipes "
    "model_card space_card export stage extrapolation space study study_run study_plots worker sweep finding "
    "environment dvc_cache leftovers relocation stranded doctor __main__"
).split()
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())


def imports(path):
    """Dotted names of the modules that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def first_party_imports(path):
    return {name.removeprefix("pipeline.") for name in imports(path) if name.startswith("pipeline.")}


def test_every_module_has_its_place():
    assert {path.stem for path in (ROOT / "pipeline").glob("*.py")} == {*LAYERS, "__init__"}


@pytest.mark.parametrize("name", LAYERS)
def test_a_module_imports_only_modules_above_it(name):
    assert first_party_imports(f"pipeline/{name}.py") <= set(LAYERS[: LAYERS.index(name)])


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        (
            "mlflow",
            set("store runs recorder serving versions registry catalog retrain study_run stranded".split()),
        ),
        ("optuna", {"study", "study_plots", "worker", "sweep"}),
        ("gradio", set()),
        ("matplotlib", {"drawing", "plots", "study_plots"}),
        ("transformers", set()),
        ("pickle", set()),
    ],
)
def test_each_library_is_imported_where_it_belongs(library, allowed):
    users = {name for name in LAYERS if any(i.split(".")[0] == library for i in imports(f"pipeline/{name}.py"))}
    assert users <= allowed


def test_neither_library_nor_stages_know_the_page():
    for path in (*(ROOT / "pipeline").glob("*.py"), *(ROOT / "stages").glob("*.py")):
        assert not {name.split(".")[0] for name in imports(path)} & {"webapp", "app"}


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_reruns_a_stage_when_its_code_changes(stage):
    declared = [dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")]
    assert declared == sources_reachable_from(f"stages/{stage}.py", ROOT)


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_reruns_a_stage_when_its_params_change(stage):
    assert {key.split(".")[0] for key in STAGES[stage].get("params", [])} == sections_read_by(stage)


def sections_read_by(stage):
    """Sections whose classes the script asks params.yaml for."""
    source = (ROOT / f"stages/{stage}.py").read_text()
    if "run_tracked" in source:
        return {section.section_name for section in RUN_SECTIONS}
    asked = {part.split(")")[0] for part in source.split(".section(")[1:]}
    return {name.removesuffix("Config").lower() for name in asked}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_a_thin_script_that_says_what_it_does(stage):
    assert (ROOT / f"stages/{stage}.py").read_text().count("\n") < 40
    assert STAGES[stage]["desc"]
    assert STAGES[stage]["cmd"] == f"exec python -m stages.{stage}"


def test_every_section_of_params_belongs_to_a_stage():
    assert set(PARAMS) == {
        section for stage in STAGES.values() for section in stage.get("params", []) if "." not in section
    } | {"sweep"}


def test_the_text_is_fetched_again_only_when_its_source_changes():
    read = set(re.findall(r"config\.(\w+)", inspect.getsource(fetch_corpus)))
    assert STAGES["download"]["params"] == [f"corpus.{key}" for key in PARAMS["corpus"] if key in read]
