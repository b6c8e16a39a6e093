"""A study in memory: shared settings, remaining work, retries, samplers, and supervised workers."""

import pytest
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from pipeline.sweep import controller
from pipeline.sweep.pruner import best_trial
from pipeline.sweep.study import MAX_RETRIES, WORKER, enqueue, has_work, join_study, latest_trials, requeue, suggest
from pipeline.sweep.worker import WorkerConfig, worker_name
from pipeline.system.errors import InputError, TargetNotReached
from pipeline.system.signals import StopSignals
from tests.studies import add, new_study, shared_by, sweep_config

WIDER = {"optim": {"lr": {"low": 0.001, "high": 0.2, "log": True}}}
BY_TOKENS = {"windows": {"step_tokens": [2048, 4096]}}


@pytest.mark.parametrize(
    ("params", "settings", "other", "named"),
    [
        ({"optim.max_grad_norm": 2.0}, {}, {}, "optim.max_grad_norm 1.0 -> 2.0"),
        ({"target.loss": 0.2}, {}, {}, "target.loss 0.02 -> 0.2"),
        ({}, {"objective": "steps"}, {}, "objective tokens -> steps"),
        ({}, {"space": WIDER}, {}, "space.optim.lr.high 0.1 -> 0.2"),
        ({}, {}, {"data_sha256": "eee"}, "data_sha256 d"),
    ],
)
def test_a_study_with_other_shared_settings_is_refused(study, params, settings, other, named):  # D5
    sweep = sweep_config(**settings)
    with pytest.raises(InputError) as error:
        join_study(sweep, {**shared_by(sweep, **params), **other}, study._storage)
    assert named in str(error.value)
    assert "--study" in str(error.value)
    assert "\n" not in str(error.value)


def test_searched_parameters_threads_and_what_step_tokens_set_are_not_shared(study, sweep):
    join_study(sweep, shared_by(sweep, **{"optim.lr": 0.02, "train.threads": 1}), study._storage)
    by_tokens = sweep_config(space=BY_TOKENS)
    assert shared_by(by_tokens) == shared_by(by_tokens, **{"windows.micro_batch_size": 3})
    assert shared_by(by_tokens) != shared_by(sweep_config(space=BY_TOKENS, micro_batch_tokens=1024))
    assert shared_by(sweep) == shared_by(sweep_config(micro_batch_tokens=1024))


def test_a_study_has_work_until_all_trials_are_started_and_a_retry_is_not_one_more(study, sweep):
    for _ in range(sweep.trials):
        assert has_work(study, sweep)
        suggest(study.ask(), sweep)
    assert not has_work(study, sweep)
    values = suggest(study.ask(), sweep)
    requeue(study, study.trials[-1])
    assert has_work(study, sweep)
    assert suggest(study.ask(), sweep) == values
    assert not has_work(study, sweep)
    assert [trial.state for trial in study.trials[-2:]] == [TrialState.FAIL, TrialState.RUNNING]
    assert [trial.number for trial in latest_trials(study)] == [0, 1, 2, 3, 5]


def test_a_retry_belongs_to_no_worker_until_one_takes_it(study):  # D1
    study.ask().set_user_attr(WORKER, "slurm:7_1")
    requeue(study, study.trials[0], died=True)
    assert WORKER not in study.trials[1].user_attrs
    assert study.trials[0].user_attrs[WORKER] == "slurm:7_1"


def test_a_trial_that_kills_every_worker_is_not_retried_forever_and_interruptions_do_not_count(study):
    study.ask()
    for number in range(2 * MAX_RETRIES):
        requeue(study, study.trials[number], died=number % 2 == 1)
        assert study.ask().number == number + 1
    requeue(study, study.trials[-1])
    assert study.ask().number == 2 * MAX_RETRIES + 1
    requeue(study, study.trials[-1], died=True)
    assert len(study.trials) == 2 * MAX_RETRIES + 2


def test_patience_ends_a_study_that_finds_nothing_better(study):
    sweep = sweep_config(patience=2, trials=100)
    add(study, TrialState.PRUNED)
    add(study, value=5.0)
    add(study, value=6.0)
    assert has_work(study, sweep)
    add(study, TrialState.PRUNED)
    assert not has_work(study, sweep)


def test_the_values_of_params_yaml_are_tried_first_if_the_space_contains_them(study, sweep):
    assert not enqueue(study, sweep, {"optim.lr": 0.5})
    assert enqueue(study, sweep, {"optim.lr": 0.02})
    assert suggest(study.ask(), sweep) == {"optim.lr": 0.02}


def test_a_suggestion_has_three_digits_and_a_choice_may_be_a_list():
    space = {"optim": {"lr": {"low": 0.00483726152, "high": 0.0048372616}, "betas": [[0.9, 0.95]]}}
    sweep = sweep_config(space=space)
    assert suggest(new_study(sweep).ask(), sweep) == {"optim.lr": 0.00484, "optim.betas": [0.9, 0.95]}


@pytest.mark.parametrize(("kind", "sampler"), [("tpe", TPESampler), ("random", RandomSampler)])
def test_the_values_of_a_trial_follow_from_seed_and_number_on_any_machine(kind, sampler):
    def suggestions(machines, seed):
        sweep, storage = sweep_config(sampler=kind, seed=seed), InMemoryStorage()
        studies = [join_study(sweep, shared_by(sweep), storage) for _ in range(machines)]
        assert isinstance(studies[0].sampler.sampler, sampler)
        return [suggest(study.ask(), sweep)["optim.lr"] for _ in range(6 // machines) for study in studies]

    alone = suggestions(machines=1, seed=1)
    assert len(set(alone)) == 6
    assert suggestions(machines=1, seed=1) == suggestions(machines=2, seed=1) == alone
    assert not {*suggestions(machines=1, seed=2)} & {*alone}


def test_the_best_is_the_cheapest_of_those_that_reached_the_target(study):
    assert best_trial(study) is None
    add(study, TrialState.PRUNED, curve={10: 0.1})
    for value in (7.0, 6.0, 6.0):
        add(study, value=value)
    assert best_trial(study).number == 2


CONFIG = WorkerConfig("", {}, {}, {}, sweep_id="", threads=1, parent_run_id="", sweep_pid=0)


class FakeWorker:
    """Replaces a worker's process; without a return code it runs until it is terminated."""

    pid = 1

    def __init__(self, returncode=None):
        self.returncode = returncode

    def poll(self):
        return self.returncode

    def terminate(self):
        self.returncode = 143


def test_the_trial_of_a_dead_worker_is_requeued_at_once_and_the_worker_is_replaced(monkeypatch):  # D1
    sweep = sweep_config(trials=1, heartbeat_timeout_s=600)
    study, returncodes = new_study(sweep), [-9, 0]

    def start(*_, line):
        trial, returncode = study.ask(), returncodes.pop(0)
        trial.set_user_attr(WORKER, worker_name("", FakeWorker.pid))
        if returncode == 0:
            study.tell(trial, 1.0)
        return FakeWorker(returncode)

    monkeypatch.setattr(controller, "start_module", start)
    assert controller._supervise(study, sweep, [CONFIG], StopSignals()) is None
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert not returncodes


def test_a_worker_in_another_container_with_the_same_host_name_and_pid_keeps_its_trial(monkeypatch, study):
    for sweep_id in ("a", "b"):
        study.ask().set_user_attr(WORKER, worker_name(sweep_id, FakeWorker.pid))
    stop = StopSignals()
    stop.received = 15
    monkeypatch.setattr(controller, "start_module", lambda *_, line: FakeWorker())
    assert controller._supervise(study, sweep_config(), [CONFIG._replace(sweep_id="a")], stop) is None
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]


@pytest.mark.parametrize(("trials", "reason"), [(1, None), (9, "4 workers died, see above, and trials are left")])
def test_a_sweep_whose_workers_die_ends_with_the_reason(monkeypatch, trials, reason):
    study = new_study(sweep := sweep_config(trials=trials))

    def start(*_, line):
        study.ask().set_user_attr(WORKER, worker_name("", FakeWorker.pid))
        return FakeWorker(-9)

    monkeypatch.setattr(controller, "start_module", start)
    failure = controller._supervise(study, sweep, [CONFIG], StopSignals())
    assert str(failure).partition(":")[0] == str(reason)
    assert len(study.trials) == 1 + MAX_RETRIES
    with pytest.raises(TargetNotReached, match=r"has reached the target \(its worker died\): correct the space"):
        controller.require_best(study)


@pytest.mark.parametrize(("budget_s", "signal"), [(0.1, None), (None, 15)])
def test_workers_are_stopped_when_the_time_is_over_or_a_signal_arrives(monkeypatch, study, budget_s, signal):
    workers, stop = [FakeWorker()], StopSignals()
    stop.received = signal
    monkeypatch.setattr(controller, "start_module", lambda *_, line: workers.pop())  # fails at a second start
    assert controller._supervise(study, sweep_config(budget_s=budget_s), [CONFIG], stop) is None
    assert not workers
