"""Store the files of a model as a registered version, fetch them, and verify every byte."""

import atexit
import re
import shutil
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipeline.data.openings import openings
from pipeline.data.token_files import open_part
from pipeline.data.tokenizer import load_tokenizer
from pipeline.system.errors import IntegrityError, ModelMissing
from pipeline.system.files import MANIFEST, read_json, sha256_file, verify_manifest, write_json
from pipeline.system.host import SOURCE_ROOT
from pipeline.tracking.mlflow_store import Store, long_timeout, translate_store_errors

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

TEMPORARY = "gpt2-to-target-"  # prefix of large temporary folders
REQUIREMENTS = "mlflow numpy psutil pydantic pyyaml safetensors tiktoken torch tqdm".split()  # of pyfunc.py
FOLDER_TAGS = {"model": "model_sha256", "tokens": "data_sha256"}  # folder -> tag with the hash of its manifest
LISTING = "files.json"  # hashes of a version's other files, such as code, MLmodel and params.yaml
FORMAT, FORMAT_TAG = "1", "format"  # of a version's files and tags; early versions lack the tag, and have format 1
LISTING_TAG = "files_sha256"  # hash of the listing; early versions lack it, and their other files are not verified
LOGGED_MODEL = "gpt2"  # name of the MLflow model that contains the files
REMEDY = (  # for a store that lacks a part of a version
    "repair it, or run `dvc repro -f -s register` in the project that trained the model, which registers it again"
)
ADDED_BY_MLFLOW = "registered_model_meta"  # MLflow writes this file into a version's folder when it loads the version


def label_of(version: "ModelVersion") -> str:
    return f"{version.name} version {version.version}"


def ensure_version(store: Store, project: Path, name: str, run: "Run", tags: dict[str, str]) -> "ModelVersion":
    """Find or create the version with this fingerprint and these weights, and set its tags.

    Stored files never change: a new version is created if the weights differ, or if the files of the existing version
    are missing or altered. Raises IntegrityError or ModelMissing if the stored files fail their verification.
    """
    from mlflow.entities import LoggedModelOutput

    client = store.client
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    same = " and ".join(f"tags.{key} = '{tags[key]}'" for key in ("fingerprint", "model_sha256"))
    found = client.search_model_versions(f"name = '{name}' and {same}")
    version = next((version for version in found if _is_intact(store, version)), None)
    if version is None:
        tags |= _store_files(store, project, run)
        source = client.get_logged_model(tags["model_id"]).artifact_location
        version = client.create_model_version(name, source, run.info.run_id, tags=tags, model_id=tags["model_id"])
        open_version(store, client.get_model_version(name, version.version))
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(name, version.version, key, value)
    version = client.get_model_version(name, version.version)
    model_id = version.tags.get("model_id")  # early versions lack it
    if model_id and model_id not in {output.model_id for output in run.outputs.model_outputs}:
        client.log_outputs(run.info.run_id, [LoggedModelOutput(model_id, step=0)])
    return version


def fetch_version(store: Store, version: "ModelVersion", place: str = "artifacts", copies: Path | None = None) -> Path:
    """Return the local path of `place` in a version's folder; its artifacts/ has model/, tokens/ and params.yaml.

    Nothing is verified. A local store gives its own file or folder; any other gives a copy in the folder `copies`, by
    default in one that is removed when this process ends. Raises one of `store_errors()` if the place does not exist.
    """
    from mlflow.artifacts import download_artifacts

    uri = store.client.get_model_version_download_uri(version.name, version.version)
    if _is_local(uri):
        copies = None
    elif copies is None:
        copies = Path(tempfile.mkdtemp(prefix=TEMPORARY))
        atexit.register(shutil.rmtree, copies, ignore_errors=True)
    path = f"{uri}/{place}".rstrip("/")
    with long_timeout():
        return Path(download_artifacts(artifact_uri=path, tracking_uri=store.uri, dst_path=copies))


def open_version(store: Store, version: "ModelVersion", copies: Path | None = None) -> Path:
    """Return the version's folder with model/, tokens/ and params.yaml, after verifying all files, code included.

    `copies`: as for `fetch_version`. No code is executed. Raises ModelMissing if files are missing or the store does
    not answer. Raises IntegrityError, with both hashes, if files are altered, or if `register` did not make the
    version, or if its format is unknown.
    """
    label = label_of(version)
    if (found := version.tags.get(FORMAT_TAG, FORMAT)) != FORMAT:
        raise IntegrityError(
            f"{label} has the format {found}, but this program reads format {FORMAT}: use the program that registered "
            "it, or a newer one"
        )
    for tag in (*FOLDER_TAGS.values(), *(version.tags.keys() & {LISTING_TAG})):
        if not re.fullmatch("[0-9a-f]{64}", version.tags.get(tag, "")):
            raise IntegrityError(
                f"{label} has no hash as its tag {tag}, so `register` did not make it: use another version"
            )
    with translate_store_errors(store.uri, label, REMEDY):
        folder = fetch_version(store, version, "", copies)
        verify_files(folder, version.tags, label, remove_caches=_is_local(version.source))
    return folder / "artifacts"


def verify_files(folder: Path, tags: dict[str, str], label: str, remove_caches: bool) -> None:
    """Compare a version's files with the hashes in its tags. Raises as `open_version` does.

    `remove_caches`: remove __pycache__ folders first. Python writes them when MLflow loads the version from the store's
    own folder, and would run forged ones in place of the verified source. A copy never contains such a folder.
    """
    hint = (
        f"{label} cannot be used; run `dvc repro -f -s register` in the project that trained it, "
        "which registers it again"
    )
    for name, tag in FOLDER_TAGS.items():
        if not (place := folder / "artifacts" / name).is_dir():
            raise ModelMissing(f"{place} is missing: {hint}")
        _verify_hash(place / MANIFEST, tags[tag], hint)
        verify_manifest(place, hint)
    if link := next((path for path in folder.rglob("*") if path.is_symlink()), None):
        raise IntegrityError(f"{link} is a symbolic link, which no version contains: {hint}")
    if LISTING_TAG not in tags:
        return
    _verify_hash(folder / LISTING, tags[LISTING_TAG], hint)
    for cache in [*folder.rglob("__pycache__")] if remove_caches else ():
        shutil.rmtree(cache, ignore_errors=True)  # files that could not be removed are refused below
    if not isinstance(expected := read_json(folder / LISTING), dict):
        raise IntegrityError(f"{folder / LISTING} is not a list of files: {hint}")
    if surplus := set(_listing(folder)) - expected.keys():
        raise IntegrityError(f"{folder / min(surplus)} is not one of its files: {hint}")
    for name, sha256 in expected.items():
        _verify_hash(folder / name, sha256, hint)


def _is_local(uri: str) -> bool:
    return urlsplit(uri).scheme in ("", "file")


def _listing(folder: Path) -> list[str]:
    """Names of a version's files, except those in a manifest and those that MLflow adds."""
    with_manifest = {folder / "artifacts" / name for name in FOLDER_TAGS}
    files = (path for path in folder.rglob("*") if path.is_file() and not with_manifest & {*path.parents})
    return sorted({path.relative_to(folder).as_posix() for path in files} - {LISTING, ADDED_BY_MLFLOW})


def _write_listing(folder: Path) -> str:
    """Write the listing with the hash of each file; return the hash of the listing."""
    write_json(folder / LISTING, {name: sha256_file(folder / name) for name in _listing(folder)})
    return sha256_file(folder / LISTING)


def _verify_hash(path: Path, expected: str, hint: str) -> None:
    if not path.is_file():
        raise IntegrityError(f"{path} is missing: {hint}")
    if (found := sha256_file(path)) != expected:
        raise IntegrityError(f"{path} is altered (SHA-256 {found}, expected {expected}): {hint}")


def _is_intact(store: Store, version: "ModelVersion") -> bool:
    with suppress(IntegrityError, ModelMissing):
        open_version(store, version)
        return True
    return False


def _store_files(store: Store, project: Path, run: "Run") -> dict[str, str]:
    """Store a version's files as a logged model of `run`; return the tags by which they are found.

    A logged model of the run that no version uses, left by a killed `register`, is deleted.
    """
    run_id, client = run.info.run_id, store.client
    in_use = {version.tags.get("model_id") for version in client.search_model_versions(f"run_id = '{run_id}'")}
    for model in client.search_logged_models([store.experiment_id], f"source_run_id = '{run_id}'"):
        if model.name == LOGGED_MODEL and model.model_id not in in_use:
            client.delete_logged_model(model.model_id)
    model_id = client.create_logged_model(store.experiment_id, LOGGED_MODEL, run_id, params=run.data.params).model_id
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        files = Path(folder) / "files"
        _save_files(files, project, run_id, model_id)
        sha256 = _write_listing(files)
        with long_timeout():
            client.log_model_artifacts(model_id, str(files))
    client.finalize_logged_model(model_id, "READY")
    # MLflow's SQL registry does not keep the model's id
    return {"model_id": model_id, LISTING_TAG: sha256, FORMAT_TAG: FORMAT}


def _first_prompt(project: Path) -> list[str]:
    """The beginning of the training text."""
    tokens = open_part(project / "data" / "tokens", "train")
    return openings(tokens, load_tokenizer(project / "models" / "model"), 1) or ["The"]


def _save_files(folder: Path, project: Path, run_id: str, model_id: str) -> None:
    """Write a version's folder: code, weights, tokenizer, tokens and params.yaml, without a pickle."""
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    from pipeline.model.sampling import Sampling

    package = SOURCE_ROOT / "pipeline"
    kinds = {int: "long", float: "double"}
    numbers = [ParamSpec(name, kinds[type(value)], value) for name, value in Sampling() if type(value) in kinds]
    stop = ParamSpec("stop", "string", [*Sampling().stop], shape=(-1,))
    save_model(
        folder,
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
            params=ParamSchema([*numbers, stop]),
        ),
        input_example=pd.DataFrame({"prompt": _first_prompt(project)}),
        pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS],
        mlflow_model=Model(run_id=run_id, model_id=model_id),
    )
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)
