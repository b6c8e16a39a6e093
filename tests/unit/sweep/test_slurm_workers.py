"""A study's job on Slurm, with the cluster replaced: joined, failed, lost trials, and the end of the time."""

from contextlib import nullcontext
from types import SimpleNamespace as Namespace

import pytest
from optuna.trial import TrialState

from pipeline.cluster.jobs import JobFailed
from pipeline.sweep import slurm_workers
from pipeline.sweep.controller import _summary
from pipeline.sweep.slurm_workers import run_on_slurm
from pipeline.sweep.study import WORKER, requeue
from pipeline.sweep.worker import Worker, WorkerConfig, task_name
from pipeline.system.errors import InputError
from pipeline.system.files import read_json
from pipeline.system.signals import StopSignals
from tests.studies import add, new_study, sweep_config

CONFIG = WorkerConfig("", {}, {}, {}, sweep_id="", threads=1, parent_run_id="", sweep_pid=0)


class Cluster:
    """Replaces pipeline.cluster.jobs: a job ends after `wait` has called `during` and `each`."""

    JobFailed, MAX_POLL_S = JobFailed, 0.0

    def __init__(self, during=lambda: None, failure=None, jobs=(), refusals=()):
        self.during, self.failure, self.jobs, self.cancelled = during, failure, list(jobs), []
        self.refusals = list(refusals)  # of `cancel`

    def find_jobs(self, name):
        return [job for job in self.jobs if job.name == name]

    def find_live(self, name):
        return next((job for job in self.find_jobs(name) if not job.ended), None)

    def submit(self, name, commands, slurm):
        self.jobs.append(submitted := job(name, "9", ended=False, commands=commands))
        return submitted

    def wait(self, job, stop, each):
        each()
        self.during()
        each()
        job.ended = True
        for task in job.tasks:
            task.ended = True
        if self.failure:
            raise self.failure

    def cancel(self, identity):
        if self.refusals:
            raise InputError(self.refusals.pop())
        self.cancelled.append(identity)


@pytest.fixture
def follow(monkeypatch, tmp_path):
    def call(study, sweep, cluster):
        monkeypatch.setattr(slurm_workers, "jobs", cluster)
        return run_on_slurm(study, sweep, [CONFIG] * 2, None, tmp_path, StopSignals())

    return call


def job(name="study-s", identity="7", ended=True, commands=(["a"], ["b"])):
    tasks = [Namespace(number=number, ended=ended) for number in range(len(commands))]
    return Namespace(id=identity, name=name, commands=commands, ended=ended, tasks=tasks)


def ask(study, worker):
    (trial := study.ask()).set_user_attr(WORKER, worker)
    return trial


def states(study):
    return [trial.state for trial in study.trials]


def test_the_workers_are_an_array_job_which_a_second_sweep_joins(follow, tmp_path, capsys):
    study, sweep = new_study(sweep_config(trials=1)), sweep_config(trials=1)
    cluster = Cluster(during=lambda: study.tell(ask(study, task_name("9", 0)), 5.0))
    assert follow(study, sweep, cluster) is None
    (submitted,) = cluster.jobs
    path = tmp_path / "workers.json"
    assert submitted.commands == [["pipeline.sweep.worker", str(path), str(number)] for number in range(2)]
    assert [WorkerConfig(**config) for config in read_json(path)] == [CONFIG] * 2
    assert "trial 0: reached the target after 5 tokens" in capsys.readouterr().out
    submitted.ended = False
    assert follow(study, sweep, cluster) is None
    assert "job 9 runs the workers of study s" in capsys.readouterr().out
    assert follow(study, sweep, cluster) is None  # all trials have ended: nothing is submitted
    assert len(cluster.jobs) == 1


def test_the_failure_of_a_job_is_reported_if_trials_are_left(follow):
    study, failure = new_study(sweep_config()), JobFailed("its node died", 1)
    finish = lambda: study.tell(study.ask(), 5.0)  # noqa: E731
    assert follow(study, sweep_config(trials=2), Cluster(finish, failure)) is failure
    assert follow(study, sweep_config(trials=2), Cluster(finish, failure)) is None


@pytest.mark.parametrize(
    ("changes", "failure", "submitted"),
    [({}, None, ["9"]), ({}, JobFailed("its node died", 1), []), ({"budget_s": 1e-9}, None, [])],
)
def test_more_trials_than_a_joined_job_has_are_submitted_after_it(follow, changes, failure, submitted):
    study, sweep = new_study(sweep_config()), sweep_config(trials=2, **changes)
    cluster = Cluster(lambda: study.tell(study.ask(), 5.0), failure, jobs=[job(ended=False)])
    assert follow(study, sweep, cluster) is failure
    assert [each.id for each in cluster.jobs[1:]] == submitted
    assert len(study.trials) == 1 + len(submitted)


def test_a_trial_of_a_task_that_has_ended_is_queued_again_at_once(follow):
    study, sweep = new_study(sweep_config(trials=4)), sweep_config(trials=4)
    # Job 7 has ended; of job 8, task 1 has ended, and task 0 ends while it is followed; the others are not ours.
    (live := job(identity="8", ended=False)).tasks[1].ended = True
    for worker in (task_name("7", 1), task_name("8", 1), task_name("8", 0), task_name("70", 1), "host:7"):
        ask(study, worker)
    at_start = []
    cluster = Cluster(lambda: at_start.append(states(study)), jobs=[job(), live, job("study-other", "70")])
    follow(study, sweep, cluster)
    assert at_start[0] == [TrialState.FAIL] * 2 + [TrialState.RUNNING] * 3 + [TrialState.WAITING] * 2
    assert states(study)[2:5] == [TrialState.FAIL, TrialState.RUNNING, TrialState.RUNNING]


@pytest.mark.parametrize("refusals", [(), ("scancel: Unable to contact slurm controller",)])
def test_the_job_is_cancelled_when_the_time_of_the_sweep_is_over(follow, refusals, capsys):
    study = new_study(sweep_config())
    cluster = Cluster(failure=JobFailed("it was cancelled", 1), refusals=refusals)
    assert follow(study, sweep_config(budget_s=1e-9), cluster) is None
    assert cluster.cancelled == ["9"]
    said = [line for line in capsys.readouterr().out.splitlines() if "not cancelled yet" in line]
    assert said == [f"job 9 (study-s) is not cancelled yet: {refusal}" for refusal in refusals]


def test_the_numbers_of_a_summary_add_up_while_a_retry_and_a_new_trial_are_queued():
    study = new_study(sweep_config())
    study.set_user_attr("trials", 4)
    add(study, value=5.0, curve={5: 0.1})
    trial = ask(study, task_name("7", 0))
    requeue(study, study.trials[trial.number], died=True)
    study.enqueue_trial({"optim.lr": 0.05})
    assert "2 of 4 trials started, 1 reached the target, 0 did not, 0 failed, 1 unfinished; best" in _summary(study)


def test_a_task_that_slurm_starts_again_queues_its_own_trial_and_no_other():
    study, sweep = new_study(sweep_config(trials=2)), sweep_config(trials=2)
    for number in range(2):
        ask(study, task_name("7", number))
    worker = object.__new__(Worker)
    worker.study, worker.sweep, worker.stop, worker.task = study, sweep, StopSignals(), task_name("7", 1)
    worker.recorder, trained = nullcontext(), []

    def value(trial):
        trained.append(trial.number)
        return 5.0

    worker._value = value
    worker.work()
    assert states(study) == [TrialState.RUNNING, TrialState.FAIL, TrialState.COMPLETE]
    assert trained == [2]
    assert study.trials[2].system_attrs["retry_history"] == [1]
