"""study: the section `sweep` -> an Optuna study: where it is kept, what it asks, which trials go on.

A trial that reaches the target is COMPLETE, and its value is what that cost. One that is stopped, or spends its budget,
is PRUNED; Optuna's constraint `missed`, the share by which it was forecast to end behind the best (behind what it spent
itself, where none had reached the target yet), ranks it for TPE behind all that did reach it, those that came nearest
first: TPE sorts what breaks a constraint by how much it does (Optuna's documentation of Trial.set_constraint and
TPESampler). So no value is ever invented. A FAIL has its `reason`, or was taken up again by a trial of the same
settings. A trial that drew the settings of one that has ended is given what that came to.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from pipeline.config.sections import Range, SweepConfig
from pipeline.sweep.pruner import Curve, forecast
from pipeline.sweep.search_space import BATCH_KEYS, STEP_TOKENS, as_choice, from_choice, rounded
from pipeline.system.errors import InputError
from pipeline.system.files import locked
from pipeline.tracking.fingerprint import differences
from pipeline.tracking.mlflow_store import first_line
from pipeline.training.config import RunConfig

COST_OF_TOKEN = "cost_of_token"  # noqa: S105 (user attribute of a trial: its objective's units a token, so far)
RETRIES = 3  # of a trial whose worker died: what kills each worker that takes it must not go on for ever

optuna.logging.set_verbosity(optuna.logging.ERROR)  # a worker tells of its trials itself
warnings.filterwarnings("ignore", category=ExperimentalWarning)


def open_storage(url: str, root: Path, heartbeat_timeout_s: float) -> RDBStorage:
    """Open the database, made by the first that needs it; a relative SQLite file is `root`'s.

    A trial whose worker gave no sign for `heartbeat_timeout_s` seconds is taken up again. Raises InputError where no answer comes.
    """
    local = url.startswith("sqlite")
    options: dict[str, Any] = {"connect_args": {"timeout": 60}} if local else {"pool_pre_ping": True}
    try:
        with _alone_at(url, root):  # who make one database's tables together break it
            return RDBStorage(
                absolute_url(url, root),
                engine_kwargs=options,
                heartbeat_interval=max(1, int(heartbeat_timeout_s / 6)),
                grace_period=int(heartbeat_timeout_s),
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
            )
    except ImportError:
        raise InputError("sweep.storage: no driver for PostgreSQL is here: `pip install '.[postgres]'`") from None
    except (SQLAlchemyError, RuntimeError) as error:
        raise InputError(
            f"sweep.storage {url} does not answer ({first_line(error)}): start it, mend it, or name another"
        ) from None


@contextmanager
def _alone_at(url: str, root: Path) -> Iterator[None]:
    """Keep others from the database: a file's lock for SQLite, the server's own, for all machines, for PostgreSQL."""
    if url.startswith("sqlite"):
        with locked(root / "checkpoints" / ".storage.lock", wait=True):
            yield
    else:
        with create_engine(url, poolclass=NullPool).connect() as connection:  # which takes the lock along as it ends
            connection.execute(text("SELECT pg_advisory_lock(hashtext('optuna'))"))
            yield


def absolute_url(url: str, root: Path) -> str:
    """The database's URL, seen from any folder."""
    return f"sqlite:///{root / url.removeprefix('sqlite:///')}" if url.startswith("sqlite:///") else url


def join_study(sweep: SweepConfig, question: dict[str, Any], storage: RDBStorage, worker: int = 0) -> Study:
    """Open the study, or found it. Raises InputError where it was founded to answer another question."""
    study = optuna.create_study(study_name=sweep.study, storage=storage, load_if_exists=True)
    study.sampler = _sampler(sweep, sweep.seed + 1000 * worker + len(study.get_trials(deepcopy=False)))
    study.pruner = ExtrapolationPruner(sweep.pruner_tolerance) if sweep.pruner == "extrapolation" else NopPruner()
    founded = study.user_attrs.get("question")
    if founded is None:
        study.set_user_attr("question", question)
    elif changed := differences(founded, question):
        raise InputError(
            f"study {sweep.study} asks something else: {', '.join(changed)}: give this one another --study"
        )
    return study


def find_study(sweep: SweepConfig, root: Path) -> Study:
    """The study as it stands. Raises InputError where there is none."""
    path = Path(absolute_url(sweep.storage, root).removeprefix("sqlite:///"))
    try:
        if sweep.storage.startswith("sqlite:///") and path.parent.is_dir() and not path.exists():
            raise KeyError(path)  # opening it would make it
        return optuna.load_study(
            study_name=sweep.study, storage=open_storage(sweep.storage, root, sweep.heartbeat_timeout_s)
        )
    except KeyError:
        raise InputError(f"no study {sweep.study} in {sweep.storage}: `python -m pipeline sweep` begins it") from None


def question_of(sweep: SweepConfig, config: RunConfig, data_sha256: str) -> dict[str, Any]:
    """What makes two trials' values comparable: objective, target, data, and all settings that are not searched."""
    searched = {*sweep.axes, *(BATCH_KEYS if STEP_TOKENS in sweep.axes else ()), "train.threads"}  # those are divided
    params = {
        (name := section.section_name): {
            key: value for key, value in section.model_dump(mode="json").items() if f"{name}.{key}" not in searched
        }
        for section in config.decisive
    }
    space = sweep.model_dump(mode="json")["space"]
    question = {"objective": sweep.objective, "space": space, "data_sha256": data_sha256, "params": params}
    return question | ({"micro_batch_tokens": sweep.micro_batch_tokens} if STEP_TOKENS in sweep.axes else {})


def suggest(trial: Trial, sweep: SweepConfig) -> dict[str, Any]:
    """The trial's value for each key of the space."""
    values: dict[str, Any] = {}
    for key, axis in sweep.axes.items():
        match distribution_of(axis):
            case CategoricalDistribution(choices=choices):
                values[key] = from_choice(axis, trial.suggest_categorical(key, choices))  # type: ignore[arg-type]
            case IntDistribution(low=low, high=high, step=step, log=log):
                values[key] = trial.suggest_int(key, low, high, step=step, log=log)
            case FloatDistribution(low=low, high=high, step=step, log=log):
                values[key] = rounded(trial.suggest_float(key, low, high, step=step, log=log))
    return values


def distribution_of(axis: Range | list[Any]) -> BaseDistribution:
    """An axis of the space in Optuna's words."""
    if isinstance(axis, list):
        return CategoricalDistribution([as_choice(value) for value in axis])
    if axis.whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1))
    return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def ask_for(study: Study, sweep: SweepConfig, values: dict[str, Any]) -> bool:
    """Have `values` tried before all others; whether the space holds them."""
    for key, axis in sweep.axes.items():
        value = values[key]
        inside = value in axis if isinstance(axis, list) else axis.low <= value <= axis.high
        if not inside:
            return False
    study.enqueue_trial({key: as_choice(value) for key, value in values.items()}, skip_if_exists=True)
    return True


class ExtrapolationPruner(BasePruner):  # type: ignore[misc]
    """Prunes what is forecast to end behind the best trial so far, by more than the share `tolerance` of what that spent.

    The tolerance is the optimism: how much a trial may make up for that falls otherwise than the best did, be it that its
    rates stay high for longer. benchmarks/LOG.md has what it costs and what it saves. Before any trial has reached the
    target there is nothing to compare with, and none is pruned.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        best, curve = best_trial(study), curve_of(trial)
        if best is None or not curve:
            return False
        return forecast(curve, curve_of(best)) >= (1 + self.tolerance) * float(best.value)


def curve_of(trial: FrozenTrial) -> Curve:
    """Mean losses of the passes up to each rung, over what was spent in the objective's unit."""
    cost = trial.user_attrs.get(COST_OF_TOKEN, 1.0)
    return [(tokens * cost, loss) for tokens, loss in sorted(trial.intermediate_values.items())]


def best_trial(study: Study) -> FrozenTrial | None:
    """The trial that reached the target at the lowest cost, the first of equals; None before there is one."""
    reached = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return min(reached, key=lambda trial: (trial.value, trial.number), default=None)


def ended_with(values: dict[str, Any], study: Study) -> FrozenTrial | None:
    """The trial that has ended with the same values; None where there is none."""
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return next((trial for trial in ended if trial.user_attrs.get("values") == values), None)


def is_retry(trial: FrozenTrial) -> bool:
    return RetryHeartbeatStaleTrialCallback.retried_trial_number(trial) is not None


def taken_up_again(study: Study) -> set[int]:
    """Numbers of the trials that another one has taken up again."""
    history = RetryHeartbeatStaleTrialCallback.retry_history
    return {number for trial in study.get_trials(deepcopy=False) for number in history(trial)}


def take_up_again(study: Study, number: int, retries: int | None = None) -> None:
    """Fail a trial that its worker left, and queue its settings, which the checkpoints of the same run then meet."""
    if study.trials[number].state is TrialState.RUNNING:
        study.tell(number, state=TrialState.FAIL)
    RetryHeartbeatStaleTrialCallback(max_retry=retries)(study, study.trials[number])


def has_work(study: Study, sweep: SweepConfig) -> bool:
    """Whether a worker should take a trial: one is waiting, or trials and patience are not spent."""
    trials = study.get_trials(deepcopy=False)
    if any(trial.state is TrialState.WAITING for trial in trials):
        return True
    return sum(not is_retry(trial) for trial in trials) < sweep.trials and not _lost_patience(study, sweep)


@contextmanager
def naming_dead_storage(sweep: SweepConfig) -> Iterator[None]:
    """Turn the database's errors into an InputError of one line."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        raise InputError(f"sweep.storage {sweep.storage} fails ({first_line(error)}): mend it and repeat") from None


def _lost_patience(study: Study, sweep: SweepConfig) -> bool:
    best = best_trial(study)
    if sweep.patience is None or best is None:
        return False
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    since = sum(trial.number > best.number for trial in study.get_trials(deepcopy=False, states=ended))
    return bool(since >= sweep.patience)


def _sampler(sweep: SweepConfig, seed: int) -> BaseSampler:
    if sweep.sampler == "random":
        return RandomSampler(seed=seed)
    first = min(10, max(1, sweep.trials // 3))  # at random, before there is anything to learn from
    return TPESampler(n_startup_trials=first, multivariate=True, constant_liar=sweep.workers > 1, seed=seed)
