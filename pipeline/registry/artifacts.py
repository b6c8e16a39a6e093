"""versions: a run and its model's files -> one registered version that loads, and back.

Everything is looked for before it is made and mended where it is broken, so that a kill anywhere leaves nothing twice.
"""

import atexit
import os
import re
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipeline.model.sampling import Sampling
from pipeline.system.errors import IntegrityError, ModelMissing
from pipeline.system.files import MANIFEST, read_json, sha256_file, verify_manifest, write_json
from pipeline.system.host import SOURCE_ROOT, git_info
from pipeline.tracking.mlflow_store import Store, store_errors

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

TEMPORARY = "gpt2-to-target-"  # prefix of large folders in the system's temporary one; their maker's pid follows
REQUIREMENTS = ("mlflow", "numpy", "pydantic", "pyyaml", "safetensors", "tiktoken", "torch", "tqdm")  # of serving.py
FOLDER_TAGS = {"model": "model_sha256", "tokens": "data_sha256"}  # the tag that holds the hash of its manifest
LISTING = "files.json"  # hashes of a version's other files: code, MLmodel, params.yaml and so on
LISTING_TAG = "files_sha256"  # hash of the listing; versions of before this tag have those files unchecked,
PARAMS_TAG = "params_sha256"  # but for params.yaml, which this tag of theirs is about
RESTORED = "restored"  # tag: from which commit a version got its code anew, once it was altered or lost
ADDED_BY_USE = "registered_model_meta"  # written into a version's folder by MLflow, when it loads it


def ensure_version(store: Store, project: Path, name: str, run: "Run", tags: dict[str, str]) -> "ModelVersion":
    """Find or make the one version with this fingerprint and these weights; mend its files and its tags.

    Versions never change: where another machine gave the fingerprint other weights, they are a version of their own.
    Raises IntegrityError or ModelMissing where what was stored does not come back whole.
    """
    client = store.client
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    same = " and ".join(f"tags.{key} = '{tags[key]}'" for key in ("fingerprint", "model_sha256"))
    found = client.search_model_versions(f"name = '{name}' and {same}")
    version = next((version for version in found if _is_whole(store, version)), None)
    if version is None:
        broken = next((version for version in found if _is_in_its_place(store, version)), None)
        model = client.get_logged_model(broken.tags["model_id"]) if broken else _logged_model(store, run)
        _set_aside(model.artifact_location)
        tags |= {"model_id": model.model_id}  # which MLflow's SQL registry would forget
        tags |= {LISTING_TAG: _log_files(store, project, run, model.model_id)}
        tags |= {RESTORED: _present_code()} if broken else {}
        version = broken or client.create_model_version(
            name, model.artifact_location, run.info.run_id, tags=tags, model_id=model.model_id
        )
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(name, version.version, key, value)
    version = client.get_model_version(name, version.version)
    if LISTING_TAG in tags:  # its files were stored just now
        verify_version(store, version)
    return version


def fetch_version(store: Store, version: "ModelVersion", name: str = "") -> Path:
    """Folder `name`, model or tokens, of a version's files, or all of them: the store's own where it is local.

    Else it is a copy that is there until this process ends. Nothing in it is checked or run. Raises one of
    `store_errors()` where it is missing.
    """
    return _fetch(store, version, f"artifacts/{name}")


def verify_version(store: Store, version: "ModelVersion") -> Path:
    """Fetch all of a version's files, model/, tokens/ and params.yaml, once every byte is what was registered.

    That includes the code that MLflow would run. Here nothing is run. Raises ModelMissing where files are gone,
    IntegrityError where they are altered, or where no `register` made the version; one of `store_errors()` where the
    store does not answer.
    """
    label = f"{version.name} version {version.version}"
    hint = f"{label} cannot be used until `dvc repro -f -s register`, where its model is, restores it"
    for tag in (*FOLDER_TAGS.values(), *(version.tags.keys() & {LISTING_TAG, PARAMS_TAG})):
        if not re.fullmatch("[0-9a-f]{64}", version.tags.get(tag, "")):
            raise IntegrityError(f"{label} has no hash as its tag {tag}, so that no `register` made it: use another")
    whole = _fetch(store, version)
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
        _verify_listing(whole, hint)
    elif PARAMS_TAG in version.tags:
        _verify_hash(folder / "params.yaml", version.tags[PARAMS_TAG], hint)
    return folder


def temporary_prefix() -> str:
    """What a large temporary folder is named by, so that one whose maker was killed can be told."""
    return f"{TEMPORARY}{os.getpid()}-"


def _fetch(store: Store, version: "ModelVersion", place: str = "") -> Path:
    """What stands at `place` in a version's folder, as `fetch_version` has it."""
    from mlflow.artifacts import download_artifacts

    uri, copy = store.client.get_model_version_download_uri(version.name, version.version), None
    if not _is_local(uri):
        copy = tempfile.mkdtemp(prefix=temporary_prefix())
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
    path = f"{uri}/{place}".rstrip("/")
    return Path(download_artifacts(artifact_uri=path, tracking_uri=store.uri, dst_path=copy))


def _is_local(uri: str) -> bool:
    return urlsplit(uri).scheme in ("", "file")


def _listing(whole: Path) -> list[str]:
    """Names of a version's files that the manifests of model and tokens do not hold, and that a use does not add."""
    elsewhere = {whole / "artifacts" / name for name in FOLDER_TAGS}
    files = (path for path in whole.rglob("*") if path.is_file() and not elsewhere & {*path.parents})
    return sorted({path.relative_to(whole).as_posix() for path in files} - {LISTING, ADDED_BY_USE})


def _write_listing(whole: Path) -> str:
    """Note the hash of each file; return the hash of that."""
    write_json(whole / LISTING, {name: sha256_file(whole / name) for name in _listing(whole)})
    return sha256_file(whole / LISTING)


def _verify_listing(whole: Path, hint: str) -> None:
    """Raise IntegrityError, naming the file, unless a version's folder holds what its listing says, and no more."""
    expected = read_json(whole / LISTING)
    if not isinstance(expected, dict):
        raise IntegrityError(f"{whole / LISTING} is no listing: {hint}")
    for name in _listing(whole):
        if name not in expected:
            raise IntegrityError(f"{whole / name} is not one of its files: {hint}")
    for name, sha256 in expected.items():
        _verify_hash(whole / name, sha256, hint)


def _verify_hash(path: Path, expected: str, hint: str) -> None:
    if not path.is_file():
        raise IntegrityError(f"{path} is missing: {hint}")
    if (found := sha256_file(path)) != expected:
        raise IntegrityError(f"{path} is altered (SHA-256 {found}, expected {expected}): {hint}")


def _is_whole(store: Store, version: "ModelVersion") -> bool:
    """Whether the version's files are there and unaltered."""
    broken: tuple[type[Exception], ...] = (IntegrityError, ModelMissing, *store_errors())
    try:
        verify_version(store, version)
    except broken:
        return False
    return True


def _is_in_its_place(store: Store, version: "ModelVersion") -> bool:
    """Whether a version's files lie where those of its logged model do, so that storing these anew mends it."""
    from mlflow.exceptions import MlflowException

    try:
        model = store.client.get_logged_model(version.tags.get("model_id", ""))
    except MlflowException:
        return False
    return bool(model.artifact_location == version.source)


def _set_aside(uri: str) -> None:
    """Keep what is where a version is to be stored, so that nothing of it is taken for the version's; if it is here."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    if _is_local(uri) and (folder := Path(local_file_uri_to_path(uri))).is_dir() and any(folder.iterdir()):
        aside = next(path for i in range(1, 1000) if not (path := folder.with_name(f"{folder.name}.{i}")).exists())
        folder.rename(aside)
        print(f"{folder} is not as registered: stored anew; what was there is kept in {aside}")


def _present_code() -> str:
    facts = git_info()
    return f"code of commit {facts['git_commit']}{'' if facts['tree_clean'] == 'true' else ', with changes'}"


def _logged_model(store: Store, run: "Run") -> "LoggedModel":
    """Find the run's model, of which a killed `register` may have left an empty one, or create it."""
    from mlflow.entities import LoggedModelOutput

    run_id = run.info.run_id
    found = store.client.search_logged_models([store.experiment_id], f"source_run_id = '{run_id}'")
    model = found[0] if found else store.client.create_logged_model(
        store.experiment_id, "gpt2", run_id, params=run.data.params
    )  # fmt: skip
    if model.model_id not in {output.model_id for output in run.outputs.model_outputs}:
        store.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return model


def _log_files(store: Store, project: Path, run: "Run", model_id: str) -> str:
    """Give a logged model its files; return the hash of their listing."""
    with tempfile.TemporaryDirectory(prefix=temporary_prefix()) as folder:
        whole = Path(folder) / "files"
        _save_files(whole, project, run.info.run_id, model_id)
        sha256 = _write_listing(whole)
        store.client.log_model_artifacts(model_id, str(whole))
    store.client.finalize_logged_model(model_id, "READY")
    return sha256


def _save_files(whole: Path, project: Path, run_id: str, model_id: str) -> None:
    """Write a version's folder: code, weights, tokenizer, tokens, params.yaml; no pickle among them."""
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

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
