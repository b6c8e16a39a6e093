"""Jobs: what is said of each state of Slurm and of each refusal, without a cluster."""

import shutil

import pytest

from pipeline.cluster import jobs
from pipeline.cluster.jobs import Job, JobFailed, TaskState, cancel, find_jobs, find_live, print_jobs, wait
from pipeline.system.errors import InputError, Interrupted
from pipeline.system.files import write_json
from pipeline.system.signals import StopSignals


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes a job of this project; `rows` is what squeue says of the user's jobs."""
    monkeypatch.chdir(tmp_path)

    def make(identity="7", n_tasks=1, rows=(), after=None, name="train"):
        folder = tmp_path / "checkpoints" / "jobs" / f"{name}-{identity}"
        folder.mkdir(parents=True)
        job = {"id": identity, "name": name, "commands": [["x"]] * n_tasks, "after": after}
        write_json(folder / "job.json", job)
        monkeypatch.setattr(jobs, "_squeue", lambda: [list(row) for row in rows])
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
        (("CANCELLED", "None", "n1", "0:10"), "failed", "it was cancelled"),
        (("NODE_FAIL", "None", "n1", "0:10"), "failed", "its node died"),
        (
            ("TIMEOUT", "TimeLimit", "n1", "1:00"),
            "failed",
            "its time was over before everything was saved: raise --time",
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
    monkeypatch.setattr(jobs, "_squeue", list)
    assert [task.why for task in job.tasks] == ["it was cancelled"]


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


def test_waiting_prints_each_change_and_the_output_and_ends_with_the_exit_code_of_the_command(
    made, capsys, monkeypatch
):
    job = made(rows=[("7", "PENDING", "Resources", "", "0:00")])
    job.log(0).write_text("step 1\nerror: not finite\n")
    monkeypatch.setattr(jobs, "LOG_POLL_S", 0.0)
    monkeypatch.setattr(jobs.time, "sleep", lambda s: note(job, code=4))
    with pytest.raises(JobFailed, match=r"job 7 \(train\), task 0: not finite: see") as failed, StopSignals() as stop:
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
    with pytest.raises(Interrupted, match=r"SIGINT while job 7 \(train\) runs on, .*`totarget jobs --cancel 7` ends"):
        wait(job, stop)


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
    with pytest.raises(InputError, match=r"no job 7 in .*jobs: `totarget jobs` lists them"):
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
        ("", "no reason given"),
    ],
)  # fmt: skip
def test_a_refusal_is_the_last_line_that_slurm_says(stderr, line):
    assert jobs._refusal(stderr) == line


def test_without_slurm_the_missing_program_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "squeue" else name)
    with pytest.raises(InputError, match="no squeue on the PATH: run this on a login node of a Slurm cluster"):
        jobs.require_slurm()


def test_the_state_of_a_task_says_whether_it_has_ended():
    ends = {state: TaskState(0, state).ended for state in ("done", "failed", "running", "pending", "completing")}
    assert ends == {"done": True, "failed": True, "running": False, "pending": False, "completing": False}
