"""runs: journals and identities -> runs in MLflow, each row of each metric exactly once.

MLflow keeps one of two equal rows, and a row's time is the journal's, so that sending again is harmless.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.system.errors import InputError, ModelMissing
from pipeline.system.files import fsync, read_json
from pipeline.system.host import git_info
from pipeline.tracking.journal import STEPS, TIMES
from pipeline.tracking.mlflow_store import Store, naming_dead_store, open_store, store_errors
from pipeline.tracking.run_record import read_run

if TYPE_CHECKING:
    from mlflow.entities import Run

ROWS_PER_BATCH = 90  # of up to eleven metrics each; MLflow takes 1,000 metrics in one transaction
Row = dict[str, float]  # of both of the journal's files


class JournalTail:
    """Reads a run's journal while another thread writes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.step = 0  # of the last row that was read
        self._tokens = 0.0
        self._offsets = {STEPS: 0, TIMES: 0}

    def read(self) -> list[Row]:
        """The whole rows since the last call; they are on the disk when it returns."""
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

    def _with_speed(self, row: Row) -> Row:
        """Add tokens_per_s, unless the clock stood still."""
        tokens, self._tokens, self.step = row["tokens"] - self._tokens, row["tokens"], int(row["step"])
        return row | {"tokens_per_s": tokens / row["step_s"]} if row["step_s"] > 0 else row


def log_records(store: Store, run_id: str, rows: list[Row]) -> None:
    """Send rows in their order, taking each out of `rows` once the store has it."""
    from mlflow.entities import Metric

    while rows:
        batch = rows[:ROWS_PER_BATCH]
        metrics = [
            Metric(key, float(value), int(row["logged_ms"]), int(row["step"]))
            for row in batch
            for key, value in row.items()
            if key not in ("step", "step_s", "logged_ms")
        ]
        store.client.log_batch(run_id, metrics=metrics)
        del rows[: len(batch)]


def logged_steps(store: Store, run_id: str) -> dict[int, int]:
    """When each step was logged, in Unix milliseconds, of the steps that the store has; batches arrive whole."""
    return {row.step: row.timestamp for row in store.client.get_metric_history(run_id, "loss")}


def create_run(store: Store, identity: dict[str, Any], tags: dict[str, str], started_ms: int | None = None) -> str:
    """Create a RUNNING run of the training that `identity` describes; return its id."""
    facts = git_info()
    tags = (
        tags
        | facts
        | identity_tags(identity)
        | {"mlflow.source.name": "stages/train.py", "mlflow.source.git.commit": facts["git_commit"]}
    )
    name = tags.get("dvc_experiment") or identity["fingerprint"]
    run: Run = store.client.create_run(store.experiment_id, start_time=started_ms, tags=tags, run_name=name)
    return str(run.info.run_id)


def identity_tags(identity: dict[str, Any]) -> dict[str, str]:
    """What a run's tags say about who it is."""
    tags = {key: identity[key] for key in ("fingerprint", "data_sha256")}
    tags |= {f"environment.{key}": str(value) for key, value in identity["environment"].items()}
    return tags | ({"inexact": "; ".join(identity["inexact"])} if identity.get("inexact") else {})


def describe_inputs(store: Store, run_id: str, identity: dict[str, Any]) -> None:
    """Log parameters and data lineage; again is harmless."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    params = [
        Param(f"{section}.{key}", str(value))
        for section, values in identity["params"].items()
        for key, value in values.items()
    ]
    for start in range(0, len(params), 100):  # MLflow's limit
        store.client.log_batch(run_id, params=params[start : start + 100])
    digest = identity["data_sha256"][:36]  # MLflow's limit
    dataset = Dataset("tokens", digest, "local", json.dumps({"uri": "data/tokens"}))
    inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
    try:
        store.client.log_inputs(run_id, inputs)
    except store_errors():  # MLflow refuses the later of two that log the same data first, at once: now it is there
        store.client.log_inputs(run_id, inputs)
    store.client.log_dict(run_id, identity, "identity.json")


def runs_of(store: Store, fingerprint: str) -> list["Run"]:
    """Runs with this fingerprint, the finished ones first, then the newest."""
    found = store.client.search_runs([store.experiment_id], f"tags.fingerprint = '{fingerprint}'")
    return sorted(found, key=lambda run: (run.info.status != "FINISHED", -run.info.start_time))


def find_run(store: Store, fingerprint: str) -> "Run | None":
    """The run behind a model: the newest finished one of this fingerprint, else the newest."""
    return next(iter(runs_of(store, fingerprint)), None)


def ensure_run(store: Store, project: Path) -> "Run":
    """Make sure that the store holds the run behind `project`/models with all its rows, figures and reports.

    A run that the store lacks is rebuilt from the journal and tagged so. Repeating changes nothing.
    """
    identity = read_run(project / "models")
    if not (rows := JournalTail(project / "models").read()):
        raise InputError(f"{project / 'models' / STEPS} holds no steps: run `dvc repro train`")
    last = rows[-1]
    if run_id := run_with(store, identity["fingerprint"], rows):
        del rows[: len(logged_steps(store, run_id))]
    else:
        run_id = create_run(store, identity, {"rebuilt": "true"}, int(rows[0]["logged_ms"]))
        describe_inputs(store, run_id, identity)
    log_records(store, run_id, rows)
    if store.client.get_run(run_id).info.status != "FINISHED":
        store.client.set_terminated(run_id, "FINISHED", end_time=int(last["logged_ms"]))
    _attach(store, run_id, project, last)
    return store.client.get_run(run_id)


def describe_run(root: Path, fingerprint: str) -> dict[str, Any]:
    """Where the run behind a model is and what came out. Raises ModelMissing where the store holds none."""
    with naming_dead_store(root):
        store = open_store(root)
        run = find_run(store, fingerprint)
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
            **{key: run.data.metrics[key] for key in ("loss", "corpus_loss", "tokens") if key in run.data.metrics},
        }


def run_with(store: Store, fingerprint: str, rows: list[Row]) -> str | None:
    """Id of a run that holds a part of just these rows: a training that was repeated has other times."""
    logged = {(int(row["step"]), int(row["logged_ms"])) for row in rows}
    ids = (str(run.info.run_id) for run in runs_of(store, fingerprint))
    return next((run_id for run_id in ids if logged_steps(store, run_id).items() <= logged), None)


def _attach(store: Store, run_id: str, project: Path, last: Row) -> None:
    """Log the figures of metrics.json and timing.json, where they are new, and all reports as artifacts."""
    from mlflow.entities import Metric

    reports = project / "reports"
    known = store.client.get_run(run_id).data.metrics
    figures: dict[str, float] = {}
    for name in ("metrics", "timing"):
        if (path := reports / f"{name}.json").is_file():
            figures |= _numbers(read_json(path), name)
    changed = {key: value for key, value in figures.items() if known.get(key) != value}
    metrics = [Metric(key, value, int(last["logged_ms"]), int(last["step"])) for key, value in changed.items()]
    store.client.log_batch(run_id, metrics=metrics)
    for path in [project / "params.yaml", *sorted(reports.glob("*.json")), *sorted(reports.glob("figures/*.png"))]:
        if path.is_file() and path.name != "registered.json":
            folder = path.parent.relative_to(project).as_posix()
            store.client.log_artifact(run_id, str(path), None if folder == "." else folder)


def _numbers(values: dict[str, Any], prefix: str) -> dict[str, float]:
    """The numbers of nested `values`, named metrics/to_target.corpus.steps; what is null or a word is left out."""
    found: dict[str, float] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if "/" in prefix else f"{prefix}/{key}"
        if isinstance(value, dict):
            found |= _numbers(value, name)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    return found
