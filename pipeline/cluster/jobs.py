"""Submit, list, follow and cancel the project's jobs on a Slurm cluster."""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from itertools import count
from pathlib import Path
from typing import NamedTuple

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env

from pipeline.cluster import task as program
from pipeline.config.sections import SlurmConfig
from pipeline.system.errors import InputError, Interrupted, PipelineError
from pipeline.system.files import read_json, write_json
from pipeline.system.host import SOURCE_ROOT, project_root, uses_gpus
from pipeline.system.processes import search_path
from pipeline.system.signals import StopSignals
from pipeline.system.words import counted

JOBS = Path("checkpoints/jobs")  # a folder for each job
JOB = "job.json"
SITE_OPTIONS = ("account", "partition", "qos", "reservation", "constraint")  # of sbatch; SBATCH_X is their default
MAX_POLL_S = 15.0  # between two questions to Slurm's controller, which all users share
LOG_POLL_S = 0.5

WAITS = {  # reasons of squeue -> what they mean
    "Resources": "the nodes are in use",
    "Priority": "other jobs have a higher priority",
    "Dependency": "another job must end first",
    "BeginTime": "Slurm starts it again in a moment",
    "PartitionTimeLimit": "--time is above the limit of the partition: cancel it and lower --time",
    "PartitionNodeLimit": "--nodes is above the limit of the partition: cancel it and lower --nodes",
    "PartitionConfig": "it asks for more time or nodes than the limit of the partition: cancel it and ask for less",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition takes no jobs",
    "BadConstraints": "no node can ever run it: cancel it and ask for less",
    "DependencyNeverSatisfied": "the job before it has failed: cancel it",
    "ReqNodeNotAvail": "a node that it needs is down or reserved",
    "JobHeldUser": "it is held: `scontrol release`",
    "JobHeldAdmin": "an administrator holds it",
}
CANCELLED = "it was cancelled"
ENDS = {  # final states of Slurm -> what they mean
    "CANCELLED": CANCELLED,
    "TIMEOUT": "its time was over before everything was saved: give it 300 s to save with slurm.options "
    "{signal: USR2@300}, and a --time above 20 min",
    "OUT_OF_MEMORY": "it was out of memory: raise --mem",
    "NODE_FAIL": "its node died",
    "BOOT_FAIL": "its node did not start",
    "PREEMPTED": "it was pre-empted",
    "DEADLINE": "it did not end before its deadline",
}
FINAL = {"FAILED", *ENDS}
FORGOTTEN = "Invalid job id"  # squeue's word for a job that ended some minutes ago
NO_NODES = "Requested node configuration is not available"  # also said when the nodes are only down
# Lines that say that a task has ended, not why: `slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-... ***`.
NO_CAUSE = r"srun: |submitit |slurmstepd[^:]*: error: \*\*\* .* AT \S+ \*\*\*"
SHOW = "python -m pipeline jobs"


class JobFailed(PipelineError):  # noqa: N818
    """A job ended without having done its work."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class TaskState(NamedTuple):
    """What a task of a job does: `state` is done, failed, cancelled, or Slurm's word, such as running."""

    number: int
    state: str
    node: str = ""
    elapsed: str = ""
    why: str = ""
    code: int | None = None

    @property
    def ended(self) -> bool:
        return self.state == "done" or self.failed

    @property
    def failed(self) -> bool:
        return self.state in ("failed", "cancelled")


@dataclass(frozen=True)
class Job:
    """A submitted job of one task, or an array of several."""

    id: str
    name: str
    commands: list[list[str]]
    after: str | None  # the id of the job that must succeed first
    folder: Path  # with job.json, and the state, the log and submitit's files of each task

    @property
    def tasks(self) -> list[TaskState]:
        """The state of each task, from Slurm unless the task itself has noted its end. Raises InputError."""
        noted = [self._noted(number) for number in range(len(self.commands))]
        rows = {}
        if not all(task and task.ended for task in noted):
            rows = {name: rest for name, *rest in _squeue(self.id)}
        return [task if task and task.ended else self._state(number, rows) for number, task in enumerate(noted)]

    @property
    def ended(self) -> bool:
        return all(task.ended for task in self.tasks)

    @property
    def succeeded(self) -> bool:
        return all(task.state == "done" for task in self.tasks)

    def log(self, number: int) -> Path:
        """The output of a task's command."""
        return self.folder / f"task-{number}.log"

    def _noted(self, number: int) -> TaskState | None:
        """What the task itself has noted; None before its start."""
        path = self.folder / f"task-{number}.json"
        if not path.is_file():
            return None
        found = read_json(path, "remove it")
        code = found["code"]
        if not code:
            return TaskState(number, "running" if code is None else "done", found["host"], code=code)
        if not (why := found["message"] or self._error(number)):
            last = next(reversed(_attempt(self.log(number))), "no output")
            why = f"exit code {code}, {last}" if code > 0 else f"killed by signal {-code}"
        return TaskState(number, "cancelled" if why == CANCELLED else "failed", found["host"], why=why, code=code)

    def _state(self, number: int, rows: dict[str, list[str]]) -> TaskState:
        """What Slurm says of a task that has not noted its end."""
        row = rows.get(f"{self.id}_{number}") or rows.get(self.id)
        if row is None:
            return TaskState(number, "failed", why=self._error(number) or "it is gone, cancelled or lost with its node")
        state, reason, node, elapsed = row
        if state == "COMPLETED":  # the file with the note may take a while to come from another node
            return TaskState(number, "done", node, elapsed)
        if state not in FINAL:
            name = "" if state != "PENDING" or reason == "None" else reason.split(",")[0]
            return TaskState(number, state.lower(), node, elapsed, f"{name} ({WAITS[name]})" if name in WAITS else name)
        if why := ENDS.get(state):  # which Slurm forgets after some minutes
            write_json(self.folder / f"task-{number}.json", {"code": 1, "message": why, "host": node, "attempts": 1})
        ended = "cancelled" if why == CANCELLED else "failed"
        return TaskState(number, ended, node, elapsed, why or self._error(number) or state.lower())

    def _error(self, number: int) -> str:
        """The line of the last attempt's output that says why the task failed."""
        task = f"{self.id}_{number}" if len(self.commands) > 1 else self.id
        patterns = f"task-{number}*.log", f"{task}_*_log.err"
        log, err = (
            [line for path in self.folder.glob(pattern) for line in _attempt(path) if not re.match(NO_CAUSE, line)]
            for pattern in patterns
        )
        errors = [line for line in log + err if re.match(r"(slurmstepd[^:]*: )?error: ", line)]
        return next((line.partition("error: ")[2] for line in reversed(errors)), "") or next(reversed(err), "")


def require_slurm(slurm: SlurmConfig, nodes: int = 1) -> None:
    """Raise InputError, unless a cluster answers and knows what `slurm` asks for, and torch can use its GPUs.

    Whether any node has that many cores and so much memory is known only to `submit`.
    """
    _run("squeue", "--noheader", "--me")
    if slurm.gpus and not uses_gpus():
        raise InputError(
            f"slurm.gpus {slurm.gpus}: this .venv has torch's CPU build, which uses no GPU: "
            "`make clean-venv install TORCH=cuda`, then repeat"
        )
    flags = [
        f"--{key}" if value is True else f"--{key}={value}" for key, value in _sbatch_options(slurm, nodes).items()
    ]
    try:
        with _submitting():
            _run("sbatch", "--test-only", "--wrap=true", *flags)
    except InputError as error:
        if NO_NODES not in str(error):
            raise _refused(slurm, nodes, str(error).removeprefix("sbatch: ")) from None


def submit(
    name: str, commands: Sequence[Sequence[str]], slurm: SlurmConfig, *, nodes: int = 1, after: Job | None = None
) -> Job:
    """Submit a job with a task for each of `commands`, which are a module and its arguments, run with this Python.

    Each task has `nodes` nodes, with what `slurm` says of each, and runs its command in the project's folder, on every
    node. The job starts after all tasks of `after` have succeeded. Before the time limit, or when Slurm pre-empts it, a
    task gets SIGTERM and is requeued. Raises InputError if Slurm refuses the job.
    """
    require_slurm(slurm, nodes)
    root, python_path = project_root(), search_path(SOURCE_ROOT, "PYTHONPATH")
    before = None if after is None or after.succeeded else after  # Slurm soon forgets a job that has ended
    home = next(path for i in count(1) if not (path := root / JOBS / f"{name}-{i}").exists())
    home.mkdir(parents=True)
    time_s = 60.0 * slurm.time_min
    executor = _Executor(home, max_num_timeout=10**6)  # `Task` says when to stop
    options = {"requeue": True, "export": "ALL", **_sbatch_options(slurm, nodes)}
    if before:
        options |= {"dependency": f"afterok:{before.id}", "kill-on-invalid-dep": "yes"}
    executor.update_parameters(
        job_name=name,
        time=slurm.time_min,
        nodes=nodes,
        ntasks_per_node=1,
        signal_delay_s=program.warning_s(time_s),
        array_parallelism=len(commands),  # submitit's default is 256
        setup=[f"cd {shlex.quote(str(root))}", f"export PYTHONPATH={shlex.quote(python_path)}"],
        # srun does not take the number of cores from sbatch; a node that fails ends the others
        srun_args=["--kill-on-bad-exit=1", *([f"--cpus-per-task={slurm.cpus}"] if slurm.cpus else [])],
        additional_parameters=options,
    )
    tasks = [program.Task(command, home, number, root, time_s, None) for number, command in enumerate(commands)]
    try:
        with _submitting(), executor.batch():
            submitted = [executor.submit(task) for task in tasks]
    except (FailedJobError, FailedSubmissionError) as error:
        shutil.rmtree(home)
        raise _refused(slurm, nodes, _refusal(str(error))) from None
    identity = submitted[0].job_id.partition("_")[0]
    job = Job(identity, name, [list(command) for command in commands], after.id if after else None, home)
    write_json(home / JOB, {key: value for key, value in vars(job).items() if key != "folder"})
    shape = f"{counted(len(tasks), 'task')} {'of' if len(tasks) > 1 else 'on'} {counted(nodes, 'node')}"
    print(f"job {identity} ({name}) is submitted, {shape}: {home}", flush=True)
    return job


def _site_options() -> dict[str, str]:
    """Options of sbatch from variables such as SBATCH_ACCOUNT, which many sites let their users set."""
    values = {name: os.environ.get(f"SBATCH_{name.upper()}") for name in SITE_OPTIONS}
    return {name: value for name, value in values.items() if value}


def _sbatch_options(slurm: SlurmConfig, nodes: int) -> dict[str, bool | int | str]:
    asked = {
        "partition": slurm.partition,
        "time": slurm.time_min,
        "nodes": nodes,
        "gpus-per-node": slurm.gpus,
        "cpus-per-task": slurm.cpus,
        "mem": f"{math.ceil(slurm.mem_gb * 1024)}M" if slurm.mem_gb else None,
    }
    return _site_options() | {key: value for key, value in asked.items() if value is not None} | slurm.options


def _refused(slurm: SlurmConfig, nodes: int, why: str) -> InputError:
    asked = {
        "partition": slurm.partition,
        "time": f"{slurm.time_min} min",
        "nodes": nodes,
        "gpus": slurm.gpus,
        "cpus": slurm.cpus,
        "mem": f"{slurm.mem_gb:g} GiB" if slurm.mem_gb else None,
        **slurm.options,
    }
    given = _site_options() | {key: value for key, value in asked.items() if value is not None}
    words = ", ".join(f"{key} {value}" for key, value in given.items())
    hint = "`sinfo -o '%P %l %D %c %m %G'` lists what each partition has: time limit, nodes, cores, MB of memory, GPUs"
    return InputError(f"Slurm refuses {words}: {why}: {hint}")


class _Executor(SlurmExecutor):
    @property
    def _submitit_command_str(self) -> str:
        return f"{self.python} -u -m {program.__name__} {shlex.quote(str(self.folder))}"


@contextmanager
def _submitting() -> Iterator[None]:
    """Hide the variables of a job from jobs that it submits, and what submitit prints of an error of sbatch."""
    kept = {key: value for key, value in os.environ.items() if key == "SLURM_CONF"}
    with clean_env(), redirect_stderr(StringIO()):
        os.environ.update(kept)
        yield


def find_jobs(name: str | None = None) -> list[Job]:
    """The jobs of this project, or those of one name, oldest first."""
    hint = "cancel the job if `squeue` shows it, and remove this folder"
    found = [Job(**read_json(path, hint), folder=path.parent) for path in (project_root() / JOBS).glob(f"*/{JOB}")]
    return sorted((job for job in found if name in (None, job.name)), key=lambda job: int(job.id))


def find_live(name: str) -> Job | None:
    """The newest job of a name that has not ended."""
    return next((job for job in reversed(find_jobs(name)) if not job.ended), None)


def wait(job: Job, stop: StopSignals, each: Callable[[], None] = lambda: None) -> None:
    """Follow a job until it has ended: print its states, and the output of its only task.

    `each` is called twice a second. Raises JobFailed if a task failed, and Interrupted after a signal, which leaves the
    job running.
    """
    before, shown, poll_s, asked = "", 0, LOG_POLL_S, -math.inf
    tasks: list[TaskState] = []
    while True:
        if stop.received is not None:
            raise Interrupted(
                f"interrupted; job {job.id} ({job.name}) is still in Slurm: the same command follows it, "
                f"`{SHOW}` shows it, `{SHOW} --cancel {job.id}` ends it",
                stop.received,
            )
        if time.monotonic() - asked >= poll_s:
            try:
                tasks = job.tasks
                line = _summary(job, tasks)
            except InputError as error:  # the controller restarts, or has too much to do
                line = f"job {job.id} ({job.name}): {error}"
            asked, poll_s = time.monotonic(), min(MAX_POLL_S, poll_s * 1.3)
            if line != before:
                print(line, flush=True)
                before, poll_s = line, LOG_POLL_S
        if len(job.commands) == 1:
            shown = _print_from(job.log(0), shown)
        each()
        if tasks and all(task.ended for task in tasks):
            break
        time.sleep(LOG_POLL_S)
    if failed := next((task for task in tasks if task.failed), None):
        code = failed.code if failed.code and failed.code > 0 else 1
        where = f"job {job.id} ({job.name}), task {failed.number}{failed.node and f' on {failed.node}'}"
        raise JobFailed(f"{where}: {failed.why}: see {job.folder}; the same command submits what is left", code)


def print_jobs() -> None:
    """Print each job of this project, and each of its tasks that has not ended or has failed."""
    for job in (jobs := find_jobs()):
        print(_summary(job, tasks := job.tasks))
        for task in tasks:
            if task.state != "done":
                print(f"  task {task.number}: {' '.join(filter(None, task[1:5]))}")
    if not jobs:
        print(f"no jobs in {project_root() / JOBS}")


def cancel(identity: str) -> None:
    """Cancel a job of this project, and the jobs that wait for it. Raises InputError if there is none."""
    jobs = find_jobs()
    chosen = [job.id for job in jobs if job.id == identity or job.after == identity]
    if identity not in chosen:
        raise InputError(f"no job {identity} in {project_root() / JOBS}: `{SHOW}` lists them")
    _run("scancel", *chosen)
    print(f"cancelled {', '.join(chosen)}: checkpoints and finished shards are kept")


def _squeue(identity: str) -> list[list[str]]:
    """Id of a task, state, reason, nodes and elapsed time of each task of a job that Slurm knows, of whatever user."""
    options = [f"--jobs={identity}", "--states=all", "--array", "--noheader", "--format=%i|%T|%r|%N|%M"]
    try:
        return [line.split("|", 4) for line in _run("squeue", *options).splitlines()]
    except InputError as error:
        if FORGOTTEN not in str(error):
            raise
        return []


def _run(*command: str) -> str:
    """The output of a program of Slurm. Raises InputError with what it says if it fails."""
    if missing := [name for name in ("sbatch", "srun", "squeue", "scancel") if shutil.which(name) is None]:
        raise InputError(f"no {missing[0]} on the PATH: run this on a login node of a Slurm cluster")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{command[0]}: {_refusal(done.stderr)}")
    return done.stdout


def _attempt(path: Path) -> list[str]:
    """The lines that the last attempt of a task has written to a file, which those before it share."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    first = max((number for number, line in enumerate(lines, 1) if line.startswith(program.ATTEMPT)), default=0)
    return [line for line in lines[first:] if line]


def _refusal(stderr: str) -> str:
    """The last line of what a program of Slurm said, without the names in front."""
    lines = [line for line in stderr.splitlines() if re.search("error:|fatal:|option '", line)] or stderr.splitlines()
    names = r"^(sbatch: (?!error|fatal)|\w+: (error|fatal): (Batch job submission failed: )?|allocation failure: )"
    return re.sub(names, "", lines[-1]) if lines else "no reason given"


def _summary(job: Job, tasks: Sequence[TaskState]) -> str:
    """One line: the job, how many of its tasks are in which state, where they run, why the first one waits."""
    states = [task.state for task in tasks]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    nodes = ",".join(dict.fromkeys(task.node for task in tasks if task.node and not task.ended))
    why = next((task.why for task in tasks if task.why and not task.ended), "")
    return f"job {job.id} ({job.name}): {counts}{nodes and f' on {nodes}'}{why and f', waits: {why}'}"


def _print_from(path: Path, shown: int) -> int:
    """Print what a file has after its first `shown` bytes, up to its last whole line; return its new length."""
    if not path.is_file():
        return shown
    with path.open("rb") as file:
        file.seek(shown)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    sys.stdout.write(whole.decode(errors="replace"))
    sys.stdout.flush()
    return shown + len(whole)
