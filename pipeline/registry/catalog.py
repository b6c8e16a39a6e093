"""Find, list, verify and describe the registered versions of a model.

No code of a version is executed: its weights, tokenizer, tokens and params.yaml are read as data. If the store fails,
ModelMissing is raised with a message of one line.
"""

import re
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.params import load_params
from pipeline.registry.artifacts import LISTING_TAG, REMEDY, fetch_version, label_of, open_version
from pipeline.system.errors import InputError, IntegrityError, ModelMissing, PipelineError
from pipeline.system.files import read_json
from pipeline.tracking.journal import EVALUATED_LOSSES
from pipeline.tracking.mlflow_runs import report_numbers
from pipeline.tracking.mlflow_store import Store, open_store, store_uri, translate_store_errors
from pipeline.training.target import RULES, Rule

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

    from pipeline.tracking.fingerprint import Identity

CANDIDATE, CHAMPION = "candidate", "champion"  # aliases; `rule_alias` has those of the target rules
TAG_KINDS: dict[str, type] = {"fingerprint": str, "target_loss": float}  # in every version that `register` made
TAG_KINDS |= {"steps_to_target": int, "tokens_to_target": int}  # only in those that reached the target
RULE_LOSS = "rule_loss"  # a key of the table, for the loss that the version's target rule compares
RULE_BITS = "rule_bits"  # the same loss in bits per byte; early versions lack it
NUMBERS: dict[str, tuple[str, type[int | float], str]] = {  # column of the table -> tag, type, format
    "loss": (RULE_LOSS, float, ".4f"),
    "bits/byte": (RULE_BITS, float, ".4f"),
    "target": ("target_loss", float, "g"),
    "steps to target": ("steps_to_target", int, ","),
    "tokens to target": ("tokens_to_target", int, ","),
    "train tokens": ("train_tokens", int, ","),
}
HISTORY = ("loss", "grad_norm", "tokens_per_s", "lr", *EVALUATED_LOSSES)
MAX_POINTS = 2_000  # of a curve; a screen does not show more
# ASCII's and C1's, line and paragraph ends, directions of text, lone surrogates. str.isprintable() also refuses parts
# of words: wide spaces, joiners of emoji and Persian, characters newer than Python.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def rule_alias(rule: str) -> str:
    """The alias of the best version of a target rule, such as champion-validation."""
    return f"{CHAMPION}-{rule}"


def bits_name(loss: str) -> str:
    """The metric that is the loss of this name in bits per byte, such as sliding_bits_per_byte for sliding_loss."""
    return f"{loss.removesuffix('_loss')}_bits_per_byte"


def rule_of(tags: dict[str, str]) -> Rule | None:
    """The target rule of a version by its tags; None if it is not recorded or not known."""
    return RULES.get(tags.get("rule", ""))


def run_id_of(version: "ModelVersion") -> str | None:
    """The run of a version by its tag, which `register` renews; MLflow keeps the first run, even if it is removed."""
    run_id: str | None = version.tags.get("run_id") or version.run_id
    return run_id


def open_registry(root: Path) -> Store:
    """Open the store of `root` for reading. Raises ModelMissing if there is none, or if it does not answer."""
    uri = store_uri(root)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise ModelMissing(f"no MLflow store {uri}: run `make repro`, which trains a model and registers it")
    with translate_store_errors(uri):
        return open_store(root)


def aliases_of(store: Store, name: str) -> dict[str, str]:
    """Return the number of the version of each alias. Raises ModelMissing if there is no such model."""
    with translate_store_errors(store.uri, name):
        return {alias: str(number) for alias, number in registered_model(store, name).aliases.items()}


def find_version(store: Store, name: str, which: str) -> "ModelVersion":
    """Find a version by `which`, a number or an alias such as champion. Raises ModelMissing if there is none."""
    aliases = aliases_of(store, name)
    with translate_store_errors(store.uri, name):
        numbers = [str(version.version) for version in _versions(store, name)]
        number = which if which.isdecimal() else aliases.get(which)
        if number in numbers:
            return store.client.get_model_version(name, number)
    known = ", ".join([*sorted(aliases), *numbers]) or "none yet"
    hint = f"choose one of {known}"
    if which == CHAMPION and numbers:
        hint += "; `python -m pipeline models promote N` makes version N the champion"
    raise ModelMissing(f"{name} has no version {which!r}: {hint}")


def list_versions(store: Store, name: str) -> list["ModelVersion"]:
    """Return all versions, the newest first, in few queries. Raises ModelMissing if there is no such model."""
    aliases = aliases_of(store, name)
    with translate_store_errors(store.uri, name):
        versions = _versions(store, name)
    for version in versions:  # a search returns them without their aliases
        version.aliases = [alias for alias, number in aliases.items() if number == str(version.version)]
    return versions


def source_of(store: Store, name: str) -> str | None:
    """The text of the model `name`: corpus.source of its newest version; None if it has none, or does not name it."""
    if not (versions := list_versions(store, name)):
        return None
    with translate_store_errors(store.uri, label := label_of(versions[0]), REMEDY):
        path = fetch_version(store, versions[0], "artifacts/params.yaml")
    corpus = _read_params(path, label).get("corpus")
    return corpus.get("source") if isinstance(corpus, dict) else None


def print_versions(store: Store, name: str) -> None:
    """Print a table of all versions, the newest first."""
    rows = [_row(version) for version in list_versions(store, name)]
    if not rows:
        raise ModelMissing(f"{name} has no version yet: run `make repro`, which trains and registers one")
    widths = {title: max(len(title), *(len(row[title]) for row in rows)) for title in rows[0]}
    for row in [{title: title for title in widths}, *rows]:
        cells = (f"{row[title]:{'>' if title in NUMBERS else '<'}{width}}" for title, width in widths.items())
        print(printable("  ".join(cells).rstrip()))


def verify_versions(store: Store, name: str) -> None:
    """Verify all versions and print one line for each. Raises IntegrityError if one is altered, else ModelMissing."""
    failures: dict[str, PipelineError] = {}
    for version in list_versions(store, name):
        try:
            print(verify(store, version), flush=True)
        except (IntegrityError, ModelMissing) as error:
            failures[str(version.version)] = error
            print(f"{label_of(version)}: {error}", flush=True)
    if failures:
        kind = IntegrityError if any(isinstance(error, IntegrityError) for error in failures.values()) else ModelMissing
        raise kind(f"altered or missing: version {', '.join(failures)} of {name}: the lines above say what to do")


def verify(store: Store, version: "ModelVersion") -> str:
    """Verify a version and return one line about the result. Raises as `open_version` does."""
    open_version(store, version)
    unchecked = "" if LISTING_TAG in version.tags else "; its code has no hash and is not verified"
    return f"{label_of(version)}: ok, model {version.tags['model_sha256']}{unchecked}"


def describe_version(store: Store, version: "ModelVersion", files: Path) -> dict[str, Any]:
    """Return the version info: all data on a version and its run, as JSON values; a curve has at most MAX_POINTS.

    `files`: what `open_version` returned. Raises ModelMissing if its run is missing, IntegrityError if its tags or its
    params.yaml are invalid.
    """
    label = label_of(version)
    if not (run_id := run_id_of(version)):
        raise ModelMissing(f"{label} has no run, so `register` did not make it: use another version")
    require_valid_tags(version.tags, label)
    with translate_store_errors(store.uri, label, REMEDY):
        run = store.client.get_run(run_id)
        histories = {key: store.client.get_metric_history(run_id, key) for key in HISTORY}
        samples = _samples(store, run_id)
    params = _read_params(files / "params.yaml", label)
    tags = run.data.tags
    prefix = "environment."
    return {
        "name": version.name,
        "version": str(version.version),
        "aliases": sorted(version.aliases),
        "tags": dict(version.tags),
        "rule": _rule_info(version.tags),
        "params": params,
        "environment": {key.removeprefix(prefix): tags[key] for key in tags if key.startswith(prefix)},
        "history": {key: thinned([[point.step, point.value] for point in points]) for key, points in histories.items()},
        "samples": samples,
        "metrics": report_numbers(run),
        "created": _day(version),
    }


def _read_params(path: Path, label: str) -> dict[str, Any]:
    """The params.yaml of a version. Raises IntegrityError if it is invalid."""
    try:
        return load_params(path).values
    except InputError as error:
        raise IntegrityError(f"{error}: use another version, {label} is invalid") from None


def _rule_info(tags: dict[str, str]) -> dict[str, Any] | None:
    """The target rule as JSON values: its name, its description, and the metric that it compares."""
    if (rule := rule_of(tags)) is None:
        return None
    return {"name": tags["rule"], "description": rule.description, "loss": rule.loss, "held_out": rule.needs_held_out}


def require_valid_tags(tags: dict[str, str], label: str) -> None:
    """Raise IntegrityError if a tag of TAG_KINDS is not of its type, or is missing; tags of type int are optional."""
    for tag, kind in TAG_KINDS.items():
        try:
            kind(tags[tag] if tag in tags or kind is not int else 0)
        except (KeyError, ValueError):
            raise IntegrityError(f"{label} has no valid tag {tag}: use another version") from None


def identity_of(store: Store, version: "ModelVersion") -> "Identity":
    """Return the identity of a version's run: parameters, hashes of the sources, environment.

    Raises IntegrityError if its identity.json is invalid.
    """
    label = label_of(version)
    with translate_store_errors(store.uri, label, REMEDY), tempfile.TemporaryDirectory() as folder:
        return read_identity(Path(store.client.download_artifacts(run_id_of(version), "identity.json", folder)), label)


def read_identity(path: Path, label: str) -> "Identity":
    found = read_json(path)
    if not isinstance(found, dict) or not all(isinstance(found.get(key), dict) for key in ("sources", "environment")):
        raise IntegrityError(f"the identity.json of the run of {label} is invalid: use another version")
    identity: Identity = found  # type: ignore[assignment]
    return identity


def thinned(points: list[list[float]]) -> list[list[float]]:
    """Sort the points by step, and keep at most MAX_POINTS at equal distances, the last one always."""
    stride = -(-len(points) // MAX_POINTS) or 1
    return sorted(points)[::-stride][::-1]


def registered_model(store: Store, name: str) -> "RegisteredModel":
    """Return the registered model. Raises ModelMissing if there is no model of that name."""
    if not store.client.search_registered_models(f"name = '{name}'"):
        raise ModelMissing(f"no model {name} in {store.uri}: run `make repro`, which trains and registers one")
    return store.client.get_registered_model(name)


def printable(text: str, also: str = "") -> str:
    """Replace control characters, which a terminal would execute; those in `also` are kept."""
    return CONTROLS.sub(lambda found: found[0] if found[0] in also else "�", text)


def _samples(store: Store, run_id: str) -> list[dict[str, Any]]:
    """Samples from training, as {"step": 50, "text": "..."}; a run that was rebuilt from its journal has none."""
    if not store.client.list_artifacts(run_id, "samples"):
        return []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(store.client.download_artifacts(run_id, "samples", folder))
        texts = {path.stem.removeprefix("step-"): path.read_text(encoding="utf-8") for path in copy.glob("step-*.txt")}
    return [{"step": int(step), "text": text.rstrip("\n")} for step, text in sorted(texts.items())]


def _row(version: "ModelVersion") -> dict[str, str]:
    """A version's cells in the table; a missing tag is a dash."""
    rule = rule_of(version.tags)
    tags = dict(version.tags)
    if rule:
        of_rule = {RULE_LOSS: rule.loss, RULE_BITS: bits_name(rule.loss)}
        tags |= {key: tags[name] for key, name in of_rule.items() if name in tags}
    return {
        "version": str(version.version),
        "aliases": ", ".join(sorted(version.aliases)) or "-",
        "rule": tags.get("rule", "-"),
        **{title: _formatted(tags.get(tag, "-"), kind, form) for title, (tag, kind, form) in NUMBERS.items()},
        "data": tags.get("data_sha256", "-")[:8],
        "commit": tags.get("git_commit", "-")[:8],
        "created": _day(version),
    }


def _formatted(text: str, kind: Callable[[str], int | float], form: str) -> str:
    """A tag's number in the table's format; text that is not a number is returned unchanged."""
    try:
        return format(kind(text), form)
    except ValueError:
        return text


def _day(version: "ModelVersion") -> str:
    return datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).date().isoformat()


def _versions(store: Store, name: str) -> list["ModelVersion"]:
    """All versions without their aliases, the newest first."""
    found = store.client.search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda version: int(version.version), reverse=True)
