"""Check an installation and its project, print one line for each finding, and fix errors if this is safe."""

from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.ops.checks import Finding, examine_packages, examine_params, examine_tools
from pipeline.ops.installation import examine_installation
from pipeline.ops.stale_runs import examine_journals, examine_running
from pipeline.ops.store_location import examine_database, flaw_of
from pipeline.registry.artifacts import FOLDER_TAGS
from pipeline.registry.catalog import list_versions, verify
from pipeline.system.errors import IntegrityError, ModelMissing, PipelineError, first_line
from pipeline.tracking import mlflow_store
from pipeline.tracking.mlflow_store import Store, all_found


class ErrorsLeft(PipelineError):  # noqa: N818 (a result, not a fault of the command)
    """Errors are left to fix; exit code 1."""


def examine(root: Path, fix: bool) -> None:
    """Run all checks and print their findings; with `fix`, apply the fixes. Without it nothing is changed.

    Raises ErrorsLeft if errors are left to fix.
    """
    n_left = n_fixable = 0
    for check in (examine_installation, examine_packages, examine_tools, examine_params, examine_store):
        for finding in _findings(check, root):
            outcome = _fixed(finding, finding.fix) if fix and finding.fix else finding
            print(outcome, flush=True)
            if outcome.mark == "to fix":
                n_left, n_fixable = n_left + 1, n_fixable + (finding.fix is not None and not fix)
    if n_left:
        offer = f"; `python -m pipeline doctor --fix` fixes {n_fixable} of them" if n_fixable else ""
        raise ErrorsLeft(f"{n_left} to fix, see above{offer}")


def examine_store(root: Path) -> Iterator[Finding]:
    """Check that MLflow's store can be used, and that its runs and versions are complete."""
    uri = mlflow_store.store_uri(root)
    yield from examine_database(root)
    if (database := mlflow_store.own_database(root)) and flaw_of(database):
        return
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not (path.is_file() and path.stat().st_size):
        yield Finding("note", "store", f"{uri} does not exist yet: `totarget repro` creates it")
        return
    with mlflow_store.translate_store_errors(uri):
        client = mlflow_store.connect(uri)
        experiment = mlflow_store.find_experiment(client)
        if experiment is None:
            yield Finding("note", "store", f"{uri} has no run yet: `dvc repro` creates one")
            return
        store = Store(client, experiment.experiment_id, uri)
        yield Finding("ok", "store", f"{uri} answers")
        yield from examine_running(store, root)
        yield from examine_journals(store, root)
        if not mlflow_store.made_in(root):
            yield from examine_versions(store)


def examine_versions(store: Store) -> Iterator[Finding]:
    """Check that the files of each version that `register` made are unchanged."""
    intact = []
    for model in all_found(store.client.search_registered_models):
        for version in list_versions(store, model.name):
            if version.tags.keys() >= {*FOLDER_TAGS.values()}:
                try:
                    verify(store, version)
                    intact.append(f"{model.name} {version.version}")
                except (IntegrityError, ModelMissing) as error:
                    yield Finding("to fix", "versions", str(error))
    yield Finding("ok", "versions", f"{', '.join(intact)}: all files unchanged" if intact else "none yet")


def _findings(check: Callable[[Path], Iterator[Finding]], root: Path) -> Iterator[Finding]:
    """Yield the findings of a check; if it raises an error, yield the error as a finding."""
    try:
        yield from check(root)
    except (PipelineError, OSError) as error:
        yield Finding("to fix", check.__name__.removeprefix("examine_"), str(error))


def _fixed(finding: Finding, fix: Callable[[], str]) -> Finding:
    errors: tuple[type[Exception], ...] = (PipelineError, *mlflow_store.store_errors())
    try:
        return Finding("fixed", finding.topic, fix())
    except errors as error:
        return Finding("to fix", finding.topic, f"{finding.what}; not fixed: {first_line(error)}")
