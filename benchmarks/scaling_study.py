"""Measure how a sweep scales: with many workers, many trials, many MLflow runs, and a text in many shards.

    python -m benchmarks.scaling_study workers [--storage sqlite:///optuna.db] [--counts 1 4 16 64]
    python -m benchmarks.scaling_study trials [--storage sqlite:///optuna.db] [--counts 125 250 500 1000]
    python -m benchmarks.scaling_study mlflow [--counts 1 4 16 64]
    python -m benchmarks.scaling_study shards [--counts 1000 4000 16000]

The workers are forked processes that sleep instead of training. Everything else is the sweep's own code: the loop over
the trials, the sampler, the reports, the pruner and the heartbeats. All files are temporary. Each line of the output is
a result as JSON.
"""

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import alembic.command  # noqa: F401 (Optuna imports it when it opens a database; here once for all workers)
import numpy as np
import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy import inspect, text

from pipeline.config.params import load_params
from pipeline.config.sections import SweepConfig
from pipeline.data.token_files import TokenFolder, shard_name, write_shard
from pipeline.sweep.controller import print_status
from pipeline.sweep.figures import draw_study
from pipeline.sweep.pruner import best_trial
from pipeline.sweep.study import has_work, join_study, latest_trials, open_storage, shared_settings, suggest
from pipeline.sweep.worker import TrialReporter, Worker, WorkerConfig, ended_with
from pipeline.system.errors import Pruned
from pipeline.system.files import write_manifest
from pipeline.tracking.journal import StepRecord
from pipeline.training.config import RunConfig

STEPS, STEPS_PER_EPOCH, STEP_TOKENS = 112, 8, 4096  # about those of the recipe `laptop`; four reports an epoch
WRITES = """create_new_trial set_trial_param set_trial_state_values set_trial_intermediate_value set_trial_user_attr
    set_trial_system_attr record_heartbeat""".split()  # methods of an Optuna storage that write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("workers", "trials", "mlflow", "shards"))
    parser.add_argument("--counts", type=int, nargs="+")
    parser.add_argument("--storage", default="sqlite:///optuna.db", help="as sweep.storage")
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="duration of each measurement of workers and mlflow"
    )
    parser.add_argument("--running", type=int, default=0, help="trials: how many of other workers are running")
    parser.add_argument("--figures", action="store_true", help="trials: also draw the study's figures, which is slow")
    parser.add_argument("--step-s", type=float, default=0.5, help="duration of a simulated training step")
    arguments = parser.parse_args()
    measure: Callable[[Any], Iterator[dict[str, Any]]] = globals()[f"measure_{arguments.what}"]
    arguments.counts = (
        arguments.counts
        or {
            "workers": [1, 4, 16, 64],
            "trials": [125, 250, 500, 1000],
            "mlflow": [1, 4, 16, 64],
            "shards": [1000, 4000, 16000],
        }[arguments.what]
    )
    for result in measure(arguments):
        print(json.dumps({"load": os.getloadavg()[0], **result}), flush=True)


# Workers


def measure_workers(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each number of workers: latencies and rates of one study."""
    for count in arguments.counts:
        with tempfile.TemporaryDirectory() as folder:
            sweep, shared = settings(storage=arguments.storage, trials=10**6, workers=2)
            study, space = open_study(sweep, shared, Path(folder)), distributions(sweep)
            for number in range(20):  # so that the pruner has a best trial
                study.add_trial(simulated_trial(number, random.Random(number), space))  # noqa: S311 (no secret)
            jobs = [(sweep, shared, folder, n, arguments.seconds, arguments.step_s) for n in range(count)]
            found = in_processes(simulate_worker, jobs)
            yield {"storage": arguments.storage, "workers": count} | summary(found, arguments.seconds)


class SimulatedWorker(Worker):
    """A worker whose trainings sleep, until a deadline."""

    def __init__(self, sweep: SweepConfig, shared: dict[str, Any], root: Path, step_s: float) -> None:
        stop: Any = SimpleNamespace(received=None)
        given = str(root), sweep.model_dump(mode="json"), load_params().values, shared
        super().__init__(WorkerConfig(*given, sweep_id="", threads=1, parent_run_id="", sweep_pid=0), stop)
        self.step_s, self.deadline = step_s, math.inf
        self.writes = count_writes(self.study)
        self.report_s: list[float] = []
        self.start_s: list[float] = []
        self.report_cpu_s: list[float] = []
        self.start_cpu_s: list[float] = []
        self.slept_s, self.trials = 0.0, 0
        self.mark_end()

    def mark_end(self) -> None:
        self._ended, self._ended_cpu = time.perf_counter(), time.thread_time()

    def _train(self, trial: Trial) -> float:
        values = suggest(trial, self.sweep)
        ended_with(values, self.study)
        for key, value in {"values": values, "fingerprint": "f" * 16, "mlflow_run_id": "r" * 32}.items():
            trial.set_user_attr(key, value)
        run: Any = SimpleNamespace(
            records=[], steps_per_epoch=STEPS_PER_EPOCH, config=RunConfig.of(load_params()), finished=False
        )
        reporter = TrialReporter(trial, run, self.sweep)
        self.start_s.append(time.perf_counter() - self._ended)
        self.start_cpu_s.append(time.thread_time() - self._ended_cpu)
        try:
            for record in simulated_records(values):
                time.sleep(self.step_s)
                self.slept_s += self.step_s
                run.records.append(record)
                began, cpu, reported = time.perf_counter(), time.thread_time(), reporter._reported
                if self.stop.received is None and began > self.deadline:
                    self.stop.received = 15
                    raise Pruned("the time is over")
                reporter.after_step(record)
                if reporter._reported > reported:
                    self.report_s.append(time.perf_counter() - began)
                    self.report_cpu_s.append(time.thread_time() - cpu)
                if reporter._is_reached():
                    break
            reporter.require_target()
            return reporter.spent
        finally:
            self.trials += 1
            self.mark_end()


def simulated_records(values: dict[str, Any]) -> Iterator[StepRecord]:
    """The steps of a training whose loss falls to zero, sooner or later, depending on its parameters."""
    slowness = sum(abs(math.log(values[key] / best)) for key, best in (("optim.lr", 0.005), ("optim.muon_lr", 0.02)))
    needed = STEPS * (0.6 + 0.3 * slowness)
    for step in range(1, STEPS + 1):
        loss = 10.8 * max(0.0, 1 - step / needed) ** 1.5
        yield StepRecord(step, STEP_TOKENS * step, loss, 1.0, 0.005, sliding_loss=loss)


def simulate_worker(
    sweep: SweepConfig, shared: dict[str, Any], folder: str, number: int, seconds: float, step_s: float
) -> dict[str, Any]:
    began = time.perf_counter()
    worker = SimulatedWorker(sweep, shared, Path(folder), step_s)
    opened = time.perf_counter()
    worker.deadline = opened + seconds
    time.sleep(random.Random(number).uniform(0, step_s))  # noqa: S311 (workers do not report at the same instant)
    errors, cpu = "", sum(os.times()[:2])
    worker.mark_end()
    try:
        worker.work()
    except Exception as error:  # what fails under load is a result
        errors = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return {
        "open_s": opened - began,
        "reports": worker.report_s,
        "starts": worker.start_s,
        "report_cpu": worker.report_cpu_s,
        "start_cpu": worker.start_cpu_s,
        "trials": worker.trials,
        "writes": sum(worker.writes.values()),
        "slept_s": worker.slept_s,
        "cpu_s": sum(os.times()[:2]) - cpu,
        "wall_s": time.perf_counter() - opened,
        "error": errors,
    }


def summary(found: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    def together(key: str) -> list[float]:
        return [value for one in found for value in one[key]]

    reports = together("reports")
    wall = sum(one["wall_s"] for one in found)
    return {
        "trials_per_s": round(sum(one["trials"] for one in found) / seconds, 2),
        "reports_per_s": round(len(reports) / seconds, 1),
        "writes_per_s": round(sum(one["writes"] for one in found) / seconds, 1),
        "report_ms": quantiles_ms(reports),
        "start_ms": quantiles_ms(together("starts")),
        "report_cpu_ms": quantiles_ms(together("report_cpu"))[0],
        "start_cpu_ms": quantiles_ms(together("start_cpu"))[0],
        "open_ms": quantiles_ms([one["open_s"] for one in found]),
        "cpu_ms_per_report": round(1000 * sum(one["cpu_s"] for one in found) / max(1, len(reports)), 2),
        "asleep": round(sum(one["slept_s"] for one in found) / wall, 3),
        "errors": sorted({one["error"] for one in found} - {""}),
        "failed_workers": sum(bool(one["error"]) for one in found),
    }


def quantiles_ms(seconds: Sequence[float]) -> list[float]:
    """p50, p95 and the maximum, in ms."""
    return [round(1000 * float(value), 1) for value in np.quantile(seconds or [math.nan], (0.5, 0.95, 1))]


# Trials


def measure_trials(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each number of trials in a study: milliseconds of CPU of each question that the sweep asks it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        root, chance = Path(folder), random.Random(1)  # noqa: S311 (no secret)
        (root / "params.yaml").write_text(PARAMS_TEXT)
        sweep, shared = settings(storage=arguments.storage, trials=10**6, workers=2)
        study = open_study(sweep, shared, root)
        study.set_user_attr("trials", sweep.trials)
        space = distributions(sweep)
        for number in range(first := min(arguments.counts)):
            study.add_trial(simulated_trial(number, chance, space))
        running = 0
        for count in arguments.counts:
            for number in range(len(study.get_trials(deepcopy=False)), count, first):
                multiply(study, first, chance, space, number)
            for number in range(running, arguments.running):
                trial = simulated_trial(number, chance, space)
                trial.state, trial.values, trial.datetime_complete = TrialState.RUNNING, None, None
                study.add_trial(trial)
            running = arguments.running
            yield {"storage": arguments.storage, "trials": count, "running": running} | {
                f"{name}_ms": round(1000 * value, 2)
                for name, value in questions(sweep, shared, root, arguments.figures).items()
            }


def multiply(study: Study, first: int, chance: random.Random, space: dict[str, Any], number: int) -> None:
    """Add as many trials as the study had at first; in SQL where adding each would take minutes."""
    backend = getattr(study._storage, "_backend", None)
    if not hasattr(backend, "engine"):
        for n in range(number, number + first):
            study.add_trial(simulated_trial(n, chance, space))
        return
    tables = "trial_params trial_values trial_intermediate_values trial_user_attributes trial_system_attributes".split()
    with backend.engine.begin() as connection:
        for table in ("trials", *tables):
            names = [column["name"] for column in inspect(backend.engine).get_columns(table)][1:]
            moved = [f"{name} + {number}" if name in ("trial_id", "number") else name for name in names]
            added = (f"trial_id, {', '.join(names)}", f"trial_id + {number}, {', '.join(moved)}")
            columns, values = added if table == "trials" else (", ".join(names), ", ".join(moved))
            query = f"INSERT INTO {table} ({columns}) SELECT {values} FROM {table} WHERE trial_id <= {first}"  # noqa: S608 (no input)
            connection.execute(text(query))


def questions(sweep: SweepConfig, shared: dict[str, Any], root: Path, figures: bool) -> dict[str, float]:
    """Seconds of each question; warm ones are the median of five."""
    found = {}
    began = time.process_time()
    study = open_study(sweep, shared, root)
    found["join"] = time.process_time() - began

    def timed(name: str, ask: Callable[[], Any], rounds: int = 5) -> None:
        durations = []
        for _ in range(rounds):
            began = time.process_time()  # the machine is loaded
            ask()
            durations.append(time.process_time() - began)
        found[name] = statistics.median(durations)

    timed("has_work", lambda: has_work(study, sweep))
    timed("latest_trials", lambda: latest_trials(study))
    timed("best_trial", lambda: best_trial(study))
    trial = study.ask()
    values = suggest(trial, sweep)
    timed("ended_with", lambda: ended_with(values, study))
    steps = iter(range(1, 100))

    def report() -> None:  # as a TrialReporter does
        trial.report(5.0, next(steps))
        best_trial(study)
        trial.should_prune()

    timed("report", report)
    study.tell(trial, state=TrialState.PRUNED)

    def ask() -> None:
        trial = study.ask()
        suggest(trial, sweep)
        study.tell(trial, state=TrialState.FAIL)

    timed("ask_suggest_tell", ask)
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        timed("status", lambda: print_status(sweep), rounds=1)
        if figures:
            timed("figures", lambda: draw_study(study, root / "figures"), rounds=1)
    return found


def simulated_trial(number: int, chance: random.Random, space: dict[str, Any]) -> FrozenTrial:
    """A trial that has ended: one in ten reached the target; one in fifty retries another."""
    study, sampler = optuna.create_study(), optuna.samplers.RandomSampler(seed=number)
    other = study.ask()
    params = {
        key: sampler.sample_independent(study, study._storage.get_trial(other._trial_id), key, axis)
        for key, axis in space.items()
    }
    state = TrialState.COMPLETE if number % 10 == 0 else TrialState.PRUNED
    reports = STEPS // 2 if state is TrialState.COMPLETE else chance.randrange(2, STEPS // 2)
    curve = {2 * STEP_TOKENS * i: 10.8 * (1 - i / STEPS) for i in range(1, reports + 1)}
    return create_trial(
        state=state,
        value=float(max(curve)) + number if state is TrialState.COMPLETE else None,
        params=params,
        distributions=space,
        intermediate_values=curve,
        user_attrs={"values": params, "worker": f"host:{number}", "fingerprint": "f" * 16, "mlflow_run_id": "r" * 32},
        system_attrs={"failed_trial": 0, "retry_history": [0]} if number % 50 == 49 else {},
    )


def distributions(sweep: SweepConfig) -> dict[str, Any]:
    """The distributions of the search space, from a trial that asks for all of them."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler())
    suggest(study.ask(), sweep)
    found: dict[str, Any] = study.trials[0].distributions
    return found


# MLflow


def measure_mlflow(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each number of recorders: the latency of the batch that each sends every five seconds."""
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 (once for all processes: it takes seconds)

    from pipeline.tracking.mlflow_store import open_store

    for count in arguments.counts:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
            in_processes(lambda root: open_store(root) and None, [(Path(folder),)])  # creates the database
            empty = Path(folder, "mlflow.db").stat().st_size
            jobs = [(folder, number, arguments.seconds, arguments.step_s) for number in range(count)]
            found = in_processes(simulate_recorder, jobs)
            size = Path(folder, "mlflow.db").stat().st_size - empty
        sent = [value for one in found for value in one["batches"]]
        rows = sum(one["rows"] for one in found)
        yield {
            "recorders": count,
            "rows_per_s": round(rows / arguments.seconds, 1),
            "batches_per_s": round(len(sent) / arguments.seconds, 2),
            "batch_ms": quantiles_ms(sent),
            "cpu_ms_per_batch": round(1000 * sum(one["cpu_s"] for one in found) / max(1, len(sent)), 1),
            "open_ms": quantiles_ms([one["open_s"] for one in found]),
            "bytes_per_row": round(size / max(1, rows)),
            "errors": sorted({one["error"] for one in found} - {""}),
        }


def simulate_recorder(folder: str, number: int, seconds: float, step_s: float) -> dict[str, Any]:
    from pipeline.tracking.mlflow_runs import log_records
    from pipeline.tracking.mlflow_store import open_store

    began, cpu = time.perf_counter(), sum(os.times()[:2])
    batches: list[float] = []
    rows, step, error_text, tick_s = 0, 0, "", 5.0
    opened = began
    try:
        store = open_store(Path(folder))
        run = store.client.create_run(store.experiment_id, run_name=str(number))
        opened, cpu = time.perf_counter(), sum(os.times()[:2])
        time.sleep(random.Random(number).uniform(0, tick_s))  # noqa: S311 (recorders do not send at the same instant)
        while time.perf_counter() < opened + seconds:
            first, step = step, step + round(tick_s / step_s)
            records = [mlflow_record(n) for n in range(first + 1, step + 1)]
            sending = time.perf_counter()
            log_records(store, run.info.run_id, records)
            batches.append(time.perf_counter() - sending)
            rows += sum(len(record) - 3 for record in records)  # as log_records leaves out
            time.sleep(max(0.0, tick_s - batches[-1]))
    except Exception as error:  # what fails under load is a result
        error_text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    cpu_s = sum(os.times()[:2]) - cpu
    return {"batches": batches, "rows": rows, "open_s": opened - began, "cpu_s": cpu_s, "error": error_text}


def mlflow_record(step: int) -> dict[str, float]:
    record = StepRecord(step, STEP_TOKENS * step, 5.0, 1.0, 0.005, loss_estimate=5.0, step_s=1.0, train_s=float(step))
    record.wall_s, record.logged_ms = float(step), time.time_ns() // 1_000_000
    return {**record.line("steps.jsonl"), **record.line("times.jsonl"), "tokens_per_s": 4000.0}


# Shards


def measure_shards(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each number of shards: seconds to open the folder, and bytes of its manifest; the shards are tiny."""
    block = os.urandom(1 << 26)
    began = time.process_time()
    hashlib.sha256(block)
    hash_bytes_per_s = len(block) / (time.process_time() - began)
    for count in arguments.counts:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "tokens"
            folder.mkdir()
            for index in range(count):
                write_shard(folder / shard_name("train", index), [np.arange(32) % 256], 256)
            write_shard(folder / shard_name("val", 0), [[]], 256)
            write_manifest(folder)
            cpu, wall = time.process_time(), time.perf_counter()
            tokens = TokenFolder(folder)
            opened, opened_wall = time.process_time() - cpu, time.perf_counter() - wall
            wall = time.perf_counter()
            for start in range(0, 32 * min(count, 1000), 32 * 100):
                tokens.train.read(start, start + 64)
            yield {
                "shards": count,
                "manifest_bytes": (folder / "manifest.json").stat().st_size,
                "open_cpu_s": round(opened, 3),
                "open_wall_s": round(opened_wall, 3),
                "read_ms": round(1000 * (time.perf_counter() - wall) / (min(count, 1000) / 100), 3),
                "hash_gb_per_s": round(hash_bytes_per_s / 1e9, 2),
            }


# Common


PARAMS_TEXT = Path("params.yaml").read_text() if Path("params.yaml").is_file() else ""


def settings(**changes: Any) -> tuple[SweepConfig, dict[str, Any]]:
    """The sweep of params.yaml with changes, and the settings that its trials share."""
    params = load_params()
    sweep = params.overridden(SweepConfig, {"study": "simulated", **changes}).section(SweepConfig)
    return sweep, shared_settings(sweep, RunConfig.of(params), "d" * 64)


def open_study(sweep: SweepConfig, shared: dict[str, Any], root: Path) -> Study:
    return join_study(sweep, shared, open_storage(sweep.storage, root, sweep.heartbeat_timeout_s))


def count_writes(study: Study) -> dict[str, int]:
    """Count the calls of the storage's methods that write, from now on."""
    counts = dict.fromkeys(WRITES, 0)

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return method(*args, **kwargs)

        return call

    for name in WRITES:
        if hasattr(study._storage, name):
            setattr(study._storage, name, counted(name, getattr(study._storage, name)))
    return counts


def in_processes(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call the function in a forked process for each job, all at once; return what they return."""
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()

    def call(job: tuple[Any, ...]) -> None:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):  # the workers' own lines
            found = function(*job)
        queue.put(found)

    processes = [fork.Process(target=call, args=(job,)) for job in jobs]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return found


if __name__ == "__main__":
    main()
