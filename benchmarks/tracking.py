"""Measure the cost of tracking: training with and without journal and MLflow, in turn, as a ratio.

    python -m benchmarks.tracking [--steps 40] [--rounds 5]

Both run the recipe in params.yaml on data/ (`dvc repro tokenize` makes it). The bare loop is `train_steps` alone. The
tracked loop also writes the journal's records, and a process sends them to an MLflow store of its own. Compared are the
median time of a step and the wall time of all steps. The time to open and close the run is reported separately.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

from pipeline.config.params import load_params
from pipeline.data.batches import steps_of
from pipeline.system.device import prepare_machine
from pipeline.tracking.fingerprint import identify
from pipeline.tracking.journal import Journal
from pipeline.tracking.mlflow_store import open_store
from pipeline.tracking.recorder import Recorder
from pipeline.training.loop import fresh_state, train_steps
from pipeline.training.train import read_config, read_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    config = read_config(load_params(), Path("data"))
    machine = prepare_machine(config.train)
    text = read_data(config, machine, Path("data"))
    identity = dict(identify(text.sha256, config.decisive, machine))

    def records():
        state = fresh_state(config.model, text.vocabulary, config.optim, config.train, machine)
        batches = steps_of(1, text.train, config.windows, config.train.seed)
        return train_steps(state, batches, arguments.steps, config.optim, machine)

    def bare() -> tuple[float, float]:
        started = time.perf_counter()
        steps = [record.step_s for record in records()]
        return statistics.median(steps), time.perf_counter() - started

    def tracked(folder: Path) -> tuple[float, float, float]:
        journal, train_s = Journal(folder), 0.0
        opened = time.perf_counter()
        with Recorder(folder) as recorder, recorder.recording(folder, identity, {}):
            started, steps = time.perf_counter(), []
            for record in records():
                steps.append(record.step_s)
                train_s += record.step_s
                record.train_s, record.logged_ms = train_s, time.time_ns() // 1_000_000
                journal.append(record)
            wall = time.perf_counter() - started
        journal.close()
        return statistics.median(steps), wall, time.perf_counter() - opened - wall

    rounds = []
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{temporary}/mlflow.db"
        open_store(Path(temporary))  # creates the database, which is not measured
        bare()  # warm-up
        for i in range(arguments.rounds):
            (folder := Path(temporary) / str(i)).mkdir()
            rounds.append((*bare(), *tracked(folder)))
    step, wall = ([one[j + 2] / one[j] for one in rounds] for j in (0, 1))
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "bare_step_ms": round(1000 * statistics.median(one[0] for one in rounds), 1),
        "tracked_step_ms": round(1000 * statistics.median(one[2] for one in rounds), 1),
        "step_ratio": [round(value, 4) for value in (min(step), statistics.median(step), max(step))],
        "wall_ratio": [round(value, 4) for value in (min(wall), statistics.median(wall), max(wall))],
        "open_and_close_s": round(statistics.median(one[4] for one in rounds), 2),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
