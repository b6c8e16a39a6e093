"""versions: a run and its model's files -> one registered version that loads, and back.

Everything is looked for before it is made and mended where it is broken, so that a kill anywhere leaves nothing twice.
"""

import atexit
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import yaml

from pipeline.errors import IntegrityError, ModelMissing
from pipeline.files import MANIFEST, read_json, sha256_file, verify_manifest
from pipeline.results import read_run
from pipeline.sampling import Sampling
from pipeline.store import Store, store_errors

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

REQUIREMENTS = ("mlflow", "numpy", "pydantic", "pyyaml", "safetensors", "tiktoken", "torch", "tqdm")  # of serving.py
FOLDER_TAGS = {"model": "model_sha256", "tokens": "data_sha256"}  # the tag that holds the hash of its manifest
PARAMS_TAG = "params_sha256"  # versions of before this tag have their params.yaml unchecked


def ensure_version(store: Store, project: Path, name: str, run: "Run", tags: dict[str, str]) -> "ModelVersion":
    """Find or make the one version with this fingerprint and these weights; mend its files and its tags.

    Versions never change: where another machine gave the fingerprint other weights, they are a version of their own.
    """
    client = store.client
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    same = " and ".join(f"tags.{key} = '{tags[key]}'" for key in ("fingerprint", "model_sha256"))
    found = client.search_model_versions(f"name = '{name}' and {same}")
    if found and _is_whole(store, found[0]):
        version = found[0]
    else:
        model = client.get_logged_model(found[0].tags["model_id"]) if found else _logged_model(store, run)
        _log_files(store, project, run, model.model_id)
        tags |= {"model_id": model.model_id}  # which MLflow's SQL registry would forget
        tags |= {PARAMS_TAG: sha256_file(project / "params.yaml")}
        version = found[0] if found else client.create_model_version(
            name, model.artifact_location, run.info.run_id, tags=tags, model_id=model.model_id
        )  # fmt: skip
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(name, version.version, key, value)
    return client.get_model_version(name, version.version)


def fetch_version(store: Store, version: "ModelVersion", name: str = "") -> Path:
    """Folder `name`, model or tokens, of a version's files, or all of them: the store's own where it is local.

    Else it is a copy that is there until this process ends. Nothing in it is checked or run. Raises one of
    `store_errors()` where it is missing.
    """
    from mlflow.artifacts import download_artifacts

    uri, copy = store.client.get_model_version_download_uri(version.name, version.version), None
    if urlsplit(uri).scheme not in ("", "file"):
        copy = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
    path = f"{uri}/artifacts/{name}".rstrip("/")
    return Path(download_artifacts(artifact_uri=path, tracking_uri=store.uri, dst_path=copy))


def verify_version(store: Store, version: "ModelVersion") -> Path:
    """Fetch all of a version's files, model/, tokens/ and params.yaml, once every byte is what was registered.

    Nothing in them is run. Raises ModelMissing where they are gone, IntegrityError where they are altered, or where no
    `register` made the version; one of `store_errors()` where the store does not answer.
    """
    label = f"{version.name} version {version.version}"
    cure = f"{label} cannot be used until `dvc repro -f -s register`, where its model is, restores it"
    if not version.tags.keys() >= {*FOLDER_TAGS.values()}:
        raise IntegrityError(f"{label} has no tag model_sha256, so that no `register` made it: use another version")
    folder = fetch_version(store, version)
    for name, tag in FOLDER_TAGS.items():
        if not (folder / name).is_dir():
            raise ModelMissing(f"{folder / name} is missing: {cure}")
        _verify_hash(folder / name / MANIFEST, version.tags[tag], cure)
        verify_manifest(folder / name, cure)
    if PARAMS_TAG in version.tags:
        _verify_hash(folder / "params.yaml", version.tags[PARAMS_TAG], cure)
    return folder


def version_tags(project: Path, run: "Run", n_tokens: int) -> dict[str, str]:
    """What a version says about where it comes from and what it reached."""
    tags = {
        key: run.data.tags.get(key, "unknown") for key in ("fingerprint", "data_sha256", "git_commit", "tree_clean")
    }
    tags |= {"run_id": run.info.run_id, "train_tokens": str(n_tokens)}
    tags |= {"model_sha256": sha256_file(project / "models" / "model" / MANIFEST)}
    record = read_run(project / "models")
    tags |= {"inexact": "; ".join(record["inexact"])} if record.get("inexact") else {}
    results = record["results"]
    metrics = project / "reports" / "metrics.json"
    loss = read_json(metrics).get("corpus_loss") if metrics.is_file() else None
    tags |= {"target_loss": str(results["target_loss"])} | ({} if loss is None else {"corpus_loss": str(loss)})
    if reached := results["to_target"]["corpus"]:
        tags |= {"steps_to_target": str(reached["steps"]), "tokens_to_target": str(reached["tokens"])}
    return tags | _output_hashes(project / "dvc.lock")


def _verify_hash(path: Path, expected: str, cure: str) -> None:
    if not path.is_file():
        raise IntegrityError(f"{path} is missing: {cure}")
    if (found := sha256_file(path)) != expected:
        raise IntegrityError(f"{path} is altered (SHA-256 {found}, expected {expected}): {cure}")


def _is_whole(store: Store, version: "ModelVersion") -> bool:
    """Whether the version's files are there and unaltered."""
    broken: tuple[type[Exception], ...] = (IntegrityError, ModelMissing, *store_errors())
    try:
        verify_version(store, version)
    except broken:
        return False
    return True


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


def _log_files(store: Store, project: Path, run: "Run", model_id: str) -> None:
    """Give a logged model its files: code, weights, tokenizer, tokens, params.yaml; no pickle among them."""
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    package = Path(__file__).parent
    defaults = [
        (name, "long" if isinstance(value, int) else "double", value) for name, value in Sampling() if name != "stop"
    ]
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "files"
        save_model(
            files,
            python_model=str(package / "serving.py"),
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
            mlflow_model=Model(run_id=run.info.run_id, model_id=model_id),
        )
        for cache in files.rglob("__pycache__"):
            shutil.rmtree(cache)
        store.client.log_model_artifacts(model_id, str(files))
    store.client.finalize_logged_model(model_id, "READY")


def _output_hashes(lock: Path) -> dict[str, str]:
    """MD5 of the stages' outputs, as DVC noted them: {"md5.models/model": "..."}."""
    stages = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"] if lock.is_file() else {}
    outs = (out for stage in stages.values() for out in stage.get("outs", []))
    return {f"md5.{out['path']}": out["md5"] for out in outs if "md5" in out}
