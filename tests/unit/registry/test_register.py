"""What `register` reads from a project: files that belong together, and the numbers that the gate judges."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from fixtures_mlflow import trained_project

from pipeline.registry.register import _version_tags, candidate_of, read_project
from pipeline.system.errors import InputError, IntegrityError, ModelMissing

METRICS, RUN = "reports/metrics.json", "models/run.json"
RUN_IN_STORE = SimpleNamespace(data=SimpleNamespace(tags={"data_sha256": "d"}), info=SimpleNamespace(run_id="r"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return trained_project(tmp_path / "project")


def edited(name: str, **changes):
    """Change keys of a JSON file; a dictionary changes keys of the inner one, an empty one replaces it."""

    def edit(project: Path) -> None:
        values = json.loads((project / name).read_text())
        values |= {key: values[key] | value if value and key == "results" else value for key, value in changes.items()}
        (project / name).write_text(json.dumps(values))

    return edit


def written(name: str, text: str):
    return lambda project: (project / name).write_text(text)


def other_tokens(project: Path) -> None:
    other = trained_project(project / "other", salt=7)
    shutil.copytree(other / "data", project / "data", dirs_exist_ok=True)


def read_all(project: Path):
    record, metrics, n_tokens = read_project(project)
    tags = _version_tags(project, RUN_IN_STORE, record, metrics, n_tokens)
    return candidate_of(project, tags, record, metrics)


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (edited(METRICS, fingerprint="another"), IntegrityError, "is not about the run"),
        (written(METRICS, "[]"), IntegrityError, "is not about the run"),
        (written(METRICS, "{"), IntegrityError, "is not JSON"),
        (edited(RUN, fingerprint="another"), IntegrityError, "is not about the run another"),
        (edited(RUN, results={}), IntegrityError, r"run\.json is not the record of a run"),
        (written(RUN, "[]"), IntegrityError, r"run\.json is not the record of a run: `dvc repro`"),
        (written(RUN, '{"fingerprint": "x"}'), IntegrityError, r"run\.json is not the record of a run"),
        (lambda project: (project / RUN).unlink(), InputError, r"run\.json not found: run `dvc repro`"),
        (other_tokens, IntegrityError, "is not what the model was trained on"),
        (written("models/model/model.safetensors", "altered!"), IntegrityError, r"model\.safetensors is altered"),
        (lambda project: shutil.rmtree(project / "models" / "model"), ModelMissing, "run `dvc repro train`"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(edit, error, words, project):  # C6
    edit(project)
    with pytest.raises(error, match=words) as raised:
        read_all(project)
    assert "\n" not in str(raised.value)


def test_the_gate_gets_the_numbers_of_each_file(project):  # C6
    edited(METRICS, sliding_loss=0.01)(project)
    edited(RUN, results={"loss": 0.02, "model_step": 10})(project)
    for rule, loss, journal_loss in (("corpus", 1.5, 1.5), ("sliding", 0.01, 0.4)):
        edited(RUN, results={"rule": rule})(project)
        candidate = read_all(project)
        assert (candidate.rule, candidate.loss, candidate.journal_loss) == (rule, loss, journal_loss)
    assert candidate.trained_loss == 0.02
    assert (candidate.model_step, candidate.target_loss, candidate.n_tokens) == (10, 0.1, 64)
    assert not candidate.rolled_back
    (project / METRICS).unlink()
    assert read_all(project).loss is None
