"""Store a run and its model's files as one registered version, fetch them, and verify every byte."""

import atexit
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipeline.system.errors import IntegrityError, ModelMissing
from pipeline.system.files import MANIFEST, read_json, sha256_file, verify_manifest, write_json
from pipeline.system.host import SOURCE_ROOT
from pipeline.tracking.mlflow_store import Store, first_line, store_errors

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

TEMPORARY = "gpt2-to-target-"  # prefix of large temporary folders
REQUIREMENTS = "mlflow numpy psutil pydantic pyyaml safetensors tiktoken torch tqdm".split()  # of pyfunc.py
FOLDER_TAGS = {"model": "model_sha256", "tokens": "data_sha256"}  # the tag that holds the hash of its manifest
LISTING = "files.json"  # hashes of a version's other files: code, MLmodel, params.yaml and so on
LISTING_TAG = "files_sha256"  # hash of the listing; the first versions lack it, and these files are not verified
LOGGED_MODEL = "gpt2"  # name in MLflow of what holds the files
ADDED_BY_USE = "registered_model_meta"  # written into a version's folder by MLflow when it loads it


def label_of(version: "ModelVersion") -> str:
    return f"{version.name} version {version.version}"


def ensure_version(store: Store, project: Path, name: str, run: "Run", tags: dict[str, str]) -> "ModelVersion":
    """Find or make the version with this fingerprint and these weights, and set its tags.

    Stored files never change: where a machine gave the fingerprint other weights, or where the files of a version are
    lost or altered, a new version is made. Raises IntegrityError or ModelMissing where what was stored does not come
    back whole.
    """
    from mlflow.entities import LoggedModelOutput

    client = store.client
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    same = " and ".join(f"tags.{key} = '{tags[key]}'" for key in ("fingerprint", "model_sha256"))
    found = client.search_model_versions(f"name = '{name}' and {same}")
    version = next((version for version in found if _is_whole(store, version)), None)
    if version is None:
        tags |= _store_files(store, project, run)
        source = client.get_logged_model(tags["model_id"]).artifact_location
        version = client.create_model_version(name, source, run.info.run_id, tags=tags, model_id=tags["model_id"])
        open_version(store, client.get_model_version(name, version.version))
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(name, version.version, key, value)
    version = client.get_model_version(name, version.version)
    model_id = version.tags.get("model_id")  # the first versions lack it
    if model_id and model_id not in {output.model_id for output in run.outputs.model_outputs}:
        client.log_outputs(run.info.run_id, [LoggedModelOutput(model_id, step=0)])
    return version


def fetch_version(store: Store, version: "ModelVersion", place: str = "artifacts") -> Path:
    """What is at `place` in a version's folder, in which artifacts/ has model/, tokens/ and params.yaml.

    Nothing is verified. It is the store's own where that is local, else a copy that is removed when this process ends.
    Raises one of `store_errors()` where it is missing.
    """
    from mlflow.artifacts import download_artifacts

    uri, copy = store.client.get_model_version_download_uri(version.name, version.version), None
    if not _is_local(uri):
        copy = tempfile.mkdtemp(prefix=TEMPORARY)
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
    path = f"{uri}/{place}".rstrip("/")
    return Path(download_artifacts(artifact_uri=path, tracking_uri=store.uri, dst_path=copy))


@contextmanager
def naming_failure(store: Store, what: str) -> Iterator[None]:
    """Turn the store's errors into a ModelMissing of one line about `what`, which was being read or changed."""
    try:
        yield
    except store_errors() as error:
        raise ModelMissing(
            f"could not read {what} from MLflow's store {store.uri} ({first_line(error)}): repair the store, "
            "or `dvc repro -f -s register`, where the model was made, registers it again"
        ) from error


def open_version(store: Store, version: "ModelVersion") -> Path:
    """The version's folder with model/, tokens/ and params.yaml; every byte, also of the code, is what was registered.

    Nothing is run. Raises ModelMissing where files are gone or the store does not answer, IntegrityError, with both
    hashes, where they are altered, or where no `register` made the version.
    """
    label = label_of(version)
    hint = f"{label} cannot be used; `dvc repro -f -s register`, where its model is, registers it again"
    for tag in (*FOLDER_TAGS.values(), *(version.tags.keys() & {LISTING_TAG})):
        if not re.fullmatch("[0-9a-f]{64}", version.tags.get(tag, "")):
            raise IntegrityError(
                f"{label} has no hash as its tag {tag}, it was not made by `register`: use another version"
            )
    with naming_failure(store, label):
        whole = fetch_version(store, version, "")
        folder = whole / "artifacts"
        for name, tag in FOLDER_TAGS.items():
            if not (folder / name).is_dir():
                raise ModelMissing(f"{folder / name} is missing: {hint}")
            _verify_hash(folder / name / MANIFEST, version.tags[tag], hint)
            verify_manifest(folder / name, hint)
        if link := next((path for path in whole.rglob("*") if path.is_symlink()), None):
            raise IntegrityError(f"{link} is a link, and may lead anywhere: {hint}")
        if LISTING_TAG in version.tags:
            _verify_hash(whole / LISTING, version.tags[LISTING_TAG], hint)
            if _is_local(version.source):  # where Python caches what MLflow runs, and would run what it finds cached
                for cache in whole.rglob("__pycache__"):
                    shutil.rmtree(cache)
            if not isinstance(expected := read_json(whole / LISTING), dict):
                raise IntegrityError(f"{whole / LISTING} is not a listing: {hint}")
            if surplus := set(_listing(whole)) - expected.keys():
                raise IntegrityError(f"{whole / min(surplus)} is not one of its files: {hint}")
            for name, sha256 in expected.items():
                _verify_hash(whole / name, sha256, hint)
    return folder


def _is_local(uri: str) -> bool:
    return urlsplit(uri).scheme in ("", "file")


def _listing(whole: Path) -> list[str]:
    """Names of the files that neither a manifest lists nor MLflow adds."""
    elsewhere = {whole / "artifacts" / name for name in FOLDER_TAGS}
    files = (path for path in whole.rglob("*") if path.is_file() and not elsewhere & {*path.parents})
    return sorted({path.relative_to(whole).as_posix() for path in files} - {LISTING, ADDED_BY_USE})


def _write_listing(whole: Path) -> str:
    """Write the hash of each file; return the hash of that."""
    write_json(whole / LISTING, {name: sha256_file(whole / name) for name in _listing(whole)})
    return sha256_file(whole / LISTING)


def _verify_hash(path: Path, expected: str, hint: str) -> None:
    if not path.is_file():
        raise IntegrityError(f"{path} is missing: {hint}")
    if (found := sha256_file(path)) != expected:
        raise IntegrityError(f"{path} is altered (SHA-256 {found}, expected {expected}): {hint}")


def _is_whole(store: Store, version: "ModelVersion") -> bool:
    with suppress(IntegrityError, ModelMissing):
        open_version(store, version)
        return True
    return False


def _store_files(store: Store, project: Path, run: "Run") -> dict[str, str]:
    """Store a version's files as a logged model of `run`; return the tags that lead to them.

    What a killed `register` left, a logged model of the run that no version uses, is deleted.
    """
    run_id, client = run.info.run_id, store.client
    in_use = {version.tags.get("model_id") for version in client.search_model_versions(f"run_id = '{run_id}'")}
    for model in client.search_logged_models([store.experiment_id], f"source_run_id = '{run_id}'"):
        if model.name == LOGGED_MODEL and model.model_id not in in_use:
            client.delete_logged_model(model.model_id)
    model_id = client.create_logged_model(store.experiment_id, LOGGED_MODEL, run_id, params=run.data.params).model_id
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        whole = Path(folder) / "files"
        _save_files(whole, project, run_id, model_id)
        sha256 = _write_listing(whole)
        client.log_model_artifacts(model_id, str(whole))
    client.finalize_logged_model(model_id, "READY")
    return {"model_id": model_id, LISTING_TAG: sha256}  # MLflow's SQL registry would forget the model's id


def _save_files(whole: Path, project: Path, run_id: str, model_id: str) -> None:
    """Write a version's folder: code, weights, tokenizer, tokens, params.yaml; no pickle among them."""
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    from pipeline.model.sampling import Sampling

    package = SOURCE_ROOT / "pipeline"
    defaults = [
        (name, "long" if isinstance(value, int) else "double", value) for name, value in Sampling() if name != "stop"
    ]
    save_model(
        whole,
        python_model=str(package / "registry" / "pyfunc.py"),
        code_paths=[str(package)],
        artifacts={
            "model": str(project / "models" / "model"),
            "tokens": str(project / "data" / "tokens"),
            "params": str(project / "params.yaml"),
        },
        signature=ModelSignature(
            inputs=Schema([ColSpec("string", "prompt")]),
            outputs=Schema([ColSpec("string")]),
            params=ParamSchema([ParamSpec(*default) for default in defaults]),
        ),
        input_example=pd.DataFrame({"prompt": ["ROMEO:"]}),
        pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS],
        mlflow_model=Model(run_id=run_id, model_id=model_id),
    )
    for cache in whole.rglob("__pycache__"):
        shutil.rmtree(cache)
