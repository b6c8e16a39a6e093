"""registry: a trained model with its evaluation -> one registered version, its aliases, and a gate before `champion`.

`register` may be killed anywhere and repeated: what is there is found, and the aliases move last.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import yaml

from pipeline.config.sections import RegistryConfig, TrainConfig
from pipeline.data.token_files import TokenFolder
from pipeline.registry.artifacts import ensure_version, verify_version
from pipeline.system.errors import IntegrityError, ModelMissing
from pipeline.system.files import MANIFEST, locked, read_json, sha256_file, verify_manifest, write_json
from pipeline.tracking.journal import STEPS, read_steps
from pipeline.tracking.mlflow_runs import ensure_run
from pipeline.tracking.mlflow_store import Store, first_line, naming_dead_store, open_store, store_errors
from pipeline.tracking.run_record import read_metrics, read_run

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE, CHAMPION = "candidate", "champion"
IS_CHAMPION = "is the champion"
BEFORE = "champion_before"  # tag of the registered model: the version that a rollback goes back to
ROLLED_BACK = "rolled_back"  # tag of a version that a rollback took the alias from
PASSED = "passed_gate"  # tag of a version, true or false; the tag `verdict` says why
SAME_LOSS = 0.01  # share by which two machines may differ on the loss of one model
LossOn = Callable[[Path, Path], float]  # project and token folder -> loss of the project's model on those tokens


class Registered(TypedDict):
    """What reports/registered.json says."""

    model: str
    version: str
    run_id: str
    fingerprint: str
    aliases: list[str]
    champion: bool
    reason: str


class Verdict(NamedTuple):
    promotes: bool
    reason: str


def register(root: Path, project: Path, config: RegistryConfig, loss_on: LossOn | None = None) -> Registered:
    """Register `project`/models/model in the store of `root`, one version a fingerprint, and judge it.

    `candidate` moves to it; `champion` only through the gate. Raises ModelMissing where the model is not there or the
    store fails, IntegrityError where model or tokens are altered, or where tokens or metrics are not this model's.
    """
    if not (folder := project / "models" / "model").is_dir():
        raise ModelMissing(f"{folder} not found: run `dvc repro train`, which makes it")
    verify_manifest(folder)
    run_record, tokens = read_run(project / "models"), project / "data" / "tokens"
    if (project / "reports" / "metrics.json").is_file():  # a model that is not evaluated yet is registered, not judged
        read_metrics(project / "reports", run_record)
    text = TokenFolder(tokens)
    if text.sha256 != run_record["data_sha256"]:
        raise IntegrityError(f"{tokens} is not what the present model was trained on: `dvc repro` brings them together")
    with locked(root / "mlruns" / ".register.lock", wait=True), naming_dead_store(root):
        store = open_store(root)
        run = ensure_run(store, project)
        version = ensure_version(store, project, config.model, run, _version_tags(project, run, len(text.train)))
        store.client.set_registered_model_alias(config.model, CANDIDATE, version.version)
        verdict = _judge(store, project, config, version, loss_on or model_loss)
        if verdict.promotes:
            set_champion(store, config.model, version)
        if verdict.reason != IS_CHAMPION or PASSED not in version.tags:  # how it became so stays known
            store.client.set_model_version_tag(config.model, version.version, "verdict", verdict.reason)
            store.client.set_model_version_tag(config.model, version.version, PASSED, str(verdict.promotes).lower())
        version = store.client.get_model_version(config.model, version.version)
    outcome = Registered(
        model=config.model,
        version=str(version.version),
        run_id=run.info.run_id,
        fingerprint=version.tags["fingerprint"],
        aliases=sorted(version.aliases),
        champion=verdict.promotes,
        reason=verdict.reason,
    )
    write_json(project / "reports" / "registered.json", outcome)
    return outcome


def set_champion(store: Store, name: str, version: "ModelVersion") -> str | None:
    """Move the alias champion to `version`; return the number of the one before, noted as what to roll back to."""
    before = store.client.get_registered_model(name).aliases.get(CHAMPION)
    if before is not None and str(before) != str(version.version):
        store.client.set_registered_model_tag(name, BEFORE, str(before))
    store.client.set_registered_model_alias(name, CHAMPION, version.version)
    if ROLLED_BACK in version.tags:
        store.client.delete_model_version_tag(name, version.version, ROLLED_BACK)
    return None if before is None else str(before)


def model_loss(project: Path, tokens: Path) -> float:
    """Loss of `project`'s model over all of `tokens`, in the windows and the precision that it was trained with."""
    from pipeline.data.batches import Split
    from pipeline.model.evaluate import corpus_loss
    from pipeline.model.weights import load_model
    from pipeline.system.device import prepare_machine

    params = read_run(project / "models")["params"]
    machine = prepare_machine(TrainConfig.model_validate(params["train"]))
    model = load_model(project / "models" / "model").to(machine.device)
    rows = Split(TokenFolder(tokens).train, model.vocabulary, machine.device)
    return corpus_loss(model, rows, params["windows"]["seq_len"], machine.autocast())


def _judge(store: Store, project: Path, config: RegistryConfig, version: "ModelVersion", loss_on: LossOn) -> Verdict:
    """Whether `version` may be champion; a judgement that fails says no, and why."""
    number = store.client.get_registered_model(config.model).aliases.get(CHAMPION)
    if number is not None and str(number) == str(version.version):
        return Verdict(True, IS_CHAMPION)
    if ROLLED_BACK in version.tags:
        return Verdict(False, "was rolled back by hand")
    failures: tuple[type[Exception], ...] = (IntegrityError, ModelMissing, LookupError, TypeError, ValueError)
    failures += (RuntimeError, *store_errors())
    try:
        if flaw := _flaw(project, config.max_target_loss):
            return Verdict(False, flaw)
        if number is None:
            return Verdict(True, "reached the target, and there was no champion")
        return _compare(store, project, version, store.client.get_model_version(config.model, number), loss_on)
    except failures as error:
        return Verdict(False, f"could not be judged: {type(error).__name__}: {first_line(error)}")


def _flaw(project: Path, gate: float) -> str | None:
    """Why the model may not be champion whoever else is, None where it may."""
    run = read_run(project / "models")
    loss, results = read_metrics(project / "reports", run)["corpus_loss"], run["results"]
    target, trained = results["target_loss"], results["corpus_loss"]
    if read_steps(project / "models" / STEPS)["corpus_loss"][results["model_step"]] != trained:
        return f"run.json is not what its journal says: loss {trained:.4f} at step {results['model_step']}"
    if not math.isclose(loss, trained, rel_tol=SAME_LOSS):
        return f"metrics.json says loss {loss:.4f}, the training's own look at its model {trained:.4f}: evaluate anew"
    if target > gate:
        return f"target {target:g} is above the gate {gate:g}"
    if results["to_target"]["corpus"] is None or not loss < target:
        return f"corpus rule not met: loss {loss:.4f}, target {target:g}"
    return None


def _compare(
    store: Store, project: Path, version: "ModelVersion", champion: "ModelVersion", loss_on: LossOn
) -> Verdict:
    """Judge a version against the champion on the champion's own tokens."""
    if missing := {"train_tokens", "data_sha256", "corpus_loss"} - champion.tags.keys():
        return Verdict(False, f"champion {champion.version} has no tag {min(missing)}, so that no `register` made it")
    n_tokens, needed = int(version.tags["train_tokens"]), int(champion.tags["train_tokens"])
    if n_tokens < needed:
        return Verdict(False, f"learnt {n_tokens:,} tokens, champion {champion.version} {needed:,}")
    if version.tags["data_sha256"] == champion.tags["data_sha256"]:
        loss = float(version.tags["corpus_loss"])
    else:
        loss = loss_on(project, verify_version(store, champion) / "tokens")
    before = float(champion.tags["corpus_loss"])
    better = loss <= before
    reason = f"loss {loss:.4f} on the tokens of champion {champion.version}, whose own is {before:.4f}"
    return Verdict(better, reason if better else f"worse: {reason}")


def _version_tags(project: Path, run: "Run", n_tokens: int) -> dict[str, str]:
    """What a version says about where it comes from and what it reached."""
    tags = {
        key: run.data.tags.get(key, "unknown") for key in ("fingerprint", "data_sha256", "git_commit", "tree_clean")
    }
    tags |= {"run_id": run.info.run_id, "train_tokens": str(n_tokens)}
    tags |= {"model_sha256": sha256_file(project / "models" / "model" / MANIFEST)}
    record = read_run(project / "models")
    metrics = project / "reports" / "metrics.json"
    loss = read_json(metrics).get("corpus_loss") if metrics.is_file() else None
    tags |= {} if loss is None else {"corpus_loss": str(loss)}
    try:
        tags |= {"inexact": "; ".join(record["inexact"])} if record.get("inexact") else {}
        results = record["results"]
        tags |= {"target_loss": str(results["target_loss"])}
        if reached := results["to_target"]["corpus"]:
            tags |= {"steps_to_target": str(reached["steps"]), "tokens_to_target": str(reached["tokens"])}
    except (LookupError, TypeError) as error:
        raise IntegrityError(
            f"{project / 'models' / 'run.json'} is no record of a run ({error}): `dvc repro` puts the right one there"
        ) from error
    return tags | _output_hashes(project / "dvc.lock")


def _output_hashes(lock: Path) -> dict[str, str]:
    """MD5 of the stages' outputs, as DVC noted them: {"md5.models/model": "..."}."""
    stages = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"] if lock.is_file() else {}
    outs = (out for stage in stages.values() for out in stage.get("outs", []))
    return {f"md5.{out['path']}": out["md5"] for out in outs if "md5" in out}
