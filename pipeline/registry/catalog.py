"""catalog: MLflow's registry -> a model's versions: found, verified, described, promoted and rolled back.

What a version brings along is never run: of its files, weights, tokenizer, tokens and params.yaml are read, as data.
Where the store fails, it is a ModelMissing of one line.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.params import load_params
from pipeline.registry.artifacts import LISTING_TAG, fetch_version, verify_version
from pipeline.registry.register import BEFORE, CHAMPION, PASSED, ROLLED_BACK, set_champion
from pipeline.system.errors import InputError, IntegrityError, ModelMissing, PipelineError
from pipeline.system.files import read_json
from pipeline.tracking.fingerprint import Identity
from pipeline.tracking.mlflow_store import Store, first_line, naming_dead_store, open_store, store_errors, store_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

NUMBERS = {"corpus loss", "target", "steps to target", "tokens to target", "train tokens"}  # aligned to the right
TAG_KINDS: dict[str, type] = {"fingerprint": str, "target_loss": float}  # of every version that `register` made
TAG_KINDS |= {"steps_to_target": int, "tokens_to_target": int}  # of those that reached the target
PROMOTE = "`python -m pipeline models promote N` makes version N champion"
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
    with _naming_failure(store, name):
        aliases = {alias: str(number) for alias, number in _registered_model(store, name).aliases.items()}
        numbers = _numbers(store, name)
        number = which if which.isdecimal() else aliases.get(which)
        if number is None:
            known = ", ".join([*sorted(aliases), *numbers]) or "none yet"
            hint = PROMOTE if which == CHAMPION else f"choose one of those there are, {known}"
            raise ModelMissing(f"no version of {name} has the alias {which!r}: {hint}")
        if number not in numbers:
            known = ", ".join(numbers) or "none yet"
            raise ModelMissing(f"{name} has no version {number}: choose one of those there are, {known}")
        return store.client.get_model_version(name, number)


def list_versions(store: Store, name: str) -> list["ModelVersion"]:
    """All versions, the newest first. Raises ModelMissing where there is no such model."""
    with _naming_failure(store, name):
        _registered_model(store, name)
        numbers = _numbers(store, name)
        return [store.client.get_model_version(name, number) for number in numbers]  # what a search finds lacks aliases


def open_version(store: Store, version: "ModelVersion") -> Path:
    """The version's folder with model/, tokens/ and params.yaml, every byte verified.

    Raises ModelMissing where files are gone, IntegrityError, with both hashes, where they are not what was registered.
    """
    with _naming_failure(store, _label(version)):
        return verify_version(store, version)


def promote(store: Store, name: str, which: str) -> str:
    """Make a verified version champion, whatever the gate says; return what happened, in a line."""
    version = find_version(store, name, which)
    open_version(store, version)
    with _naming_failure(store, name):
        before = set_champion(store, name, version)
    if before == str(version.version):
        return f"{_label(version)} is champion already"
    instead = f", instead of version {before}" if before else ""
    verdict = f", though the gate said no: {version.tags.get('verdict')}" if version.tags.get(PASSED) == "false" else ""
    return _printable(f"{_label(version)} is champion now{instead}{verdict}")


def rollback(store: Store, name: str) -> str:
    """Give the alias champion back to the version that had it before; twice is back again. Returns what happened."""
    with _naming_failure(store, name):
        model = _registered_model(store, name)
    current, before = model.aliases.get(CHAMPION), model.tags.get(BEFORE)
    if before is None or before == str(current):
        raise ModelMissing(f"{name} has no former champion to go back to: it has one once another version was champion")
    said = promote(store, name, before)
    if current is not None:
        with _naming_failure(store, name):
            store.client.set_model_version_tag(name, str(current), ROLLED_BACK, "true")
    return said


def print_versions(store: Store, name: str) -> None:
    """Print a table of the versions, the newest first."""
    rows = [_row(version) for version in list_versions(store, name)]
    if not rows:
        raise ModelMissing(f"{name} has no version yet: `dvc repro` makes one")
    widths = {title: max(len(title), *(len(row[title]) for row in rows)) for title in rows[0]}
    for row in [{title: title for title in widths}, *rows]:
        cells = (f"{row[title]:{'>' if title in NUMBERS else '<'}{width}}" for title, width in widths.items())
        print(_printable("  ".join(cells).rstrip()))


def verify_versions(store: Store, name: str) -> None:
    """Print of each version whether it is as registered. Raises where one is not: IntegrityError first."""
    failures: dict[str, PipelineError] = {}
    for version in list_versions(store, name):
        try:
            print(verify(store, version), flush=True)
        except (IntegrityError, ModelMissing) as error:
            failures[str(version.version)] = error
            print(f"{_label(version)}: {error}", flush=True)
    if failures:
        kind = IntegrityError if any(isinstance(error, IntegrityError) for error in failures.values()) else ModelMissing
        raise kind(f"not whole: version {', '.join(failures)} of {name}: see above what restores it")


def verify(store: Store, version: "ModelVersion") -> str:
    """Say, in a line, that a version is as registered. Raises as `open_version` does."""
    open_version(store, version)
    unchecked = "" if LISTING_TAG in version.tags else "; its code has no hash, so that MLflow might run another"
    return f"{_label(version)}: ok, model {version.tags['model_sha256']}{unchecked}"


def describe_version(store: Store, version: "ModelVersion") -> dict[str, Any]:
    """What there is to know of a version and of the run behind it, ready for JSON; curves have MAX_POINTS at most.

    Raises ModelMissing where its run or its files are gone, IntegrityError where its tags or its params.yaml are none.
    """
    if not version.run_id:
        raise ModelMissing(
            f"{_label(version)} has no run behind it, so that no `register` made it: use another version"
        )
    for tag, kind in TAG_KINDS.items():
        try:
            kind(version.tags[tag] if tag in version.tags or kind is not int else 0)
        except (KeyError, ValueError):
            raise IntegrityError(f"{_label(version)} has no sound tag {tag}: use another version") from None
    with _naming_failure(store, _label(version)):
        run = store.client.get_run(version.run_id)
        histories = {key: store.client.get_metric_history(version.run_id, key) for key in HISTORY}
        path, samples = fetch_version(store, version, "params.yaml"), _samples(store, version.run_id)
        try:
            params = load_params(path).values
        except InputError as error:
            raise IntegrityError(f"{error}: use another version than {version.version} of {version.name}") from None
    return {
        "name": version.name,
        "version": str(version.version),
        "aliases": sorted(version.aliases),
        "tags": dict(version.tags),
        "params": params,
        "environment": {
            key.removeprefix("environment."): value
            for key, value in run.data.tags.items()
            if key.startswith("environment.")
        },
        "history": {key: thinned([[row.step, row.value] for row in rows]) for key, rows in histories.items()},
        "samples": samples,
        "metrics": {
            key.partition("/")[2]: value
            for key, value in sorted(run.data.metrics.items())
            if key.startswith(("metrics/", "timing/"))
        },
        "created": _day(version),
    }


def identity_of(store: Store, version: "ModelVersion") -> Identity:
    """Who the run behind a version was: its parameters, the hashes of its sources, its machine.

    Raises IntegrityError where its identity.json does not say that.
    """
    with _naming_failure(store, _label(version)), tempfile.TemporaryDirectory() as folder:
        found = read_json(Path(store.client.download_artifacts(version.run_id, "identity.json", folder)))
    if not isinstance(found, dict) or not all(isinstance(found.get(key), dict) for key in ("sources", "environment")):
        raise IntegrityError(f"the run of {_label(version)} has an identity.json that is none: use another version")
    identity: Identity = found  # type: ignore[assignment]
    return identity


def thinned(points: list[list[float]]) -> list[list[float]]:
    """Points in the order of their steps, every n-th where they are more than MAX_POINTS; the last one always."""
    stride = -(-len(points) // MAX_POINTS) or 1
    return sorted(points)[::-stride][::-1]


def _samples(store: Store, run_id: str) -> list[dict[str, Any]]:
    """What the model wrote while it learnt: {"step": 50, "text": "..."}; a run rebuilt from its journal has none."""
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
        "corpus loss": _in_format(tags.get("corpus_loss"), float, ".4f"),
        "target": tags.get("target_loss", "-"),
        "steps to target": _in_format(tags.get("steps_to_target"), int, ","),
        "tokens to target": _in_format(tags.get("tokens_to_target"), int, ","),
        "train tokens": _in_format(tags.get("train_tokens"), int, ","),
        "data": tags.get("data_sha256", "-")[:8],
        "commit": tags.get("git_commit", "-")[:8],
        "created": _day(version),
    }


def _in_format(text: str | None, kind: type[int | float], form: str) -> str:
    """A tag's number as the table has it; what is none, which only another hand can have written, as it stands."""
    try:
        return "-" if text is None else format(kind(text), form)
    except ValueError:
        return str(text)


def _printable(line: str) -> str:
    """A line with tags in it, whoever wrote them: without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _day(version: "ModelVersion") -> str:
    return datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).date().isoformat()


def _label(version: "ModelVersion") -> str:
    return f"{version.name} version {version.version}"


def _registered_model(store: Store, name: str) -> "RegisteredModel":
    if not store.client.search_registered_models(f"name = '{name}'"):
        raise ModelMissing(f"no model {name} in {store.uri}: `dvc repro` makes and registers one")
    return store.client.get_registered_model(name)


def _numbers(store: Store, name: str) -> list[str]:
    """Numbers of the versions, the newest first."""
    found = store.client.search_model_versions(f"name = '{name}'")
    return sorted((str(version.version) for version in found), key=int, reverse=True)


@contextmanager
def _naming_failure(store: Store, what: str) -> Iterator[None]:
    """Turn the store's errors into a ModelMissing of one line about `what`, which was being read or changed."""
    try:
        yield
    except store_errors() as error:
        raise ModelMissing(
            f"{what} cannot be had from MLflow's store {store.uri} ({first_line(error)}): mend that, "
            "or `dvc repro -f -s register`, where the model was made, restores it"
        ) from error
