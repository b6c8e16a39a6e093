"""Find, list, verify and describe the registered versions of a model.

Nothing that a version holds is run: its weights, tokenizer, tokens and params.yaml are read as data. Where the store
fails, a ModelMissing of one line is raised.
"""

import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.params import load_params
from pipeline.registry.artifacts import LISTING_TAG, fetch_version, label_of, naming_failure, open_version
from pipeline.system.errors import InputError, IntegrityError, ModelMissing, PipelineError
from pipeline.system.files import read_json
from pipeline.tracking.mlflow_store import Store, naming_dead_store, open_store, store_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

    from pipeline.tracking.fingerprint import Identity

CANDIDATE, CHAMPION = "candidate", "champion"  # aliases
TAG_KINDS: dict[str, type] = {"fingerprint": str, "target_loss": float}  # of every version that `register` made
TAG_KINDS |= {"steps_to_target": int, "tokens_to_target": int}  # of those that reached the target
NUMBERS: dict[str, tuple[str, type[int | float], str]] = {  # column of the table -> its tag, with type and format
    "corpus loss": ("corpus_loss", float, ".4f"),
    "target": ("target_loss", float, "g"),
    "steps to target": ("steps_to_target", int, ","),
    "tokens to target": ("tokens_to_target", int, ","),
    "train tokens": ("train_tokens", int, ","),
}
HISTORY = ("loss", "grad_norm", "tokens_per_s", "lr", "corpus_loss")
MAX_POINTS = 2_000  # of a curve; no screen shows more


def open_registry(root: Path) -> Store:
    """Open the store of `root` to read from it. Raises ModelMissing where there is none, or it does not answer."""
    uri = store_uri(root)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise ModelMissing(f"no MLflow store {uri}: run `dvc repro`, which makes it and registers a model")
    with naming_dead_store(root):
        return open_store(root)


def find_version(store: Store, name: str, which: str) -> "ModelVersion":
    """The version that `which`, an alias such as champion or a number, names. Raises ModelMissing where none is so."""
    with naming_failure(store, name):
        aliases = {alias: str(number) for alias, number in registered_model(store, name).aliases.items()}
        numbers = _numbers(store, name)
        number = which if which.isdecimal() else aliases.get(which)
        if number in numbers:
            return store.client.get_model_version(name, number)
    known = ", ".join([*sorted(aliases), *numbers]) or "none yet"
    hint = f"choose one of {known}"
    if which == CHAMPION and numbers:
        hint += "; `python -m pipeline models promote N` makes version N champion"
    raise ModelMissing(f"{name} has no version {which!r}: {hint}")


def list_versions(store: Store, name: str) -> list["ModelVersion"]:
    """All versions, the newest first. Raises ModelMissing where there is no such model."""
    with naming_failure(store, name):
        registered_model(store, name)
        numbers = _numbers(store, name)
        return [store.client.get_model_version(name, number) for number in numbers]  # what a search finds lacks aliases


def print_versions(store: Store, name: str) -> None:
    """Print a table of the versions, the newest first."""
    rows = [_row(version) for version in list_versions(store, name)]
    if not rows:
        raise ModelMissing(f"{name} has no version yet: `dvc repro` makes one")
    widths = {title: max(len(title), *(len(row[title]) for row in rows)) for title in rows[0]}
    for row in [{title: title for title in widths}, *rows]:
        cells = (f"{row[title]:{'>' if title in NUMBERS else '<'}{width}}" for title, width in widths.items())
        print(printable("  ".join(cells).rstrip()))


def verify_versions(store: Store, name: str) -> None:
    """Print for each version whether it is as registered. Raises where one is not: IntegrityError first."""
    failures: dict[str, PipelineError] = {}
    for version in list_versions(store, name):
        try:
            print(verify(store, version), flush=True)
        except (IntegrityError, ModelMissing) as error:
            failures[str(version.version)] = error
            print(f"{label_of(version)}: {error}", flush=True)
    if failures:
        kind = IntegrityError if any(isinstance(error, IntegrityError) for error in failures.values()) else ModelMissing
        raise kind(f"not as registered: version {', '.join(failures)} of {name}: the lines above say what to do")


def verify(store: Store, version: "ModelVersion") -> str:
    """Say, in a line, that a version is as registered. Raises as `open_version` does."""
    open_version(store, version)
    unchecked = "" if LISTING_TAG in version.tags else "; its code has no hash and is not verified"
    return f"{label_of(version)}: ok, model {version.tags['model_sha256']}{unchecked}"


def describe_version(store: Store, version: "ModelVersion") -> dict[str, Any]:
    """The version info: all that is known of a version and its run, ready for JSON; curves have MAX_POINTS at most.

    Raises ModelMissing where its run or its files are gone, IntegrityError where its tags or params.yaml are unsound.
    """
    label = label_of(version)
    if not version.run_id:
        raise ModelMissing(f"{label} has no run behind it, it was not made by `register`: use another version")
    for tag, kind in TAG_KINDS.items():
        try:
            kind(version.tags[tag] if tag in version.tags or kind is not int else 0)
        except (KeyError, ValueError):
            raise IntegrityError(f"{label} has no sound tag {tag}: use another version") from None
    with naming_failure(store, label):
        run = store.client.get_run(version.run_id)
        histories = {key: store.client.get_metric_history(version.run_id, key) for key in HISTORY}
        path, samples = fetch_version(store, version, "artifacts/params.yaml"), _samples(store, version.run_id)
    try:
        params = load_params(path).values
    except InputError as error:
        raise IntegrityError(f"{error}: use another version than {label}") from None
    tags, metrics = run.data.tags, sorted(run.data.metrics.items())
    prefix = "environment."
    return {
        "name": version.name,
        "version": str(version.version),
        "aliases": sorted(version.aliases),
        "tags": dict(version.tags),
        "params": params,
        "environment": {key.removeprefix(prefix): tags[key] for key in tags if key.startswith(prefix)},
        "history": {key: thinned([[row.step, row.value] for row in rows]) for key, rows in histories.items()},
        "samples": samples,
        "metrics": {k.partition("/")[2]: value for k, value in metrics if k.startswith(("metrics/", "timing/"))},
        "created": _day(version),
    }


def identity_of(store: Store, version: "ModelVersion") -> "Identity":
    """What identifies the run behind a version: its parameters, the hashes of its sources, its machine.

    Raises IntegrityError where its identity.json does not say that.
    """
    with naming_failure(store, label_of(version)), tempfile.TemporaryDirectory() as folder:
        found = read_json(Path(store.client.download_artifacts(version.run_id, "identity.json", folder)))
    if not isinstance(found, dict) or not all(isinstance(found.get(key), dict) for key in ("sources", "environment")):
        raise IntegrityError(f"the identity.json of the run of {label_of(version)} is unsound: use another version")
    identity: Identity = found  # type: ignore[assignment]
    return identity


def thinned(points: list[list[float]]) -> list[list[float]]:
    """Points in the order of their steps, every n-th where they are more than MAX_POINTS; the last one always."""
    stride = -(-len(points) // MAX_POINTS) or 1
    return sorted(points)[::-stride][::-1]


def registered_model(store: Store, name: str) -> "RegisteredModel":
    """The model that has the versions. Raises ModelMissing where there is none of that name."""
    if not store.client.search_registered_models(f"name = '{name}'"):
        raise ModelMissing(f"no model {name} in {store.uri}: `dvc repro` makes and registers one")
    return store.client.get_registered_model(name)


def printable(text: str, also: str = "") -> str:
    """The text without control characters, which a terminal would obey; `also` names characters that stay."""
    return "".join(char if char.isprintable() or char in also else "�" for char in text)


def _samples(store: Store, run_id: str) -> list[dict[str, Any]]:
    """What the model wrote during training: {"step": 50, "text": "..."}; a run rebuilt from its journal has none."""
    if not store.client.list_artifacts(run_id, "samples"):
        return []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(store.client.download_artifacts(run_id, "samples", folder))
        texts = {path.stem.removeprefix("step-"): path.read_text(encoding="utf-8") for path in copy.glob("step-*.txt")}
    return [{"step": int(step), "text": text.rstrip("\n")} for step, text in sorted(texts.items())]


def _row(version: "ModelVersion") -> dict[str, str]:
    """A version's cells in the table; a dash for what it does not say."""
    tags = version.tags
    return {
        "version": str(version.version),
        "aliases": ", ".join(sorted(version.aliases)) or "-",
        **{title: _formatted(tags.get(tag, "-"), kind, form) for title, (tag, kind, form) in NUMBERS.items()},
        "data": tags.get("data_sha256", "-")[:8],
        "commit": tags.get("git_commit", "-")[:8],
        "created": _day(version),
    }


def _formatted(text: str, kind: Callable[[str], int | float], form: str) -> str:
    """A tag's number in the table's format; any other text, "-" or what somebody else wrote, as it is."""
    try:
        return format(kind(text), form)
    except ValueError:
        return text


def _day(version: "ModelVersion") -> str:
    return datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).date().isoformat()


def _numbers(store: Store, name: str) -> list[str]:
    """Numbers of the versions, the newest first."""
    found = store.client.search_model_versions(f"name = '{name}'")
    return sorted((str(version.version) for version in found), key=int, reverse=True)
