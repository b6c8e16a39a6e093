"""Register a trained model as a version, move its aliases, and let the gate judge it for champion."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.sections import RegistryConfig
from pipeline.data.token_files import TokenFolder
from pipeline.registry.artifacts import ensure_version, fetch_version
from pipeline.registry.catalog import CANDIDATE, CHAMPION, bits_name, rule_alias
from pipeline.registry.promotion import (
    PASSED,
    VERDICT,
    Candidate,
    Champion,
    Verdict,
    flaw_of,
    is_rolled_back,
    judge,
    model_loss,
    next_step,
    replaces,
    set_best,
    set_champion,
)
from pipeline.system.errors import InputError, IntegrityError, ModelMissing, first_line
from pipeline.system.files import MANIFEST, locked, read_json, sha256_file, verify_manifest, write_json
from pipeline.tracking.descriptions import Result, is_given_model_note, model_note, version_note
from pipeline.tracking.journal import EVALUATED_LOSSES, STEPS, read_records, read_steps
from pipeline.tracking.mlflow_runs import ensure_run
from pipeline.tracking.mlflow_store import Store, open_store, store_errors, store_uri, translate_store_errors
from pipeline.tracking.run_record import read_metrics, read_run
from pipeline.training.target import RULES
from pipeline.training.target_result import result_of

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

LOSS_TAGS = tuple(name for loss in EVALUATED_LOSSES for name in (loss, bits_name(loss)))
IS_CHAMPION, IS_BEST = "is the champion", "is the best version of its rule"
AGAIN = "then `dvc repro -f -s register`"
BROKEN: tuple[type[Exception], ...] = (IntegrityError, ModelMissing, LookupError, TypeError, ValueError, RuntimeError)
LossOn = Callable[[Path, Path, str], float]  # project, token folder, loss of LOSSES -> that loss of the project's model


def register(root: Path, project: Path, config: RegistryConfig, loss_on: LossOn = model_loss) -> dict[str, Any]:
    """Register `project`/models/model in the store of `root`, one version for each fingerprint, and judge it.

    The alias candidate moves to the version; that of its target rule and champion move only if the gate allows it.
    `loss_on` is used if the best version so far was trained on another text. A call that was killed can be repeated,
    since the aliases move last. Returns the content of reports/registered.json. Raises ModelMissing if the model is
    missing or the store fails, IntegrityError if model or tokens are altered, or if tokens or metrics belong to another
    model.
    """
    record, metrics, n_tokens = read_project(project)
    result = result_of(read_records(project / "models"), record["params"].get("target", {}))
    lock = locked(root / "mlruns" / ".register.lock", wait=True)
    with lock, translate_store_errors(store_uri(root), hint=AGAIN):
        print("part 1 of 3: open MLflow's store, which is created if there is none", flush=True)
        store = open_store(root)
        print("part 2 of 3: complete the run in the store", flush=True)
        run = ensure_run(store, project, record, result)
        tags = _version_tags(project, run, record, metrics, n_tokens)
        print("part 3 of 3: register the model, and compare it with the champion", flush=True)
        version = ensure_version(store, project, config.model, run, tags)
        _describe(store, version, run, record, metrics, result)
        store.client.set_registered_model_alias(config.model, CANDIDATE, version.version)
        verdict = _judge(store, project, config, version, record, metrics, loss_on)
        if verdict.is_best:  # first: if it is killed in between, the next call moves the alias champion
            set_best(store, config.model, version)
        if verdict.promotes:
            set_champion(store, config.model, version)
        if verdict.reason not in (IS_CHAMPION, IS_BEST) or PASSED not in version.tags:  # else keep its first reason
            passed = str(verdict.is_best or verdict.promotes).lower()
            for key, value in ((VERDICT, verdict.reason), (PASSED, passed)):
                store.client.set_model_version_tag(config.model, version.version, key, value)
        version = store.client.get_model_version(config.model, version.version)
        champion = store.client.get_registered_model(config.model).aliases.get(CHAMPION)
        differs = _difference(store.client.get_model_version(config.model, champion).tags, tags) if champion else None
        next_ = next_step(str(version.version), champion, differs)
    outcome = {
        "model": config.model,
        "version": str(version.version),
        "run_id": run.info.run_id,
        "fingerprint": version.tags["fingerprint"],
        "rule": tags["rule"],
        "aliases": sorted(version.aliases),
        "champion": verdict.promotes,
        "reason": verdict.reason,
        "next_step": None if verdict.promotes else next_,
    }
    write_json(project / "reports" / "registered.json", outcome)
    return outcome


def read_project(project: Path) -> tuple[dict[str, Any], dict[str, Any] | None, int]:
    """Verify model, tokens and reports; return run.json, metrics.json if there is one, and the number of tokens.

    Raises as `register` does.
    """
    if not (folder := project / "models" / "model").is_dir():
        raise ModelMissing(f"{folder} not found: run `dvc repro train`, which makes it")
    verify_manifest(folder)
    record, metrics = read_run(project / "models"), None
    if (project / "reports" / "metrics.json").is_file():  # a model that is not evaluated is registered, not promoted
        metrics = read_metrics(project / "reports", record)
    text = TokenFolder(project / "data" / "tokens")
    if text.sha256 != record["data_sha256"]:
        raise IntegrityError(f"{text.folder} is not what the model was trained on: `dvc repro` makes both match")
    return record, metrics, len(text.train)


def _describe(
    store: Store,
    version: "ModelVersion",
    run: "Run",
    record: dict[str, Any],
    metrics: dict[str, Any] | None,
    result: Result | None,
) -> None:
    """Set the descriptions of the registered model and the version, unless a user has changed them."""
    name, tags = version.name, run.data.tags
    before, note = (version_note(name, tags, record, result, known) for known in ({}, metrics or {}))
    if version.description in (None, "", before):
        store.client.update_model_version(name, version.version, note)
    if is_given_model_note(store.client.get_registered_model(name).description or "", name, tags, record):
        store.client.update_registered_model(name, model_note(name, tags, record))


def candidate_of(
    project: Path, tags: dict[str, str], record: dict[str, Any], metrics: dict[str, Any] | None
) -> Candidate:
    """What the gate needs from a version, read from its project's reports and its tags; raises one of BROKEN."""
    results = record["results"]
    step, name = results["model_step"], RULES[results["rule"]].loss
    return Candidate(
        rule=results["rule"],
        loss=(metrics or {}).get(name),
        trained_loss=results["loss"],
        journal_loss=read_steps(project / "models" / STEPS)[name][step],
        model_step=step,
        target_loss=results["target_loss"],
        n_tokens=int(tags["train_tokens"]),
        data_sha256=tags["data_sha256"],
        rolled_back=is_rolled_back(tags),
    )


def _judge(
    store: Store,
    project: Path,
    config: RegistryConfig,
    version: "ModelVersion",
    record: dict[str, Any],
    metrics: dict[str, Any] | None,
    loss_on: LossOn,
) -> Verdict:
    """Judge `version` by its project's files and the tags of the best version so far of its target rule.

    It is refused if these cannot be read, or if two versions cannot be compared. A best version that was rolled back
    by hand is ignored.
    """
    aliases = {key: str(value) for key, value in store.client.get_registered_model(config.model).aliases.items()}
    champion, own, rule = aliases.get(CHAMPION), str(version.version), version.tags["rule"]
    number = aliases.get(rule_alias(rule))
    if champion == own:
        return Verdict(number in (None, own), True, IS_CHAMPION)
    try:
        candidate = candidate_of(project, version.tags, record, metrics)
        its_rule = store.client.get_model_version(config.model, champion).tags.get("rule") if champion else None
        other = (champion, its_rule) if champion and its_rule not in (None, rule) else None
        if number and is_rolled_back(store.client.get_model_version(config.model, number).tags):
            number = None
        if number == own and other:
            if flaw := flaw_of(candidate, config):
                return Verdict(False, False, flaw)
            return Verdict(True, config.replace_champion, IS_BEST + replaces(*other) * config.replace_champion)
        if number in (None, own):  # early registries lack the alias; `own`: killed before the alias champion moved
            number = None if other else champion
        if number is None:
            return judge(candidate, None, config, other)
        name = f"champion {number}" if number == champion else f"version {number} (the best of the rule {rule})"
        best = _champion(store, config.model, number, name, RULES[rule].loss, project, loss_on)
        return judge(candidate, best, config, other)
    except InputError as error:
        return Verdict(False, False, first_line(error))
    except BROKEN + store_errors() as error:
        return Verdict(False, False, f"could not be judged: {type(error).__name__}: {first_line(error)}")


def _champion(store: Store, model: str, number: str, name: str, loss: str, project: Path, loss_on: LossOn) -> Champion:
    """What `judge` needs from the version `number`, which messages call `name`; `loss`: the one that is compared."""
    version = store.client.get_model_version(model, number)
    tags = version.tags
    if missing := {"train_tokens", "data_sha256"} - tags.keys():
        raise IntegrityError(f"{name} has no tag {min(missing)}, so `register` did not make it")

    def candidate_loss() -> float:
        theirs = read_json(fetch_version(store, version, f"artifacts/model/{MANIFEST}"))
        if _tokenizer_files(theirs) != _tokenizer_files(read_json(project / "models" / "model" / MANIFEST)):
            raise InputError(f"has another tokenizer than {name}: their losses cannot be compared")
        tokens = fetch_version(store, version, "artifacts/tokens")
        if sha256_file(tokens / MANIFEST) != tags["data_sha256"]:
            raise IntegrityError(f"{tokens} is not the text of {name}")
        return loss_on(project, tokens, loss)

    own = float(tags[loss]) if loss in tags else None
    return Champion(name, own, int(tags["train_tokens"]), tags["data_sha256"], candidate_loss)


def _tokenizer_files(manifest: dict[str, Any]) -> dict[str, Any]:
    """The entries of a model folder's manifest that belong to its tokenizer."""
    from pipeline.model.weights import SHAPE, WEIGHTS

    return {name: entry for name, entry in manifest.items() if name not in (WEIGHTS, SHAPE)}


def _difference(champion: dict[str, str], tags: dict[str, str]) -> str | None:
    """What differs between the tags of two versions: the rule or the text; None if neither does."""
    if champion.get("rule", tags["rule"]) != tags["rule"]:
        return "rule"
    return "text" if champion.get("data_sha256", tags["data_sha256"]) != tags["data_sha256"] else None


def _version_tags(
    project: Path, run: "Run", record: dict[str, Any], metrics: dict[str, Any] | None, n_tokens: int
) -> dict[str, str]:
    keys = ("fingerprint", "data_sha256", "git_commit", "tree_clean")
    tags = {key: run.data.tags.get(key, "unknown") for key in keys}
    tags |= {"run_id": run.info.run_id, "train_tokens": str(n_tokens)}
    tags |= {"init": run.data.tags["init"]} if "init" in run.data.tags else {}
    tags |= {"model_sha256": sha256_file(project / "models" / "model" / MANIFEST)}
    tags |= {key: str(metrics[key]) for key in LOSS_TAGS if metrics and metrics.get(key)}
    if record.get("inexact"):
        tags |= {"inexact": "; ".join(record["inexact"])}
    try:
        results = record["results"]
        tags |= {"target_loss": str(results["target_loss"]), "rule": results["rule"]}
        if reached := results["to_target"][results["rule"]]:
            tags |= {"steps_to_target": str(reached["steps"]), "tokens_to_target": str(reached["tokens"])}
    except (LookupError, TypeError) as error:
        path = project / "models" / "run.json"
        raise IntegrityError(f"{path} is not the record of a run ({error}): `dvc repro` restores it") from error
    return tags
