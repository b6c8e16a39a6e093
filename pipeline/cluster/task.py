"""What a job runs on its node: one command, which is stopped in time, requeued, and resumes where it ended."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from submitit.helpers import DelayedSubmission
from submitit.slurm.slurm import SlurmJobEnvironment

from pipeline.system.files import read_json, write_json
from pipeline.system.processes import search_path
from pipeline.system.signals import die_with_parent

# `main` loads the Task that submitit has stored, and calls it. SIGUSR2, which Slurm sends before the time limit, makes
# submitit call `checkpoint` and requeue the job. SIGTERM comes from a pre-emption, `scontrol requeue` and `scancel`.

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
SAVED = ("checkpoints/**/step-*", "data/.unfinished-*/*.json")  # what a command finishes: checkpoints and shards
ATTEMPT = "$ python -m "  # how the first line of an attempt begins, in the log and in submitit's
PICKLE_TIMEOUT_S = 300
FIRST_PORT, N_PORTS = 20_000, 10_000  # of the rendezvous of several nodes; below the ports that Linux gives out


class Task:
    """Run `python -m COMMAND` in the folder `root`, on each node of the job.

    The first node writes task-NUMBER.json to the job's folder: host, attempts, and the exit code, which stays null
    while the command runs and if a signal ended it. The output is in task-NUMBER.log, that of other nodes in
    task-NUMBER.node-N.log.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, number: int, root: Path, time_s: float, saved: frozenset[str] | None
    ) -> None:
        """`saved`: what was finished at the last requeue before a time limit; None before the first one."""
        self.command, self.folder, self.number, self.root = list(command), folder, number, root
        self.time_s, self.saved = time_s, saved

    def __call__(self) -> None:
        self._started, self._stopped = time.monotonic(), False
        self._node = int(os.environ.get("SLURM_PROCID", "0"))
        host = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # they wait until there is a command to stop
        self._note(code=None, message="", host=host, attempts=self._state().get("attempts", 0) + 1)
        node = f".node-{self._node}" if self._node else ""
        with (self.folder / f"task-{self.number}{node}.log").open("a", encoding="utf-8") as log:
            for file in (log, sys.stderr):
                print(f"{ATTEMPT}{shlex.join(self.command)}   # on {host}", file=file, flush=True)
            # A process group of its own: Slurm's signals reach this process alone, which passes each on once.
            self._child = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                cwd=self.root,
                env={**os.environ, **job_environment(os.environ)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=_prepare_child,
            )
        signal.signal(signal.SIGTERM, self._stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        self._wait_for_child()
        if self._stopped:
            self._requeue_if_preempted()
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        code = self._child.wait()
        exit_code = code if code >= 0 else 128 - code
        if self._node and exit_code == 128 + signal.SIGTERM:  # the first node saves, and requeues the job
            signal.pause()
        if not self._stopped:
            self._note(code=code)
        sys.exit(exit_code)

    def checkpoint(self) -> DelayedSubmission | None:
        """Let the command save and end; return what runs after the requeue, or None if the job must not be requeued."""
        self._stop()
        self._wait_for_child()
        saved = self._saved()
        if is_stuck(self.saved, saved, time.monotonic() - self._started, self.time_s):
            limit = f"a time limit of {self.time_s / 60:g} min is too short"
            self._note(code=1, message=f"{limit}: nothing new was saved between two requeues; raise --time")
            return None
        return DelayedSubmission(Task(self.command, self.folder, self.number, self.root, self.time_s, saved))

    def _stop(self, number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Tell the command to save and end, once: a second signal, such as at the time limit, would abort that."""
        if not self._stopped and self._child.returncode is None:  # later, its id may be another process's
            with suppress(ProcessLookupError):
                os.kill(self._child.pid, signal.SIGTERM)
        self._stopped = True

    def _wait_for_child(self) -> None:
        """Wait for the end of the command, also within a signal's handler, where Popen.wait could block for ever."""
        os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)

    def _requeue_if_preempted(self) -> None:
        """Requeue a job that Slurm will neither cancel nor requeue itself: one in the grace time of a pre-emption."""
        # The SLURM_JOB_ID of an array's last task is that of the array, for which scontrol shows all tasks.
        show = ["scontrol", "show", "job", SlurmJobEnvironment().job_id]
        shown = subprocess.run(show, capture_output=True, text=True, check=False).stdout
        if self._node == 0 and "JobState=RUNNING" in shown:
            os.kill(os.getpid(), signal.SIGUSR2)

    def _saved(self) -> frozenset[str]:
        return frozenset(str(path) for pattern in SAVED for path in self.root.glob(pattern))

    def _state(self) -> dict[str, Any]:
        path = self.folder / f"task-{self.number}.json"
        return dict(read_json(path, "remove it")) if path.is_file() else {}

    def _note(self, **values: Any) -> None:
        if self._node == 0:
            write_json(self.folder / f"task-{self.number}.json", {**self._state(), **values})


def warning_s(time_s: float) -> int:
    """How long before its time limit a job is told to save: 90 s, or a third of a short time limit."""
    return int(min(90, time_s / 3))


def is_stuck(before: frozenset[str] | None, now: frozenset[str], spent_s: float, time_s: float) -> bool:
    """Whether nothing was finished between two requeues, although the job had its time.

    A pre-emption says nothing: it may come at any moment, also twice before the first checkpoint. Slurm's warning
    may be a minute early, and a node takes a while to start Python.
    """
    return before == now and spent_s > 0.8 * (time_s - warning_s(time_s) - 60)


def job_environment(given: Mapping[str, str]) -> dict[str, str]:
    """What the command needs beside the environment of the job: programs, threads, and torchrun's PET_... on nodes."""
    found = {
        "PATH": search_path(Path(sys.executable).parent, "PATH", given),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "86400",  # seconds in which processes save: Slurm ends the job before
    }
    if (nodes := int(given.get("SLURM_JOB_NUM_NODES", "1"))) > 1:
        job, restarts = given["SLURM_JOB_ID"], given.get("SLURM_RESTART_COUNT", "0")
        # srun, which started this task, runs on the first node
        endpoint = f"{given['SLURM_LAUNCH_NODE_IPADDR']}:{FIRST_PORT + int(job) % N_PORTS}"
        found |= {"PET_NNODES": str(nodes), "PET_NODE_RANK": given["SLURM_PROCID"]}
        found |= {"PET_RDZV_ENDPOINT": endpoint, "PET_RDZV_ID": f"{job}.{restarts}"}
    return found


def _prepare_child() -> None:
    die_with_parent()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # some ways of tracking processes send it to all of a job
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def main(folder: str) -> None:
    """Run the task of this job whose pickle is in `folder`.

    It replaces submitit's own main program, which imports pkg_resources: setuptools 82 has removed that.
    """
    os.environ["SUBMITIT_FOLDER"] = folder
    environment = SlurmJobEnvironment()
    stored = environment.paths.submitted_pickle
    deadline = time.monotonic() + PICKLE_TIMEOUT_S
    while not stored.exists():  # it gets its name after sbatch has said the job's id
        if time.monotonic() > deadline:
            sys.exit(f"error: {stored} is missing, since the command that submits jobs was killed: run it again")
        time.sleep(0.2)
    submission = DelayedSubmission.load(stored)
    environment._handle_signals(environment.paths, submission)
    submission.result()


if __name__ == "__main__":
    main(sys.argv[1])
