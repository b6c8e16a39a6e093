"""Write journals and identities to MLflow as runs, each value of each metric exactly once.

Values have the journal's timestamps, and MLflow stores equal values once. So sending them again changes nothing.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.params import load_params
from pipeline.system.errors import InputError, ModelMissing
from pipeline.system.files import fsync, read_json
from pipeline.system.host import git_info
from pipeline.tracking.descriptions import (
    Result,
    base_name,
    is_given_name,
    is_given_note,
    run_name,
    run_note,
    source_tag,
)
from pipeline.tracking.fingerprint import flatten
from pipeline.tracking.journal import EVALUATED_LOSSES, STEPS, TIMES
from pipeline.tracking.mlflow_store import Store, open_store, store_errors, store_uri, translate_store_errors

if TYPE_CHECKING:
    from mlflow.entities import Run

NOTE = "mlflow.note.content"  # tag that MLflow's page shows as the description of a run
RESULTS = ("metrics", "timing")  # reports with one value for each key; they are tags, since a metric is a chart
BATCH = 50  # records of up to twenty metrics each; MLflow takes 1,000 metrics in one transaction
Record = dict[str, float]  # the values of one step from both of the journal's files


class JournalTail:
    """Reads a run's journal while another process writes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tokens = 0.0  # up to the last record that was read
        self._offsets = {STEPS: 0, TIMES: 0}

    def read(self) -> list[Record]:
        """Return the complete records since the last call, after they were flushed to the disk."""
        lines = {name: self._lines(name) for name in self._offsets}
        complete = min(map(len, lines.values()))
        for name, found in lines.items():
            if complete:
                fsync(self.folder / name)
            self._offsets[name] += sum(map(len, found[:complete]))
        pairs = zip(lines[STEPS], lines[TIMES], strict=False)
        return [self._with_speed(json.loads(step) | json.loads(time)) for step, time in pairs]

    def _lines(self, name: str) -> list[bytes]:
        if not (path := self.folder / name).is_file():
            return []
        with path.open("rb") as file:
            file.seek(self._offsets[name])
            return [line for line in file if line.endswith(b"\n")]

    def _with_speed(self, record: Record) -> Record:
        """Add tokens_per_s, unless the step's duration is 0 (a coarse clock)."""
        tokens, self._tokens = record["tokens"] - self._tokens, record["tokens"]
        return record | {"tokens_per_s": tokens / record["step_s"]} if record["step_s"] > 0 else record


def log_records(store: Store, run_id: str, records: list[Record]) -> None:
    """Send records in their order."""
    from mlflow.entities import Metric

    for start in range(0, len(records), BATCH):
        metrics = [
            Metric(key, float(value), int(record["logged_ms"]), int(record["step"]))
            for record in records[start : start + BATCH]
            for key, value in record.items()
            if key not in ("step", "step_s", "logged_ms")
        ]
        store.client.log_batch(run_id, metrics=metrics)


def logged_steps(store: Store, run_id: str) -> dict[int, int]:
    """The logged steps and their timestamps in Unix milliseconds; the store accepts all of a batch or nothing."""
    return {metric.step: metric.timestamp for metric in store.client.get_metric_history(run_id, "loss")}


def create_run(store: Store, identity: dict[str, Any], tags: dict[str, str], started_ms: int | None = None) -> str:
    """Create a RUNNING run of the training that `identity` describes; return its id.

    `started_ms`: when the training began, in Unix milliseconds; now by default.
    """
    info = git_info()
    source = {"mlflow.source.name": "stages/train.py", "mlflow.source.git.commit": info["git_commit"]}
    tags = tags | info | identity_tags(identity) | source | {NOTE: run_note(tags, identity)}
    run: Run = store.client.create_run(
        store.experiment_id, start_time=started_ms, tags=tags, run_name=base_name(tags, identity)
    )
    return str(run.info.run_id)


def start_of(records: list[Record]) -> int:
    """When the training of these records began, in Unix milliseconds: before its first step."""
    return int(records[0]["logged_ms"] - 1000 * records[0]["wall_s"])


def describe_outcome(store: Store, run_id: str, identity: dict[str, Any], result: Result | None) -> None:
    """Set name and description of a run, with its result if it is finished.

    A name or a description that a user has changed is kept.
    """
    run = store.client.get_run(run_id)
    tags = run.data.tags
    if is_given_name(run.info.run_name, tags, identity):
        store.client.update_run(run_id, name=run_name(tags, identity, result))
    if is_given_note(tags.get(NOTE, ""), tags, identity):
        store.client.set_tag(run_id, NOTE, run_note(tags, identity, result))


def identity_tags(identity: dict[str, Any]) -> dict[str, str]:
    """The tags of a run that identify it."""
    tags = {key: identity[key] for key in ("fingerprint", "data_sha256")}
    tags |= {f"environment.{key}": str(value) for key, value in identity["environment"].items()}
    return tags | ({"inexact": "; ".join(identity["inexact"])} if identity.get("inexact") else {})


def describe_inputs(store: Store, run_id: str, identity: dict[str, Any]) -> None:
    """Log parameters and data lineage; repeating it is harmless."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    params = [Param(key, str(value)) for key, value in flatten(identity["params"]).items()]
    store.client.log_batch(run_id, params=params)  # at most 100 at once
    digest = identity["data_sha256"][:36]  # MLflow's limit
    dataset = Dataset("tokens", digest, "local", json.dumps({"uri": "data/tokens"}))
    inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
    try:
        store.client.log_inputs(run_id, inputs)
    except store_errors():  # two processes created the same dataset at once, and MLflow refused one: now it exists
        store.client.log_inputs(run_id, inputs)
    store.client.log_dict(run_id, identity, "identity.json")


def runs_of(store: Store, fingerprint: str) -> list["Run"]:
    """Runs with this fingerprint: finished ones first, newer ones before older ones."""
    found = store.client.search_runs([store.experiment_id], f"tags.fingerprint = '{fingerprint}'")
    return sorted(found, key=lambda run: (run.info.status != "FINISHED", -run.info.start_time))


def ensure_run(store: Store, project: Path, identity: dict[str, Any], result: Result | None) -> "Run":
    """Make sure that the store has the run that made `project`/models, with all its records, metrics and reports.

    `identity` is its run.json, `result` what it reached. A run that the store lacks is created from the journal, with
    the tag `rebuilt`. Repeating changes nothing.
    """
    if not (records := JournalTail(project / "models").read()):
        raise InputError(f"{project / 'models' / STEPS} contains no steps: run `dvc repro train`")
    text = source_tag(load_params(path).values) if (path := project / "params.yaml").is_file() else {}
    if (run_id := run_with(store, identity["fingerprint"], records)) is None:
        run_id = create_run(store, identity, {"rebuilt": "true"} | text, start_of(records))
        describe_inputs(store, run_id, identity)
    for key, value in text.items():
        store.client.set_tag(run_id, key, value)
    log_records(store, run_id, records[len(logged_steps(store, run_id)) :])
    if store.client.get_run(run_id).info.status != "FINISHED":
        store.client.set_terminated(run_id, "FINISHED", end_time=int(records[-1]["logged_ms"]))
    describe_outcome(store, run_id, identity, result)
    _attach(store, run_id, project)
    return store.client.get_run(run_id)


def report_numbers(run: "Run") -> dict[str, float]:
    """The numbers of metrics.json and timing.json of a registered run; early runs have them as metrics."""
    found: dict[str, float] = {}
    for key, value in sorted({**run.data.metrics, **run.data.tags}.items()):
        report, _, name = key.partition("/")
        if report in RESULTS:
            with suppress(ValueError):  # a tag of the user's own
                found[name] = float(value)
    return found


def describe_run(root: Path, fingerprint: str) -> dict[str, Any]:
    """The address, status and last metrics of the run that made a model. Raises ModelMissing if there is none."""
    with translate_store_errors(store_uri(root)):
        store = open_store(root)
        run = next(iter(runs_of(store, fingerprint)), None)
        if run is None:
            raise ModelMissing(f"no run {fingerprint} in {store.uri}: `dvc repro -f -s register` rebuilds it")
        server = store.uri if store.uri.startswith("http") else "http://127.0.0.1:5000"  # where `mlflow ui` listens
        return {
            "run_id": run.info.run_id,
            "status": run.info.status,
            "store": store.uri,
            "link": f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}",
            "git_commit": run.data.tags.get("git_commit", "unknown"),
            "steps": max(logged_steps(store, run.info.run_id), default=0),
            **{key: run.data.metrics[key] for key in ("loss", *EVALUATED_LOSSES, "tokens") if key in run.data.metrics},
        }


def run_with(store: Store, fingerprint: str, records: list[Record]) -> str | None:
    """Id of a run whose records are all among these; a repeated training has other timestamps."""
    logged = {(int(record["step"]), int(record["logged_ms"])) for record in records}
    ids = (str(run.info.run_id) for run in runs_of(store, fingerprint))
    return next((run_id for run_id in ids if logged_steps(store, run_id).items() <= logged), None)


def _attach(store: Store, run_id: str, project: Path) -> None:
    """Log the numbers in metrics.json and timing.json as tags, such as metrics/sliding_loss; reports as artifacts."""
    from mlflow.entities import RunTag

    reports = project / "reports"
    found: dict[str, Any] = {}
    for name in RESULTS:
        if (path := reports / f"{name}.json").is_file():
            found |= {f"{name}/{key}": value for key, value in flatten(read_json(path)).items()}
    tags = [RunTag(key, str(value)) for key, value in found.items() if type(value) in (int, float)]
    store.client.log_batch(run_id, tags=tags)
    for path in [project / "params.yaml", *sorted(reports.glob("*.json")), *sorted(reports.glob("figures/*.png"))]:
        if path.is_file() and path.name != "registered.json":
            folder = path.parent.relative_to(project).as_posix()
            store.client.log_artifact(run_id, str(path), None if folder == "." else folder)
