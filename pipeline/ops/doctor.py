"""doctor: the environment and the store of a project -> what is well, what is wrong, and what to do, a line each."""

from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.ops.checks import examine_environment
from pipeline.ops.dvc_cache import examine_cache
from pipeline.ops.finding import Finding, line
from pipeline.ops.leftovers import examine_leftovers
from pipeline.ops.stale_runs import examine_journals, examine_running
from pipeline.ops.store_location import examine_database, flaw_of
from pipeline.registry.artifacts import FOLDER_TAGS
from pipeline.registry.catalog import list_versions, verify
from pipeline.system.errors import IntegrityError, ModelMissing, PipelineError
from pipeline.tracking.mlflow_store import (
    EXPERIMENT,
    Store,
    all_found,
    connect,
    first_line,
    made_in,
    naming_dead_store,
    own_database,
    store_errors,
    store_uri,
)


class NotWell(PipelineError):  # noqa: N818 (an outcome, not a fault of the command)
    """Something is left to mend; exit code 1, since its kinds have codes of their own."""


def examine(root: Path, mend: bool) -> None:
    """Look at everything, print a line about each thing as it is known, and `mend` what can be mended.

    Without `mend` nothing is changed or made. Raises NotWell where something is left to mend.
    """
    n_left = n_fixable = 0
    for check in (examine_environment, examine_leftovers, examine_store, examine_cache):
        for finding in _found(check, root):
            if finding.mark != "mend":
                print(finding, flush=True)
            elif mend and finding.fix:
                print(outcome := _mended(finding, finding.fix), flush=True)
                n_left += outcome.startswith("mend")
            else:
                print(finding, flush=True)
                n_left, n_fixable = n_left + 1, n_fixable + (finding.fix is not None)
    if n_left:
        them = "it" if n_left == 1 else f"{n_fixable} of them"
        offer = f"; `python -m pipeline doctor --fix` mends {them}" if n_fixable else ""
        raise NotWell(f"{n_left} thing{'s' if n_left > 1 else ''} to mend, see above{offer}")


def examine_store(root: Path) -> Iterator[Finding]:
    """MLflow's store, and the runs, rows and versions in it."""
    uri = store_uri(root)
    yield from examine_database(root)
    if (database := own_database(root)) and flaw_of(database):
        return
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not (path.is_file() and path.stat().st_size):
        yield Finding("note", "store", f"{uri} is not there yet: `dvc repro` makes it")
        return
    with naming_dead_store(root, "then look again"):
        client = connect(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            yield Finding("note", "store", f"{uri} holds no run yet: `dvc repro` makes one")
            return
        store = Store(client, experiment.experiment_id, uri)
        yield Finding("ok", "store", f"{uri} answers")
        yield from examine_running(store, root)
        yield from examine_journals(store, root)
        if before := made_in(root):
            yield Finding("note", "versions", f"not looked at while the store looks for them in {before}")
        else:
            yield from examine_versions(store)


def examine_versions(store: Store) -> Iterator[Finding]:
    """Every byte of each version that a `register` made."""
    whole = []
    for model in all_found(store.client.search_registered_models):
        for version in list_versions(store, model.name):
            if not version.tags.keys() >= {*FOLDER_TAGS.values()}:
                continue
            try:
                verify(store, version)
                whole.append(f"{model.name} {version.version}")
            except (IntegrityError, ModelMissing) as error:
                yield Finding("mend", "versions", str(error))
    yield Finding("ok", "versions", f"{', '.join(whole)}: every byte as registered" if whole else "none registered yet")


def _found(check: Callable[[Path], Iterator[Finding]], root: Path) -> Iterator[Finding]:
    """What a check finds; where it cannot look, that is a finding too."""
    try:
        yield from check(root)
    except (PipelineError, OSError) as error:
        yield Finding("mend", check.__name__.removeprefix("examine_"), str(error))


def _mended(finding: Finding, fix: Callable[[], str]) -> str:
    """The line about a fault, once it is mended, or could not be."""
    try:
        return line("fixed", finding.topic, fix())
    except PipelineError as error:
        why = str(error)
    except store_errors() as error:
        why = first_line(error)
    return line("mend", finding.topic, f"{finding.what}; not mended: {why}")
