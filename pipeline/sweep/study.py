"""Open an Optuna study, check the settings that its trials share, and queue its trials."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from pipeline.config.sections import SweepConfig
from pipeline.sweep.journal_storage import JournalStudyStorage
from pipeline.sweep.pruner import ExtrapolationPruner, best_trial
from pipeline.sweep.sampler import SamplerPerTrial
from pipeline.sweep.search_space import BATCH_KEYS, STEP_TOKENS, as_choice, from_choice
from pipeline.system.errors import DivergedError, InputError, Pruned, first_line
from pipeline.system.files import locked
from pipeline.tracking.fingerprint import differences
from pipeline.training.config import RunConfig

# States of a trial. COMPLETE: it reached the target, and its value is what it spent. PRUNED: it was stopped, or used up
# its budget. FAIL: it has a `reason`, or a later trial retries it, or its worker died too often.
SHARED = "question"  # user attribute of a study: the settings that all of its trials share
VALUES = "values"  # user attribute of a trial: the value of each key that differs between trials, by dotted key
SURPLUS = "surplus"  # user attribute of a trial: its worker found that the last trial of the list was taken
CONFIRMED = "confirmed"  # user attribute of a searched study: the winner of `sweep confirm`
WORKER = "worker"  # user attribute of a trial: its worker's `worker_name` or `task_name`
DEATHS = "deaths"  # user attribute of a trial: how many workers died in it
MAX_RETRIES = 3  # of a trial whose worker died
FILES = ("journal", "sqlite")  # storages that are files, SCHEME:///PATH


def open_storage(url: str, root: Path, heartbeat_timeout_s: float) -> BaseStorage:
    """Open a study's storage, or create it; a relative path of a file starts at `root`.

    Optuna re-queues a trial whose worker has sent no heartbeat for `heartbeat_timeout_s` seconds. Raises InputError
    if the storage cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # workers print their trials themselves
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    try:
        if url.startswith("journal:///"):
            return JournalStudyStorage(root / url.removeprefix("journal:///"), heartbeat_timeout_s, requeue_dead)
        with _exclusive(url, root):
            return RDBStorage(
                absolute_url(url, root),
                engine_kwargs={"connect_args": {"timeout": 60}} if is_sqlite(url) else {"pool_pre_ping": True},
                heartbeat_interval=max(1, int(heartbeat_timeout_s / 6)),
                grace_period=int(heartbeat_timeout_s),
                heartbeat_stale_trial_callback=requeue_dead,
            )
    except ImportError:
        raise InputError(
            "sweep.storage: PostgreSQL's driver is not installed: `make install EXTRAS=postgres`"
        ) from None
    except (SQLAlchemyError, StorageInternalError, RuntimeError) as error:
        is_server = url.partition(":///")[0] not in FILES
        fault = "does not answer" if is_server else "cannot be opened"
        raise _storage_fault(url, error, fault, f"{'start it, ' if is_server else ''}fix it, or name another") from None


def _storage_fault(url: str, error: Exception, fault: str, hint: str) -> InputError:
    """The InputError for a fault of a storage; a journal's message has a hint of its own."""
    is_journal = url.startswith("journal") and isinstance(error, StorageInternalError)
    said = first_line(error)
    return InputError(f"sweep.storage: {said}" if is_journal else f"sweep.storage {url} {fault} ({said}): {hint}")


@contextmanager
def _exclusive(url: str, root: Path) -> Iterator[None]:
    """Hold a lock while the tables are created: two processes that create them at once break the database."""
    if is_sqlite(url):
        with locked(root / "checkpoints" / ".storage.lock", wait=True):
            yield
    else:
        with create_engine(url, poolclass=NullPool).connect() as connection:  # the lock ends with the connection
            connection.execute(text("SELECT pg_advisory_lock(hashtext('optuna'))"))
            yield


def is_sqlite(url: str) -> bool:
    """Whether a storage is an SQLite file, which only the processes of one machine can share."""
    return url.startswith("sqlite")


def absolute_url(url: str, root: Path) -> str:
    """The URL of a storage, valid in any working directory."""
    scheme, separator, path = url.partition(":///")
    return f"{scheme}:///{root / path}" if scheme in FILES and separator else url


@contextmanager
def translate_storage_errors(sweep: SweepConfig) -> Iterator[None]:
    """Raise InputError, with a message of one line, for errors of the storage."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        raise _storage_fault(sweep.storage, error, "fails", "fix it and repeat") from None


def join_study(sweep: SweepConfig, shared: dict[str, Any], storage: BaseStorage) -> Study:
    """Open the study, or create it. Raises InputError if its shared settings are not `shared`."""
    study = optuna.create_study(study_name=sweep.study, storage=storage, load_if_exists=True)
    study.sampler = SamplerPerTrial(lambda seed: _sampler(sweep, seed), sweep.seed)
    study.pruner = ExtrapolationPruner(sweep.pruner_tolerance) if sweep.pruner == "extrapolation" else NopPruner()
    if SHARED in study.user_attrs:
        require_same(study, shared)
    else:
        study.set_user_attr(SHARED, shared)
    return study


def _sampler(sweep: SweepConfig, seed: int) -> BaseSampler:
    if sweep.sampler == "random":
        return RandomSampler(seed=seed)
    first = min(10, max(1, sweep.trials // 3))  # random trials, before TPE has results to learn from
    return TPESampler(n_startup_trials=first, multivariate=True, constant_liar=sweep.workers != 1, seed=seed)


def find_study(sweep: SweepConfig, root: Path) -> Study:
    """Open the study. Raises InputError if it does not exist, or if no sweep has started it."""
    scheme, _, path = absolute_url(sweep.storage, root).partition(":///")
    try:
        if scheme in FILES and Path(path).parent.is_dir() and not Path(path).exists():
            raise KeyError(path)  # opening it would create it
        storage = open_storage(sweep.storage, root, sweep.heartbeat_timeout_s)
        study = optuna.load_study(study_name=sweep.study, storage=storage)
        if SHARED not in study.user_attrs:
            raise KeyError(SHARED)
        return study
    except KeyError:
        raise InputError(f"no study {sweep.study} in {sweep.storage}: `python -m pipeline sweep` starts it") from None


def shared_settings(
    sweep: SweepConfig, config: RunConfig, data_sha256: str, varied: Iterable[str] | None = None
) -> dict[str, Any]:
    """The settings that make trials comparable: objective, space, data, and all parameters that are not `varied`.

    By default, the keys of the space are varied.
    """
    varied = {*(sweep.axes if varied is None else varied), "train.threads"}  # workers divide the cores
    by_tokens = STEP_TOKENS in varied
    varied |= {*BATCH_KEYS} if by_tokens else set()
    params = {
        (name := section.section_name): {
            key: value for key, value in section.model_dump(mode="json").items() if f"{name}.{key}" not in varied
        }
        for section in config.decisive
    }
    space = sweep.model_dump(mode="json")["space"]
    shared = {"objective": sweep.objective, "space": space, "data_sha256": data_sha256, "params": params}
    return shared | ({"micro_batch_tokens": sweep.micro_batch_tokens} if by_tokens else {})


def require_same(study: Study, shared: dict[str, Any]) -> None:
    """Raise an InputError that names the differences, unless `shared` are the settings of `study`."""
    if changed := differences(study.user_attrs[SHARED], shared):
        raise InputError(
            f"study {study.study_name} has other settings: {', '.join(changed)}: restore them, or name another --study"
        )


def suggest(trial: Trial, sweep: SweepConfig) -> dict[str, Any]:
    """The trial's value of every key of the space; of a list of trials, the values that it was queued with.

    Raises Pruned if another worker has taken the last trial of the list: Optuna then makes a new one.
    """
    if sweep.is_list:
        if VALUES in trial.user_attrs:
            return dict(trial.user_attrs[VALUES])
        trial.set_user_attr(SURPLUS, True)
        raise Pruned("no trial of the list is left")
    values: dict[str, Any] = {}
    for key, axis in sweep.axes.items():
        if isinstance(axis, list):
            values[key] = from_choice(axis, trial.suggest_categorical(key, [as_choice(value) for value in axis]))
        elif axis.whole:
            values[key] = trial.suggest_int(key, int(axis.low), int(axis.high), step=int(axis.step or 1), log=axis.log)
        else:
            value = trial.suggest_float(key, axis.low, axis.high, step=axis.step, log=axis.log)
            values[key] = float(f"{value:.3g}")  # more digits make no difference
    return values


def enqueue(study: Study, sweep: SweepConfig, values: dict[str, Any]) -> bool:
    """Queue a trial with `values` if the space contains them; return whether it does."""
    axes = sweep.axes.items()
    if not all(values[k] in axis if isinstance(axis, list) else axis.low <= values[k] <= axis.high for k, axis in axes):
        return False
    study.enqueue_trial({key: as_choice(value) for key, value in values.items()}, skip_if_exists=True)
    return True


def enqueue_list(study: Study, listed: Sequence[dict[str, Any]]) -> None:
    """Queue a trial for each of the `listed` values that has none, or whose trial failed for lack of space or a worker.

    The values are an attribute of the trial, since Optuna's choices cannot grow when the list does.
    """
    trials = [trial for trial in latest_trials(study) if not trial.state.is_finished() or has_ended(trial)]
    present = {_key(trial.user_attrs.get(VALUES, {})) for trial in trials}
    for values in listed:
        if _key(values) not in present:
            study.enqueue_trial({}, user_attrs={VALUES: values})


def _key(values: dict[str, Any]) -> frozenset[tuple[str, Any]]:
    """The values in a form that a set can contain."""
    return frozenset((key, as_choice(value)) for key, value in values.items())


def has_ended(trial: FrozenTrial) -> bool:
    """Whether to train a trial again would give the same result: it reached the target, missed it, or diverged."""
    diverged = str(trial.user_attrs.get("reason")).startswith(DivergedError.__name__)
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (trial.state is TrialState.FAIL and diverged)


def failure_of(trial: FrozenTrial) -> str | None:
    """Why one of `latest_trials` has failed; None if it has not."""
    return str(trial.user_attrs.get("reason", "its worker died")) if trial.state is TrialState.FAIL else None


def requeue(study: Study, trial: FrozenTrial, died: bool = False) -> None:
    """Mark an unfinished trial as failed, and queue its settings again: the retry resumes from the checkpoint.

    `died`: its worker ended without a signal that it could answer, of which the trial may be the cause.
    """
    if trial.state is TrialState.RUNNING:
        study.tell(trial.number, state=TrialState.FAIL)
    if died:
        requeue_dead(study, trial)
    else:
        _retry(study, trial)


def requeue_dead(study: Study, trial: FrozenTrial) -> None:
    """Queue a failed trial, whose worker has died, again, but not for ever; interruptions do not count."""
    deaths = trial.user_attrs.get(DEATHS, 0) + 1
    if deaths <= MAX_RETRIES:
        _retry(study, trial, **{DEATHS: deaths})


def _retry(study: Study, trial: FrozenTrial, **changes: int) -> None:
    """Queue a copy of a failed trial, with these changes of its user attributes, and without its worker."""
    copied = copy.deepcopy(trial)
    copied.user_attrs.pop(WORKER, None)  # else the retry seems to belong to it until another worker has taken it
    copied.user_attrs.update(changes)
    RetryHeartbeatStaleTrialCallback()(study, copied)


def latest_trials(study: Study) -> list[FrozenTrial]:
    """All trials except those that a later trial retries, and those of which no listed trial was left."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if SURPLUS not in trial.user_attrs]
    retried = {number for trial in trials for number in RetryHeartbeatStaleTrialCallback.retry_history(trial)}
    return [trial for trial in trials if trial.number not in retried]


def unfinished_trials(study: Study) -> list[FrozenTrial]:
    """The trials that are queued or running."""
    return [trial for trial in latest_trials(study) if trial.state in (TrialState.WAITING, TrialState.RUNNING)]


def has_work(study: Study, sweep: SweepConfig) -> bool:
    """Whether a worker should start a trial: one is queued, or neither trials nor patience are used up.

    In a list of trials all are queued.
    """
    trials, best = latest_trials(study), best_trial(study)
    if any(trial.state is TrialState.WAITING for trial in trials):
        return True
    if sweep.is_list:
        return False
    if sweep.patience is not None and best is not None:
        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        if sum(trial.number > best.number and trial.state in ended for trial in trials) >= sweep.patience:
            return False
    return len(trials) < sweep.trials
