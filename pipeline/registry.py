"""registry: a trained model with its evaluation -> one registered version, its aliases, and a gate before `champion`.

`register` may be killed anywhere and repeated: what is there is found, and the aliases move last.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypedDict

from pydantic import Field

from pipeline.config import Section
from pipeline.errors import IntegrityError, ModelMissing
from pipeline.files import locked, verify_manifest, write_json
from pipeline.results import read_metrics, read_run
from pipeline.runs import ensure_run
from pipeline.store import Store, first_line, naming_dead_store, open_store, store_errors
from pipeline.tokens import open_tokens
from pipeline.versions import ensure_version, fetch_version, version_tags

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE, CHAMPION = "candidate", "champion"
IS_CHAMPION = "is the champion"
BEFORE = "champion_before"  # tag of the registered model: the version that a rollback goes back to
ROLLED_BACK = "rolled_back"  # tag of a version that a rollback took the alias from
PASSED = "passed_gate"  # tag of a version, true or false; the tag `verdict` says why
LossOn = Callable[[Path, Path], float]  # project and token folder -> loss of the project's model on those tokens


class RegistryConfig(Section):
    """Under which name a model is registered, and what may become champion."""

    section_name: ClassVar[str] = "registry"

    model: str = Field(pattern=r"^[\w.-]+$")
    gate: float = Field(gt=0)  # largest target loss


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
    store fails, IntegrityError where model or tokens are altered, or where the metrics are not about this model.
    """
    if not (folder := project / "models" / "model").is_dir():
        raise ModelMissing(f"{folder} not found: run `dvc repro train`, which makes it")
    verify_manifest(folder)
    if (project / "reports" / "metrics.json").is_file():  # a model that is not evaluated yet is registered, not judged
        read_metrics(project / "reports", read_run(project / "models"))
    n_tokens = len(open_tokens(project / "data" / "tokens", "train"))
    with locked(root / "mlruns" / ".register.lock", wait=True), naming_dead_store(root):
        store = open_store(root)
        run = ensure_run(store, project)
        version = ensure_version(store, project, config.model, run, version_tags(project, run, n_tokens))
        store.client.set_registered_model_alias(config.model, CANDIDATE, version.version)
        verdict = _judge(store, project, config, version, loss_on or model_loss)
        if verdict.promotes:
            crown(store, config.model, version)
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


def crown(store: Store, name: str, version: "ModelVersion") -> str | None:
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
    from pipeline.checkpoint import load_model
    from pipeline.evaluate import corpus_loss
    from pipeline.machine import TrainConfig, prepare_machine
    from pipeline.windows import Rows

    params = read_run(project / "models")["params"]
    machine = prepare_machine(TrainConfig.model_validate(params["train"]))
    model = load_model(project / "models" / "model").to(machine.device)
    rows = Rows(open_tokens(tokens, "train"), model.vocabulary, machine.device)
    return corpus_loss(model, rows, params["windows"]["length"], machine.autocast())


def _judge(store: Store, project: Path, config: RegistryConfig, version: "ModelVersion", loss_on: LossOn) -> Verdict:
    """Whether `version` may be champion; a judgement that fails says no, and why."""
    number = store.client.get_registered_model(config.model).aliases.get(CHAMPION)
    if number is not None and str(number) == str(version.version):
        return Verdict(True, IS_CHAMPION)
    if ROLLED_BACK in version.tags:
        return Verdict(False, "was rolled back by hand")
    failures: tuple[type[Exception], ...] = (IntegrityError, ModelMissing, KeyError, ValueError, RuntimeError)
    failures += store_errors()
    try:
        if flaw := _flaw(project, config.gate):
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
    target = results["target_loss"]
    if target > gate:
        return f"target {target:g} is above the gate {gate:g}"
    if results["to_target"]["corpus"] is None or not loss < target:
        return f"corpus rule not met: loss {loss:.4f}, target {target:g}"
    return None


def _compare(
    store: Store, project: Path, version: "ModelVersion", champion: "ModelVersion", loss_on: LossOn
) -> Verdict:
    """Judge a version against the champion on the champion's own tokens."""
    n_tokens, needed = int(version.tags["train_tokens"]), int(champion.tags["train_tokens"])
    if n_tokens < needed:
        return Verdict(False, f"learnt {n_tokens:,} tokens, champion {champion.version} {needed:,}")
    if version.tags["data_sha256"] == champion.tags["data_sha256"]:
        loss = float(version.tags["corpus_loss"])
    else:
        loss = loss_on(project, fetch_version(store, champion, "tokens"))
    before = float(champion.tags["corpus_loss"])
    better = loss <= before
    reason = f"loss {loss:.4f} on the tokens of champion {champion.version}, whose own is {before:.4f}"
    return Verdict(better, reason if better else f"worse: {reason}")
