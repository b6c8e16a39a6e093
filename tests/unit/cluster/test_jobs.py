"""Jobs: what is said of each state of Slurm and of each refusal, without a cluster."""

import shutil
from contextlib import nullcontext

import pytest

from pipeline.cluster import jobs
from pipeline.cluster.jobs import Job, JobFailed, TaskState, cancel, find_jobs, find_live, print_jobs, wait
from pipeline.config.params import load_params
from pipeline.config.sections import SlurmConfig
from pipeline.system.errors import InputError, Interrupted
from pipeline.system.files import write_json
from pipeline.system.signals import StopSignals
from tests.trainings import ROOT

SLURM = load_params(ROOT / "params.yaml").section(SlurmConfig)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes a job of this project; `rows` is what squeue says."""
    monkeypatch.chdir(tmp_path)

    def make(identity="7", n_tasks=1, rows=(), after=None, name="train"):
        folder = tmp_path / "checkpoints" / "jobs" / f"{name}-{identity}"
        folder.mkdir(parents=True)
        job = {"id": identity, "name": name, "commands": [["x"]] * n_tasks, "after": after}
        write_json(folder / "job.json", job)
        monkeypatch.setattr(jobs, "_squeue", lambda identity: [list(row) for row in rows])
        return Job(**job, folder=folder)

    return make


def note(job, task=0, code=None, message=""):
    write_json(job.folder / f"task-{task}.json", {"code": code, "message": message, "host": "n1", "attempts": 1})


@pytest.mark.parametrize(
    ("row", "state", "why"),
    [
        (("PENDING", "Resources", "", "0:00"), "pending", "Resources (the nodes are in use)"),
        (("PENDING", "None", "", "0:00"), "pending", ""),
        (("PENDING", "QOSMaxJobsPerUserLimit", "", "0:00"), "pending", "QOSMaxJobsPerUserLimit"),
        (("RUNNING", "None", "n1", "0:10"), "running", ""),
        (("COMPLETING", "None", "n1", "0:10"), "completing", ""),
        (("CANCELLED", "None", "n1", "0:10"), "cancelled", "it was cancelled"),
        (("NODE_FAIL", "None", "n1", "0:10"), "failed", "its node died"),
        (
            ("TIMEOUT", "TimeLimit", "n1", "1:00"),
            "failed",
            "its time was over before everything was saved: give it 300 s to save with slurm.options "
            "{signal: USR2@300}, and a --time above 20 min",
        ),
        (("COMPLETED", "None", "n1", "0:10"), "done", ""),  # the note of its exit code is still on its way
        (("FAILED", "NonZeroExitCode", "n1", "0:10"), "failed", "failed"),
    ],
)
def test_a_task_that_has_not_noted_its_end_has_slurms_state(made, row, state, why):
    (task,) = made(rows=[("7", *row), ("17", "RUNNING", "None", "n2", "0:01")]).tasks
    assert (task.state, task.why) == (state, why)


def test_why_a_task_was_ended_is_kept_when_slurm_has_forgotten_it(made, monkeypatch):
    job = made(rows=[("7", "CANCELLED", "None", "n1", "0:10")])
    assert job.ended
    monkeypatch.setattr(jobs, "_squeue", lambda identity: [])
    assert [(task.state, task.why) for task in job.tasks] == [("cancelled", "it was cancelled")]


def test_what_a_task_has_noted_counts_and_its_error_is_that_of_its_command(made):
    job = made(
        n_tasks=4, rows=[("7_2", "PENDING", "Priority", "", "0:00"), ("7_0", "COMPLETING", "None", "n1", "0:09")]
    )
    note(job, 0, code=0)
    note(job, 1, code=2)
    note(job, 3)  # started, and then gone: neither noted nor known to Slurm
    job.log(1).write_text("x\nerror: the first\nerror: the text is missing\ny\n")
    (job.folder / "7_3_0_log.err").write_text(
        "submitit INFO\nslurmstepd: error: no disk\nsrun: error: n1: exit code 1\n"
    )
    assert [(task.state, task.why) for task in job.tasks] == [
        ("done", ""),
        ("failed", "the text is missing"),
        ("pending", "Priority (other jobs have a higher priority)"),
        ("failed", "no disk"),
    ]


def test_slurm_is_asked_for_the_job_whoever_has_submitted_it_and_may_have_forgotten_it(monkeypatch):
    asked, said = [], "7_1|RUNNING|None|n1|0:10\n"

    def run(*command):
        asked.append(command)
        if isinstance(said, InputError):
            raise said
        return said

    monkeypatch.setattr(jobs, "_run", run)
    assert jobs._squeue("7") == [["7_1", "RUNNING", "None", "n1", "0:10"]]
    assert "--jobs=7" in asked[0]
    assert not [word for word in asked[0] if word.startswith(("--user", "--me"))]
    said = InputError("squeue: slurm_load_jobs error: Invalid job id specified")
    assert jobs._squeue("7") == []
    said = InputError("squeue: slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    with pytest.raises(InputError, match="Unable to contact"):
        jobs._squeue("7")


def test_why_an_attempt_failed_is_not_taken_from_the_attempt_before_it(made):
    job = made(n_tasks=3)
    before = "$ python -m x   # on n2\nerror: SIGTERM at step 5\nslurmstepd-n2: error: *** STEP 7.0 CANCELLED ***\n"
    ended = "srun: error: n1: task 0: Killed\nslurmstepd-n2: error: *** STEP 7.0 ON n2 CANCELLED AT 2026-11-29T01 ***\n"
    for task, code, said in (
        (0, -9, ended),
        (1, -9, "slurmstepd-n1: error: oom_kill\n" + ended),
        (2, 1, "no module x\n"),
    ):
        note(job, task, code)
        job.log(task).write_text(f"{before}$ python -m x   # on n1\n{said if code > 0 else ''}")
        (job.folder / f"7_{task}_0_log.err").write_text(f"{before}$ python -m x   # on n1\n{said if code < 0 else ''}")
    assert [task.why for task in job.tasks] == ["killed by signal 9", "oom_kill", "exit code 1, no module x"]


def test_waiting_prints_each_change_and_the_output_and_ends_with_the_exit_code_of_the_command(
    made, capsys, monkeypatch
):
    job = made(rows=[("7", "PENDING", "Resources", "", "0:00")])
    job.log(0).write_text("step 1\nerror: not finite\n")
    monkeypatch.setattr(jobs, "LOG_POLL_S", 0.0)
    monkeypatch.setattr(jobs.time, "sleep", lambda s: note(job, code=4))
    with (
        pytest.raises(JobFailed, match=r"task 0 on n1: not finite: see .*; the same command") as failed,
        StopSignals() as stop,
    ):
        wait(job, stop)
    assert failed.value.exit_code == 4
    assert capsys.readouterr().out.splitlines() == [
        "job 7 (train): 1 pending, waits: Resources (the nodes are in use)",
        "step 1",
        "error: not finite",
        "job 7 (train): 1 failed",
    ]


def test_a_signal_ends_the_waiting_and_not_the_job(made, capsys):
    job, stop = made(rows=[("7", "RUNNING", "None", "n1", "0:01")]), StopSignals()
    stop.received = 2
    with pytest.raises(
        Interrupted, match=r"interrupted; job 7 \(train\) is still in Slurm: .* --cancel 7` ends"
    ) as error:
        wait(job, stop)
    assert error.value.exit_code == 130


def test_jobs_are_found_listed_and_cancelled_with_those_that_wait_for_them(made, capsys, monkeypatch):
    assert find_jobs() == []
    print_jobs()
    assert "no jobs in" in capsys.readouterr().out
    note(made("8"), code=0)
    made("9")
    job = made(
        "10", after="9", rows=[("9", "RUNNING", "None", "n1", "0:01"), ("10", "PENDING", "Dependency", "", "0:00")]
    )
    assert [each.id for each in find_jobs()] == ["8", "9", "10"]
    assert find_live("train") == job
    print_jobs()
    assert capsys.readouterr().out.splitlines() == [
        "job 8 (train): 1 done",
        "job 9 (train): 1 running on n1",
        "  task 0: running n1 0:01",
        "job 10 (train): 1 pending, waits: Dependency (another job must end first)",
        "  task 0: pending 0:00 Dependency (another job must end first)",
    ]
    called = []
    monkeypatch.setattr(jobs, "_run", lambda *command: called.append(command) or "")
    cancel("9")
    assert called == [("scancel", "9", "10")]
    with pytest.raises(InputError, match=r"no job 7 in .*jobs: `python -m pipeline jobs` lists them"):
        cancel("7")


@pytest.mark.parametrize(
    ("stderr", "line"),
    [
        (
            "sbatch: error: invalid partition specified: x\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified\n",
            "Invalid partition name specified",
        ),
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n",
         "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"),
        ("sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, ...)\n",
         "Job violates accounting/QOS policy (job submit limit, ...)"),
        ("sbatch: error: invalid partition specified: x\nallocation failure: Invalid partition name specified\n",
         "invalid partition specified: x"),
        ("allocation failure: Invalid feature specification\n", "Invalid feature specification"),
        ("sbatch: unrecognized option '--x=1'\nTry \"sbatch --help\" for more information\n",
         "unrecognized option '--x=1'"),
        ("", "no reason given"),
    ],
)  # fmt: skip
def test_a_refusal_is_the_last_line_that_slurm_says(stderr, line):
    assert jobs._refusal(stderr) == line


def test_without_slurm_the_missing_program_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "squeue" else name)
    with pytest.raises(InputError, match="no squeue on the PATH: run this on a login node of a Slurm cluster"):
        jobs.require_slurm(SLURM)


def test_gpus_are_refused_for_a_torch_that_cannot_use_them(monkeypatch):
    monkeypatch.setattr(jobs, "_run", lambda *_: "")
    monkeypatch.setattr(jobs, "uses_gpus", lambda: False)
    jobs.require_slurm(SLURM)
    with pytest.raises(InputError, match=r"slurm.gpus 2: .* CPU build, .*: `make clean-venv install TORCH=cuda`"):
        jobs.require_slurm(SLURM.updated(gpus=2))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("allocation failure: Invalid feature specification", "Invalid feature specification"),
        ("allocation failure: Requested node configuration is not available", None),  # they may only be down
        (None, None),
    ],
)
def test_what_no_partition_has_is_refused_before_anything_is_submitted(monkeypatch, said, why):
    ran = []

    def run(*command):
        ran.append(command)
        if said and "--test-only" in command:
            raise InputError(f"sbatch: {jobs._refusal(said)}")

    monkeypatch.setattr(jobs, "_run", run)
    monkeypatch.setattr(jobs, "uses_gpus", lambda: True)
    for name in jobs.SITE_OPTIONS:
        monkeypatch.delenv(f"SBATCH_{name.upper()}", raising=False)
    for name, value in {"ACCOUNT": "physics", "PARTITION": "q", "CONSTRAINT": "h100", "TIMELIMIT": "1"}.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    asked = SLURM.updated(
        partition="p", time_min=90, mem_gb=1.5, gpus=2, options={"constraint": "a100", "exclusive": True}
    )
    words = "account physics, partition p, constraint a100, time 90 min, nodes 3, gpus 2, mem 1.5 GiB, exclusive True"
    words = f"^Slurm refuses {words}: {why}: `sinfo"
    with pytest.raises(InputError, match=words) if why else nullcontext():
        jobs.require_slurm(asked, nodes=3)
    flags = [
        "--account=physics",
        "--partition=p",
        "--constraint=a100",
        "--time=90",
        "--nodes=3",
        "--gpus-per-node=2",
        "--mem=1536M",
        "--exclusive",
    ]
    assert ran[1] == ("sbatch", "--test-only", "--wrap=true", *flags)


@pytest.fixture
def script(monkeypatch):
    """Submits a job of so many tasks; returns the text that sbatch would get."""
    monkeypatch.setattr(jobs, "require_slurm", lambda slurm, nodes: None)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    said = "Submitted batch job 9"
    monkeypatch.setattr("submitit.core.utils.CommandFunction", lambda command, **options: lambda: said)

    def submit(n_tasks, after=None):
        folder = jobs.submit("x", [["m"]] * n_tasks, SLURM, after=after).folder
        return next(path.read_text() for path in folder.glob("*.sh") if not path.is_symlink())

    return submit


def test_options_that_a_site_sets_in_the_environment_reach_the_job(made, script, monkeypatch):
    monkeypatch.setenv("SBATCH_ACCOUNT", "physics")
    assert "#SBATCH --account=physics\n" in script(1)


def test_all_tasks_of_an_array_may_run_at_once(made, script):
    assert "#SBATCH --array=0-299%300\n" in script(300)


def test_a_job_does_not_wait_for_one_that_has_succeeded_and_that_slurm_may_have_forgotten(made, script):
    live = made("7", rows=[("7", "RUNNING", "None", "n1", "0:10")])
    assert "#SBATCH --dependency=afterok:7\n" in script(1, after=live)
    note(live, code=0)
    assert "--dependency" not in script(1, after=live)


def test_the_state_of_a_task_says_whether_it_has_ended():
    ends = {
        state: TaskState(0, state).ended
        for state in ("done", "failed", "cancelled", "running", "pending", "completing")
    }
    assert ends == {
        "done": True,
        "failed": True,
        "cancelled": True,
        "running": False,
        "pending": False,
        "completing": False,
    }
