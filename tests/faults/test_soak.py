"""A training that is started six times, and ended each time in another way, ends with the same bits."""

import fcntl
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import psutil

from pipeline.system.files import UNFINISHED
from pipeline.tracking.journal import STEPS, TIMES
from pipeline.tracking.mlflow_runs import runs_of
from pipeline.tracking.mlflow_store import open_store
from pipeline.training.checkpoint import checkpoint_steps
from tests.trainings import ROOT, bits, change, epochs, n_steps, run_folder
from tests.waiting import wait_until

N_STEPS = 120  # a start takes some five of them, or more on a busy machine; the last start takes the rest
AIMS = ["start", "steps", "steps", "save", "save", "end"]  # parts of a training's life
ENDINGS = ["SIGTERM", "SIGINT", "SIGHUP", "SIGKILL", "SIGTERM without a recorder", "SIGKILL without a recorder"]
NOTHING_TO_SAVE = "error: interrupted{}: run the same command again to repeat it\n"  # before its steps, or after them
DEADLINE_S = 600  # for any event, also on a busy machine


class Start:
    """The stage `train` in `project`, as the leader of a process group; its output goes to a file."""

    def __init__(self, project):
        self.project, self._log = project, project.parent / f"{project.name}.log"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with self._log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "stages.train"], cwd=project, env=environment,
                                            stdout=log, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip

    @property
    def output(self):
        return self._log.read_text()

    @property
    def trains(self):
        """Whether it has printed its first step, or that there is none to take."""
        return re.search(r"^step \d+/|^the run is finished", self.output, re.MULTILINE) is not None

    def wait_for(self, event):
        """Wait for an event, or for the end of the process."""
        assert wait_until(lambda: self.process.poll() is not None or event(), DEADLINE_S), self.output

    def wait_for_steps(self, n):
        enough = n_steps(self.project) + n
        self.wait_for(lambda: n_steps(self.project) >= enough)

    def kill_recorder(self):
        for child in psutil.Process(self.process.pid).children():
            if "pipeline.tracking.recorder" in child.cmdline():
                child.kill()
                self.wait_for_steps(1)


@contextmanager
def started(project):
    start = Start(project)
    try:
        yield start
        start.process.wait(DEADLINE_S)
    finally:
        start.process.kill()
        start.process.wait()


def wait_for(start, aim, first_step_s, chance):
    """Wait for a random moment in a part of the training's life."""
    if aim == "start":
        time.sleep(chance.uniform(0, first_step_s))
        # before our code runs, Python itself handles Ctrl-C; torch is the first library that our code imports
        start.wait_for(lambda: "/torch/" in Path(f"/proc/{start.process.pid}/maps").read_text())
    elif aim == "steps":
        start.wait_for_steps(chance.randint(1, 5))
        time.sleep(chance.uniform(0, 0.05))
    elif aim == "save":
        start.wait_for(lambda: start.trains and any(start.project.glob(f"checkpoints/*/{UNFINISHED}*")))
    else:
        start.wait_for(lambda: start.trains and n_steps(start.project) == N_STEPS)
        time.sleep(chance.uniform(0, 1.5))


def test_a_training_that_is_ended_in_six_ways_ends_with_the_same_bits(
    prepared, tmp_path, chance, interruptible
):  # A1 A8 C1 C2
    shutil.copytree(prepared, straight := tmp_path / "straight")
    change(straight, **{**epochs(straight, N_STEPS), "samples.interval_steps": 50})
    shutil.copytree(straight, project := tmp_path / "w")
    began = time.monotonic()
    with started(straight) as start:
        start.wait_for(lambda: n_steps(straight))
        first_step_s = time.monotonic() - began
    assert start.process.returncode == 0, start.output

    aims = [*chance.sample(AIMS[:-1], len(AIMS) - 1), AIMS[-1]]  # a run at its end has no steps left
    for aim, ending in zip(aims, chance.sample(ENDINGS, len(ENDINGS)), strict=True):
        steps_before, number = n_steps(project), signal.Signals[ending.split()[0]]
        with started(project) as start:
            wait_for(start, aim, first_step_s, chance)
            if "recorder" in ending:
                start.kill_recorder()
            was_training = start.trains and n_steps(project) < N_STEPS
            if start.process.poll() is None:
                chance.choice([os.kill, os.killpg])(start.process.pid, number)
        code, output, steps = start.process.returncode, start.output, n_steps(project)
        print(f"{aim}: {ending}: {code}, step {steps}: {output.splitlines()[-1:]}")
        is_saved = was_training and steps < N_STEPS and number != signal.SIGKILL
        assert code in {0, 128 + number} | (set() if is_saved else {-number}), output
        assert "Traceback" not in output, output
        by = "" if number == signal.SIGINT else f" by {number.name}"
        if output.endswith(NOTHING_TO_SAVE.format(by)):
            assert not is_saved
        elif code > 128:
            step = checkpoint_steps(run_folder(project))[0]
            assert steps == max(step, steps_before)  # later records are from an earlier start
            assert f"error: {number.name} at step {step} of {N_STEPS}, all saved in" in output

    (
        run_folder(project) / f"{UNFINISHED}removed-1"
    ).mkdir()  # what a kill in a removal leaves, which chance seldom hits
    with started(project) as start:
        pass
    assert start.process.returncode == 0, start.output
    assert bits(project) == bits(straight)
    assert wait_until(lambda: not left_over(project), DEADLINE_S), left_over(project)  # a recorder may still run
    assert_tracked_once(project)


def left_over(project):
    """Processes in the project's folder, its unfinished files, and its locks that are held."""
    found = [str(path) for path in project.rglob(f"{UNFINISHED}*")]
    for process in psutil.process_iter(["cwd"]):
        if process.info["cwd"] == str(project):
            found.append(str(process))
    for path in project.rglob("*.lock"):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(f"{path} is held")
    return found


def assert_tracked_once(project):
    """One run is FINISHED and has each step of each metric once; all others are KILLED and have no metrics."""
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
    store, folder = open_store(project), run_folder(project)
    run, *others = runs_of(store, folder.name)
    history = store.client.get_metric_history
    assert run.info.status == "FINISHED"
    assert {(other.info.status, *history(other.info.run_id, "loss")) for other in others} <= {("KILLED",)}
    lines = zip(*((folder / name).read_text().splitlines() for name in (STEPS, TIMES)), strict=True)
    records = [json.loads(step) | json.loads(times) for step, times in lines]
    for key in ("loss", "sliding_loss", "corpus_loss", "grad_norm", "lr", "tokens", "train_s"):
        logged = sorted((point.step, point.value, point.timestamp) for point in history(run.info.run_id, key))
        assert logged == [(r["step"], r[key], r["logged_ms"]) for r in records if key in r], key
    assert len(records) == N_STEPS
