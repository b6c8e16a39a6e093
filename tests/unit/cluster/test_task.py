"""A task: what it passes to its command, and when it must not be requeued."""

import signal
from types import SimpleNamespace

import pytest

from pipeline.cluster import task as task_module
from pipeline.cluster.task import Task, is_stuck, job_environment

HAD, MORE = frozenset({"step-00000010"}), frozenset({"step-00000010", "step-00000020"})


@pytest.mark.parametrize(
    ("before", "now", "spent_s", "time_s", "stuck"),
    [
        (HAD, HAD, 3_500, 3_600, True),  # nearly an hour of an hour, and nothing new
        (HAD, MORE, 3_500, 3_600, False),
        (None, HAD, 3_500, 3_600, False),  # the first time: starting may have taken longer than it will again
        (HAD, HAD, 2_000, 3_600, False),  # pre-empted long before its end
        (HAD, HAD, 140, 300, True),  # warned 90 s before the end, and up to a minute early
        (HAD, HAD, 19, 60, True),  # a minute: each warning could be that of the limit
    ],
)
def test_a_task_is_stuck_if_it_saved_nothing_in_its_whole_time(before, now, spent_s, time_s, stuck):
    assert is_stuck(before, now, spent_s, time_s) == stuck


def test_what_is_saved_is_told_to_the_next_start_and_the_end_is_noted(tmp_path, monkeypatch):
    for name in ("_stop", "_wait_for_child"):
        monkeypatch.setattr(Task, name, lambda task: None)
    task = Task(["stages.train"], tmp_path, 3, tmp_path, 60.0, None)
    task._node, task._started = 0, -3_600.0  # it ran for more than its minute
    (tmp_path / "checkpoints" / "aaaa" / "step-00000010").mkdir(parents=True)
    after = task.checkpoint().function
    assert after.saved == {str(tmp_path / "checkpoints" / "aaaa" / "step-00000010")}
    after._node, after._started = 0, -3_600.0
    assert after.checkpoint() is None
    said = (tmp_path / "task-3.json").read_text()
    assert "a time limit of 1 min is too short: nothing new was saved between two requeues; raise --time" in said
    (tmp_path / "data" / ".unfinished-tokens-0" / "train-00000.json").parent.mkdir(parents=True)
    (tmp_path / "data" / ".unfinished-tokens-0" / "train-00000.json").touch()
    assert after.checkpoint() is not None


def test_a_signal_that_comes_while_the_command_starts_stops_it(tmp_path, monkeypatch):
    """submitit ignores SIGTERM: a job that is cancelled in this moment would run until Slurm kills it."""
    lost, stopped = [], []

    def start(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return SimpleNamespace(pid=1, wait=lambda: -signal.SIGTERM)

    monkeypatch.setattr(task_module.subprocess, "Popen", start)
    monkeypatch.setattr(Task, "_stop", lambda task, *arguments: stopped.append(task._child.pid))
    monkeypatch.setattr(Task, "_wait_for_child", lambda task: None)
    before = {number: signal.getsignal(number) for number in task_module.STOP_SIGNALS}
    signal.signal(signal.SIGTERM, lambda *arguments: lost.append(1))
    try:
        with pytest.raises(SystemExit):
            Task(["stages.train"], tmp_path, 1, tmp_path, 60.0, None)()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (lost, stopped) == ([], [1])
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(task_module.STOP_SIGNALS)


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A task that runs; `signals` are those that it has sent to its command."""
    task = Task(["stages.train"], tmp_path, 1, tmp_path, 60.0, None)
    task._stopped, task._child, task.signals = False, SimpleNamespace(pid=7, returncode=None), []
    monkeypatch.setattr(task_module.os, "kill", lambda *arguments: task.signals.append(arguments))
    return task


def test_a_command_that_saves_gets_no_second_signal(task):
    for _ in range(2):
        task._stop(signal.SIGTERM)
    assert task.signals == [(7, signal.SIGTERM)]


def test_no_signal_is_sent_to_the_id_of_a_command_that_has_ended(task):
    task._child.returncode = 143
    task._stop(signal.SIGTERM)
    assert task.signals == []


@pytest.mark.parametrize(("code", "waits"), [(143, True), (-signal.SIGTERM, True), (1, False)])
def test_a_node_after_the_first_waits_for_the_requeue_if_sigterm_ended_its_command(tmp_path, monkeypatch, code, waits):
    monkeypatch.setenv("SLURM_PROCID", "1")
    child = SimpleNamespace(pid=1, wait=lambda: code)
    monkeypatch.setattr(task_module.subprocess, "Popen", lambda *arguments, **options: child)
    monkeypatch.setattr(Task, "_wait_for_child", lambda task: None)
    waited = []
    monkeypatch.setattr(task_module.signal, "pause", lambda: waited.append(True))
    before = {number: signal.getsignal(number) for number in task_module.STOP_SIGNALS}
    try:
        with pytest.raises(SystemExit) as ended:
            Task(["stages.train"], tmp_path, 1, tmp_path, 60.0, None)()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert waited == [True] * waits
    assert ended.value.code == (1 if code == 1 else 143)


def test_a_job_whose_command_was_never_stored_ends_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(task_module, "PICKLE_TIMEOUT_S", 0.0)
    monkeypatch.setattr(task_module.time, "sleep", lambda s: None)
    for key, value in {"SLURM_JOB_ID": "7", "SUBMITIT_FOLDER": ""}.items():  # the second one is set by `main`
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit, match=r"^error: .*7_submitted.pkl is missing, since the command that submits jobs"):
        task_module.main(str(tmp_path))


@pytest.mark.parametrize("cancelled", [True, False])
def test_the_last_task_of_an_array_is_requeued_only_if_itself_still_runs(tmp_path, monkeypatch, cancelled):
    for key, value in {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(key, value)
    states = {"7_0": "RUNNING", "7_1": "COMPLETING" if cancelled else "RUNNING"}

    def scontrol(command, **options):
        shown = [state for task, state in states.items() if task.startswith(command[-1])]
        return SimpleNamespace(stdout="".join(f"JobState={state} Reason=None\n" for state in shown))

    monkeypatch.setattr(task_module.subprocess, "run", scontrol)
    sent = []
    monkeypatch.setattr(task_module.os, "kill", lambda *arguments: sent.append(arguments[1]))
    task = Task(["pipeline.sweep.worker"], tmp_path, 1, tmp_path, 60.0, None)
    task._node = 0
    task._requeue_if_preempted()
    assert sent == ([] if cancelled else [signal.SIGUSR2])


def test_nodes_find_each_other_by_the_variables_of_torchrun():
    one = {"PATH": "/bin", "SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "1"}
    assert job_environment(one).keys() == {"PATH"}
    assert job_environment(one)["PATH"].endswith(":/bin")
    several = {**one, "SLURM_JOB_NUM_NODES": "3", "SLURM_PROCID": "2", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.5"}
    found = job_environment({**several, "SLURM_JOB_ID": "1012345", "SLURM_RESTART_COUNT": "4"})
    assert {key: value for key, value in found.items() if key.startswith("PET_")} == {
        "PET_NNODES": "3",
        "PET_NODE_RANK": "2",
        "PET_RDZV_ENDPOINT": "10.0.0.5:22345",  # 20000 and the last four digits of the id
        "PET_RDZV_ID": "1012345.4",  # a rendezvous of its own after each requeue
    }
