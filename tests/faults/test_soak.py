"""One training, started thirty times and ended each time by what chance draws: it comes to what it always comes to."""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.config.recipes import apply_recipe
from pipeline.data.encode import write_tokens
from pipeline.system.files import UNFINISHED, sha256_file
from pipeline.tracking.journal import STEPS, TIMES
from pipeline.tracking.mlflow_runs import runs_of
from pipeline.tracking.mlflow_store import open_store
from pipeline.training.checkpoint import checkpoint_steps
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.fault]
ROOT = Path(__file__).parents[2]
CYCLES = 30
N_STEPS = 300  # a cycle that comes to training takes some five of them; more pass where the machine is busy
SHARES = {"start": 6, "steps": 9, "save": 8, "end": 7}  # how many of 30 cycles aim at which part of a training's life
ENDINGS = (
    ["SIGTERM"], ["SIGINT"], ["SIGHUP"], ["SIGKILL"], ["SIGSTOP", "SIGKILL"], ["SIGSTOP", "SIGCONT", "SIGTERM"],
    ["the recorder's end", "SIGTERM"], ["the recorder's end", "SIGKILL"],
)  # fmt: skip
NOTHING_TO_SAVE = "error: interrupted: run the same command again to repeat it\n"  # before its steps, or after them
PATIENCE_S = 600  # for anything at all, on a machine that others use too


@pytest.fixture(autouse=True)
def _signals_as_in_a_terminal(interruptible: None) -> Iterator[None]:
    """Children must not inherit that SIGHUP is ignored, as it is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, bpe, tokenizer, shakespeare):
    """The smoke recipe with its tokens, a checkpoint every third step, dropout, and a target out of reach."""
    folder = tmp_path_factory.mktemp("soak") / "prepared"
    folder.mkdir()
    shutil.copy(ROOT / "params.yaml", folder)
    apply_recipe("smoke", folder / "params.yaml", ROOT / "recipes")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["optim"].update(max_tokens=256 * N_STEPS)
    params["target"].update(loss=0.001)
    params["model"].update(dropout=0.1)
    params["train"].update(threads=1)
    params["checkpoint"].update(interval_steps=3)
    params["samples"].update(interval_steps=50, max_tokens=5)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    shutil.copytree(bpe, folder / "data" / "tokenizer")
    write_tokens(shakespeare, tokenizer, folder / "data" / "tokens", fraction=0.005)
    return folder


class Start:
    """The stage `train`, started in `project` as the leader of a process group; what it says goes to a file."""

    def __init__(self, project: Path) -> None:
        self.project, self._log = project, project.parent / f"{project.name}.log"
        own = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary(project))}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stages.train"],
                cwd=project,
                env={**os.environ, **own},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def said(self) -> str:
        return self._log.read_text()

    @property
    def trains(self) -> bool:
        return re.search(r"^step \d+/|^the run is finished", self.said, re.MULTILINE) is not None

    def imports(self) -> bool:
        """Whether it has come to our imports; up to our first line, what Ctrl-C says is Python's affair."""
        return "/torch/" in Path(f"/proc/{self.process.pid}/maps").read_text()  # the first of some hundred libraries

    @property
    def place(self) -> str:
        """The part of its life that it is in."""
        if not self.trains:
            return "start"
        if any(self.project.glob(f"checkpoints/*/{UNFINISHED}*")):
            return "save"
        return "end" if rows(self.project) == N_STEPS else "steps"

    @property
    def recorder(self) -> psutil.Process | None:
        try:
            children = psutil.Process(self.process.pid).children()
            return next((child for child in children if "pipeline.tracking.recorder" in child.cmdline()), None)
        except psutil.NoSuchProcess:
            return None

    def comes_to(self, condition: Callable[[], object]) -> bool:
        """Wait for the condition; whether it came before the end of the process."""
        assert wait_until(lambda: self.process.poll() is not None or condition(), PATIENCE_S), self.said
        return self.process.poll() is None

    def send(self, number: int, to_group: bool) -> None:
        """Send a signal, to the process alone or to all of its group, if it is still there."""
        if self.process.poll() is None:
            (os.killpg if to_group else os.kill)(self.process.pid, number)

    def takes_a_step(self) -> None:
        before = rows(self.project)
        self.comes_to(lambda: rows(self.project) > before)

    def end(self, *actions: str, to_group: bool) -> str:
        """Do these to it, the last of which ends it; return the place in which that met it."""
        if "SIGINT" in actions:
            self.comes_to(self.imports)
        place = self.place
        for action in actions:
            if action == "the recorder's end":
                if recorder := self.recorder:
                    recorder.kill()
                    self.takes_a_step()
            elif self.process.poll() is None:
                (os.killpg if to_group else os.kill)(self.process.pid, signal.Signals[action])
            if action == "SIGSTOP":
                self.comes_to(lambda: psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED)
                place = self.place
            if action == "SIGCONT":
                self.takes_a_step()
        self.process.wait(PATIENCE_S)
        took_its_last_step = rows(self.project) == N_STEPS  # perhaps while the signal was on its way
        return self.place if actions[-1] == "SIGKILL" or took_its_last_step else place


def temporary(project: Path) -> Path:
    (folder := project.parent / f"{project.name}.tmp").mkdir(exist_ok=True)
    return folder


def rows(project: Path) -> int:
    return sum(path.read_text().count("\n") for path in project.glob(f"checkpoints/*/{TIMES}"))


def run_folder(project: Path) -> Path:
    (folder,) = (path for path in (project / "checkpoints").iterdir() if path.is_dir())
    return folder


def bits(project: Path) -> dict[str, str]:
    """Hashes of all that must be equal: outputs, journal, and the last checkpoint's weights, optimiser, RNG, facts."""
    folder = run_folder(project)
    last = sorted(folder.glob("step-*"))[-1]
    paths = [path for path in (project / "models").rglob("*") if path.is_file() and path.name != TIMES]
    paths += [folder / STEPS, *sorted(last.iterdir())]
    return {str(path.relative_to(project)): sha256_file(path) for path in paths}


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory):
    """What the run comes to when nothing happens to it, and how many seconds it takes to its first step."""
    shutil.copytree(prepared, project := tmp_path_factory.mktemp("straight") / "w")
    began = time.monotonic()
    with Start(project) as start:
        assert start.comes_to(lambda: rows(project)), start.said
        first_step_s = time.monotonic() - began
        assert start.process.wait(PATIENCE_S) == 0, start.said
    return bits(project), first_step_s


def draw_aims(chance: random.Random) -> list[str]:
    """What each cycle aims at: in any order, but for the end, which comes last."""
    early = [aim for aim, share in SHARES.items() if aim != "end" for _ in range(round(share * CYCLES / 30))]
    chance.shuffle(early)
    return [*early, *["end"] * (CYCLES - len(early))]


def wait_for(start: Start, aim: str, first_step_s: float, chance: random.Random) -> None:
    """Wait for a moment in the part of the training's life that is aimed at, or for its end where that comes first."""
    project, models, longer = start.project, start.project / "models", rows(start.project) + chance.randint(1, 5)
    before = written(models / "run.json")
    events: dict[str, list[tuple[Callable[[], object], float]]] = {  # and how many seconds later at most
        "start": [(lambda: True, first_step_s)],
        "steps": [(lambda: rows(project) >= longer, 0.05)],
        "save": [(lambda: start.place == "save", 0.0)],
        "end": [
            (lambda: start.trains and rows(project) == N_STEPS, 1.5),
            (lambda: list(models.glob(f"{UNFINISHED}*")), 0.01),
            (lambda: written(models / "run.json") > before, 0.5),
        ],
    }
    event, later_s = chance.choice(events[aim])
    start.comes_to(event)
    time.sleep(chance.uniform(0, later_s))  # the moment that chance draws


def written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def test_thirty_starts_that_all_end_otherwise_come_to_the_same_run(prepared, straight, tmp_path, chance):  # A1 A8 C1 C2
    expected, first_step_s = straight
    shutil.copytree(prepared, project := tmp_path / "w")
    met: Counter[str] = Counter()
    for aim in draw_aims(chance):
        ending, to_group, rows_before = chance.choice(ENDINGS), chance.random() < 0.5, rows(project)
        with Start(project) as start:
            wait_for(start, aim, first_step_s, chance)
            place = start.end(*ending, to_group=to_group)
        code, said = start.process.returncode, start.said
        met.update([place if code else "done before", "then ".join(ending)])
        whom = "the group" if to_group else "it alone"
        print(
            f"{aim}: {', '.join(ending)} to {whom}: in {place}: {code}, step {rows(project)}: {said.splitlines()[-1:]}"
        )
        number = signal.Signals[ending[-1]]
        heeded = number != signal.SIGKILL and place in ("steps", "save")
        assert code in ({0, 128 + number} if heeded else {0, -number, 128 + number}), said
        assert "Traceback" not in said, said
        if said.endswith(NOTHING_TO_SAVE):
            assert (code, place in ("start", "end")) == (128 + signal.SIGINT, True), place
        elif code > 128:  # it had the time to save
            saved = f"at step {newest_step(project, rows_before)} of {N_STEPS}, all saved in"
            assert f"error: {number.name} {saved}" in said
    half_removed = run_folder(project) / f"{UNFINISHED}removed-1"  # by a kill that chance seldom draws
    half_removed.mkdir()
    with Start(project) as start:
        assert start.process.wait(PATIENCE_S) == 0, start.said
    print(met)
    assert bits(project) == expected
    assert wait_until(lambda: not left_over(project), PATIENCE_S), left_over(project)  # a recorder may still be at it
    assert_tracked_once(project)


def newest_step(project: Path, rows_before: int = 0) -> int:
    """The step of the newest checkpoint; rows after it are those that the journal had before the start."""
    step = checkpoint_steps(run_folder(project))[0]
    assert rows(project) == max(step, rows_before)
    return step


def left_over(project: Path) -> list[str]:
    """Processes of the project, unfinished and temporary files, locks that are held."""
    found = [str(process) for process in psutil.process_iter() if belongs_to(project, process)]
    found += [str(path) for path in project.rglob(f"{UNFINISHED}*")]
    found += [
        str(path) for path in temporary(project).iterdir() if not path.name.startswith("torchinductor")
    ]  # torch's
    for path in project.rglob("*.lock"):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(f"{path} is held")
    return found


def belongs_to(project: Path, process: psutil.Process) -> bool:
    try:
        return process.cwd() == str(project) or any(str(project) in word for word in process.cmdline())
    except psutil.Error:  # it is gone
        return False


def assert_tracked_once(project: Path) -> None:
    """One run is FINISHED and has each step of each metric of the journal once; none is RUNNING, no other has rows."""
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
    store, folder = open_store(project), run_folder(project)
    run, *others = runs_of(store, folder.name)
    history = store.client.get_metric_history
    assert run.info.status == "FINISHED"
    assert {(other.info.status, *history(other.info.run_id, "loss")) for other in others} <= {("KILLED",)}
    steps, times = ([json.loads(line) for line in (folder / name).read_text().splitlines()] for name in (STEPS, TIMES))
    pairs = list(zip(steps, times, strict=True))
    for key in {key for row in steps for key in row} - {"step"}:
        logged = sorted((point.step, point.value, point.timestamp) for point in history(run.info.run_id, key))
        assert logged == [(row["step"], row[key], clock["logged_ms"]) for row, clock in pairs if key in row], key
    assert [point.step for point in history(run.info.run_id, "train_s")] == list(range(1, N_STEPS + 1))


# A terminal that is closed, and Ctrl-C in one


class Terminal:
    """A terminal in which the stage is started, after the words `before`; what it says is read and forgotten."""

    def __init__(self, project: Path, *before: str) -> None:
        self._ours, its = os.openpty()
        os.set_blocking(self._ours, False)
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "stages.train"],
            cwd=project,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=its,
            stdout=its,
            stderr=its,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # the terminal is the session's, as in a window
        )
        os.close(its)

    def comes_to(self, condition: Callable[[], object]) -> bool:
        """Read what is written until the condition holds; whether that was before the end of the process."""

        def look() -> bool:
            with suppress(OSError):  # there is nothing to read
                os.read(self._ours, 65536)
            return self.process.poll() is not None or bool(condition())

        assert wait_until(look, PATIENCE_S)
        return self.process.poll() is None

    def close(self) -> None:
        os.close(self._ours)


@pytest.mark.parametrize(
    ("before", "outlives"),
    [([], False), (["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"], True), (["nohup"], True)],
    ids=["in the foreground", "that ignores it", "nohup"],
)
def test_a_training_whose_terminal_is_closed_saves_and_stops_or_goes_on_where_that_is_ignored(
    prepared, tmp_path, before, outlives
):  # A8
    shutil.copytree(prepared, project := tmp_path / "w")
    terminal = Terminal(project, *before)
    process = terminal.process
    try:
        assert terminal.comes_to(lambda: rows(project) > 5)
        terminal.close()
        if outlives:
            closed_at = rows(project)
            assert wait_until(lambda: process.poll() is not None or rows(project) > closed_at + 20, PATIENCE_S)
            process.terminate()
        assert process.wait(PATIENCE_S) == 128 + (signal.SIGTERM if outlives else signal.SIGHUP)
    finally:
        process.kill()
    assert newest_step(project) < N_STEPS
    assert wait_until(lambda: not left_over(project), PATIENCE_S), left_over(project)
    (run,) = runs_of(open_store(project), run_folder(project).name)
    assert run.info.status == "KILLED"
    assert run.data.tags["ended"].startswith(f"Interrupted: {'SIGTERM' if outlives else 'SIGHUP'} at step")


def test_ctrl_c_while_it_is_still_importing_ends_it_without_a_traceback(prepared, tmp_path):
    shutil.copytree(prepared, project := tmp_path / "w")
    with Start(project) as start:
        assert start.comes_to(start.imports)
        start.process.send_signal(signal.SIGINT)
        assert start.process.wait(PATIENCE_S) == 128 + signal.SIGINT
        assert start.said == "error: interrupted: run the same command again to repeat it\n"
