"""The architecture: which package imports which, which library belongs where, and what dvc.yaml says of each stage."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import yaml

from pipeline.training.config import RUN_SECTIONS

ROOT = Path(__file__).parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
PACKAGES = {  # package -> what it may import
    "system": "config",
    "config": "system",
    "data": "config system",
    "model": "config system data",
    "tracking": "config system",
    "training": "config system data model tracking",
    "report": "config system tracking training",
    "cluster": "config system",
    "sweep": "cluster config system data tracking training report",
    "registry": "config system data model tracking training report",
    "ops": "cluster config system data model tracking training report sweep registry",
    "commands": "cluster config system data model tracking training report sweep registry ops",
    "__main__": "commands config system",
}
LIBRARIES = {  # library -> packages and modules that may import it
    "mlflow": "tracking registry sweep.mlflow_run ops.stale_runs",
    "optuna": "sweep",
    "submitit": "cluster",
    "matplotlib": "report sweep.figures",
    "gradio": "",
    "transformers": "",
    "pickle": "",
}
MODULES = sorted(path.relative_to(ROOT).with_suffix("") for path in (ROOT / "pipeline").rglob("*.py"))


def imports(path):
    """Dotted names that a file imports, anywhere in it; `from a import b` gives both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).with_suffix(".py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


IMPORTS = {path: imports(path) for path in MODULES}


def packages_in(names):
    return {name.split(".")[1] for name in names if name.startswith("pipeline.")} - {"__version__"}


def test_a_package_imports_only_what_the_table_allows():
    for path, names in IMPORTS.items():
        if package := path.parts[1].removesuffix("__init__"):
            assert packages_in(names) <= {package, *PACKAGES[package].split()}, path


def test_no_module_is_part_of_an_import_cycle():
    names = {".".join(path.parts).removesuffix(".__init__"): path for path in MODULES}
    graph = {name: IMPORTS[path] & names.keys() - {name} for name, path in names.items()}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def test_each_library_is_imported_only_where_it_belongs():
    for path, names in IMPORTS.items():
        for library in LIBRARIES.keys() & {name.split(".")[0] for name in names}:
            assert {path.parts[1], ".".join(path.parts[1:])} & set(LIBRARIES[library].split()), (path, library)


def test_pipeline_and_stages_do_not_import_the_page_and_the_page_imports_only_what_it_serves():
    for path in (*MODULES, *(ROOT / "stages").glob("*.py")):
        assert not {name.split(".")[0] for name in imports(path)} & {"webapp", "app"}, path
    for path in (ROOT / "app.py", *(ROOT / "webapp").rglob("*.py")):
        assert packages_in(imports(path)) <= {"config", "system", "data", "model", "tracking", "registry"}, path


def test_dvc_reruns_a_stage_when_its_code_or_its_params_change():
    """A stage depends on its script, on the packages that the script imports, and on all that these may import."""
    for name, stage in STAGES.items():
        imported = packages_in(imports(f"stages/{name}"))
        reached = imported.union(*(PACKAGES[package].split() for package in imported))
        declared = {dep for dep in stage["deps"] if dep.startswith(("pipeline", "stages"))}
        assert declared == {f"stages/{name}.py", *(f"pipeline/{package}" for package in reached)}, name
        assert {key.split(".")[0] for key in stage.get("params", [])} == sections_read_by(name), name


def sections_read_by(stage):
    """Sections of params.yaml that the script of a stage reads."""
    source = (ROOT / f"stages/{stage}.py").read_text()
    if "run_tracked" in source:
        return {section.section_name for section in RUN_SECTIONS}
    return {name.lower() for name in re.findall(r"\.section\((\w+)Config\)", source)}


def test_a_stage_is_a_short_script_with_a_description():
    for name, stage in STAGES.items():
        assert (ROOT / f"stages/{name}.py").read_text().count("\n") < 40, name
        assert stage["desc"], name
        assert stage["cmd"] == f"exec python -m stages.{name}"  # `exec`: no shell between DVC and the stage


def test_every_section_of_params_belongs_to_a_stage_to_the_sweep_or_to_slurm():
    whole = {section for stage in STAGES.values() for section in stage.get("params", []) if "." not in section}
    assert set(PARAMS) == whole | {"sweep", "slurm"}


def test_text_and_tokenizer_are_fetched_again_only_when_their_source_changes():
    for stage, module in {"download": "corpus", "tokenizer": "tokenizer"}.items():
        sources = [(ROOT / path).read_text() for path in (f"pipeline/data/{module}.py", f"stages/{stage}.py")]
        read = set(re.findall(r"config\.(\w+)", "".join(sources)))
        params = [key for key in STAGES[stage]["params"] if not key.startswith("model.")]
        assert params == [f"corpus.{key}" for key in PARAMS["corpus"] if key in read]
    kept = {"persist": True}  # DVC does not delete what may be right: `make_tokenizer` keeps it
    assert STAGES["tokenizer"]["outs"] == [{"data/tokenizer": kept}, "data/init"]


def test_published_weights_are_converted_again_when_they_or_the_shape_change_and_then_a_model_is_trained():
    source = (ROOT / "pipeline/model/published.py").read_text()
    read = {
        "model.init",
        *(f"model.{key}" for key in re.search(r"for key in (\(.*?\)) if getattr\(model", source)[1].split('"')[1::2]),
    }
    assert {key for key in STAGES["tokenizer"]["params"] if key.startswith("model.")} == read
    assert "weights" in STAGES["tokenizer"]["deps"]
    assert "data/init" in STAGES["train"]["deps"]
