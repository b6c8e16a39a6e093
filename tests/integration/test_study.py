"""study: storage, question, retries, ranks and the pruner, on SQLite and, where a server can be started, PostgreSQL."""

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import InMemoryStorage, fail_stale_trials
from optuna.trial import TrialState, create_trial

from pipeline.config.params import load_params
from pipeline.config.sections import SweepConfig
from pipeline.sweep import study as studies
from pipeline.sweep.search_space import overridden
from pipeline.sweep.study import (
    ask_for,
    best_trial,
    find_study,
    has_work,
    join_study,
    open_storage,
    question_of,
    suggest,
    take_up_again,
    taken_up_again,
)
from pipeline.system.errors import InputError
from pipeline.training.config import RunConfig

ROOT = Path(__file__).parents[2]
SPACE = {"optim": {"lr": {"low": 0.001, "high": 0.1, "log": True}}}


def sweep_config(**changes):
    given = {"study": "s", "space": SPACE, "trials": 4, "sampler": "random", "pruner_tolerance": 0.05, **changes}
    return overridden(load_params(ROOT / "params.yaml"), given).section(SweepConfig)


def question(sweep, **changes):
    params = load_params(ROOT / "params.yaml")
    for key, value in changes.items():
        section, name = key.split(".")
        params.values[section][name] = value
    return question_of(sweep, RunConfig.of(params), "d" * 64)


@pytest.fixture
def sweep():
    return sweep_config()


@pytest.fixture
def study(sweep):
    return join_study(sweep, question(sweep), InMemoryStorage())


def add(study, state=TrialState.COMPLETE, value=None, curve=(), missed=None, lr=0.01, values=None):
    """A trial that ended so."""
    attrs = {} if missed is None else {"constraints:missed": missed}
    study.add_trial(
        create_trial(
            state=state,
            value=value,
            params={"optim.lr": lr},
            distributions={"optim.lr": FloatDistribution(0.001, 0.1, log=True)},
            intermediate_values=dict(curve),
            system_attrs=attrs,
            user_attrs={} if values is None else {"values": values},
        )
    )


# The question


@pytest.mark.parametrize(
    ("changes", "sweep_changes", "named"),
    [
        ({"optim.max_grad_norm": 2.0}, {}, "optim.max_grad_norm 1.0 -> 2.0"),
        ({"target.loss": 0.2}, {}, "target.loss 0.1 -> 0.2"),
        ({}, {"objective": "steps"}, "objective tokens -> steps"),
        ({}, {"space": {"optim": {"lr": {"low": 0.001, "high": 0.2, "log": True}}}}, "space.optim.lr.high 0.1 -> 0.2"),
    ],
)
def test_a_study_that_was_founded_for_another_question_is_not_joined(study, changes, sweep_changes, named):  # D5
    other = sweep_config(**sweep_changes)
    with pytest.raises(InputError) as error:
        join_study(other, question(other, **changes), study._storage)
    assert named in str(error.value)
    assert "--study" in str(error.value)


def test_what_is_searched_and_how_the_cores_are_divided_is_no_part_of_the_question(study, sweep):
    join_study(sweep, question(sweep, **{"optim.lr": 0.02, "train.threads": 1}), study._storage)


def test_how_a_batch_is_cut_is_part_of_the_question_and_the_batch_is_not_where_step_tokens_are_searched(sweep):
    space = {"windows": {"step_tokens": [2048, 4096]}}
    by_tokens = sweep_config(space=space)
    assert question(by_tokens) == question(by_tokens, **{"windows.micro_batch_size": 3})
    assert question(by_tokens) != question(sweep_config(space=space, micro_batch_tokens=1024))
    assert question(sweep) == question(sweep_config(micro_batch_tokens=1024))


# Whose turn


def test_a_study_has_work_until_its_trials_are_begun_and_a_retry_is_not_one_more(study, sweep):
    for _ in range(sweep.trials):
        assert has_work(study, sweep)
        trial = study.ask()
        suggest(trial, sweep)
    assert not has_work(study, sweep)
    take_up_again(study, 1)
    assert has_work(study, sweep)
    study.ask()
    assert not has_work(study, sweep)


def test_a_trial_is_taken_up_again_with_the_same_values(study, sweep):
    values = suggest(study.ask(), sweep)
    take_up_again(study, 0)
    assert suggest(study.ask(), sweep) == values
    assert taken_up_again(study) == {0}
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.RUNNING]


def test_what_kills_every_worker_is_given_up_in_the_end(study):
    study.ask()
    for number in range(studies.RETRIES):
        take_up_again(study, number, studies.RETRIES)
        assert study.ask().number == number + 1
    take_up_again(study, studies.RETRIES, studies.RETRIES)
    assert len(study.trials) == studies.RETRIES + 1


@pytest.mark.fault
@pytest.mark.parametrize(("silent_s", "state"), [(300, TrialState.RUNNING), (601, TrialState.FAIL)])
def test_what_a_silent_worker_has_is_taken_up_again_after_the_grace_and_not_before(  # D1, D3
    silent_s, state, sweep, tmp_path
):
    storage = open_storage("sqlite:///optuna.db", tmp_path, heartbeat_timeout_s=600)
    study = join_study(sweep, question(sweep), storage)
    left = study.ask()
    values = suggest(left, sweep)
    storage.record_heartbeat(left._trial_id)
    with closing(sqlite3.connect(tmp_path / "optuna.db")) as database, database:  # as if it had been so long ago
        database.execute("UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, ?)", [f"-{silent_s} seconds"])
    fail_stale_trials(study)
    assert study.trials[0].state is state
    again = study.ask()
    assert (taken_up_again(study) == {0}) is (state is TrialState.FAIL)
    assert (suggest(again, sweep) == values) is (state is TrialState.FAIL)


def test_patience_ends_a_study_that_finds_nothing_better(study):
    sweep = sweep_config(patience=2, trials=100)
    add(study, TrialState.PRUNED)
    add(study, value=5.0)
    add(study, value=6.0)
    assert has_work(study, sweep)
    add(study, TrialState.PRUNED)
    assert not has_work(study, sweep)


def test_own_values_are_tried_first_and_only_where_the_space_holds_them(study, sweep):
    assert not ask_for(study, sweep, {"optim.lr": 0.5})
    assert ask_for(study, sweep, {"optim.lr": 0.02})
    assert suggest(study.ask(), sweep) == {"optim.lr": 0.02}


@pytest.mark.parametrize(("kind", "sampler"), [("tpe", TPESampler), ("random", RandomSampler)])
def test_the_sampler_is_the_one_that_was_asked_for_and_repeats_itself(kind, sampler):
    sweep = sweep_config(sampler=kind)
    found = []
    for _ in range(2):
        study = join_study(sweep, question(sweep), InMemoryStorage())
        assert isinstance(study.sampler, sampler)
        found.append([suggest(study.ask(), sweep)["optim.lr"] for _ in range(3)])
    assert found[0] == found[1]
    other = join_study(sweep, question(sweep), InMemoryStorage(), worker=1)
    assert suggest(other.ask(), sweep)["optim.lr"] != found[0][0]


# Ranks and pruning


def test_the_best_is_the_cheapest_of_those_that_reached_the_target(study):
    assert best_trial(study) is None
    add(study, TrialState.PRUNED, missed=0.01, curve={10: 0.1})
    add(study, value=7.0)
    add(study, value=6.0)
    add(study, value=6.0)
    assert best_trial(study).number == 2


def test_tpe_takes_what_reached_the_target_for_good_and_then_what_came_nearest():
    from optuna.samplers._tpe.sampler import _split_trials

    sweep = sweep_config()
    study = join_study(sweep, question(sweep), InMemoryStorage())
    add(study, TrialState.PRUNED, missed=0.5, curve={100: 0.2})  # later on than the next one, but further behind
    add(study, TrialState.PRUNED, missed=0.1, curve={50: 3.0})
    add(study, value=90.0)
    ranked = [[trial.number for trial in _split_trials(study, study.trials, n)[0]] for n in (1, 2, 3)]
    assert ranked == [[2], [1, 2], [0, 1, 2]]


def test_nothing_is_pruned_before_a_trial_has_reached_the_target(study):
    trial = study.ask()
    trial.report(9.9, 10**9)
    assert not trial.should_prune()


@pytest.mark.parametrize(("loss", "pruned"), [(3.0, False), (3.6, False), (3.8, True), (9.0, True)])
def test_a_trial_is_pruned_where_it_is_forecast_too_far_behind_the_best(study, loss, pruned):
    add(study, value=100.0, curve={0: 10.0, 50: 3.0, 100: 0.1})
    trial = study.ask()
    trial.report(loss, 50)  # the best had 3.6 at 45.7 and 3.8 at 44.3, and the slack is 5
    assert trial.should_prune() is pruned


def test_a_trial_is_compared_in_the_objectives_own_unit(study):
    add(study, value=100.0, curve={0: 10.0, 50: 3.0, 100: 0.1})
    trial = study.ask()
    trial.set_user_attr(studies.COST_OF_TOKEN, 3.0)  # level with the best at 50 tokens, which cost it 150
    trial.report(3.0, 50)
    assert trial.should_prune()


def test_without_a_pruner_nothing_is_pruned():
    sweep = sweep_config(pruner="none")
    study = join_study(sweep, question(sweep), InMemoryStorage())
    add(study, value=100.0, curve={0: 10.0, 100: 0.1})
    trial = study.ask()
    trial.report(9.0, 99)
    assert not trial.should_prune()


# Storage


def test_a_relative_sqlite_file_is_the_projects_wherever_one_stands(tmp_path, sweep):
    storage = open_storage("sqlite:///optuna.db", tmp_path, 60)
    join_study(sweep, question(sweep), storage)
    assert (tmp_path / "optuna.db").is_file()
    found = find_study(sweep_config(storage=f"sqlite:///{tmp_path}/optuna.db"), Path("/nowhere"))
    assert found.study_name == "s"


def test_a_study_that_is_not_there_is_one_line(tmp_path, sweep):
    with pytest.raises(InputError, match=r"no study s in sqlite:///optuna\.db"):
        find_study(sweep, tmp_path)
    assert not list(tmp_path.iterdir())  # looking makes no database


def test_storage_that_does_not_answer_is_one_line(tmp_path):
    (tmp_path / "folder.db").mkdir()
    for url in ("sqlite:///folder.db", "sqlite:///nowhere/optuna.db"):
        with pytest.raises(InputError, match="does not answer") as error:
            open_storage(url, tmp_path, 60)
        assert "\n" not in str(error.value)
        with pytest.raises(InputError, match="does not answer"):
            find_study(sweep_config(storage=url), tmp_path)


@pytest.mark.fault
def test_a_postgresql_server_that_is_not_there_is_one_line(tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(InputError, match="does not answer"):
        open_storage("postgresql://nobody@127.0.0.1:1/none", tmp_path, 60)


FOUND = """if True:
    import sys
    from pathlib import Path
    from tests.test_study import join_study, open_storage, question, suggest, sweep_config
    sweep = sweep_config(storage=sys.argv[1])
    study = join_study(sweep, question(sweep), open_storage(sys.argv[1], Path(sys.argv[2]), 60))
    for _ in range(5):
        trial = study.ask()
        study.tell(trial, suggest(trial, sweep)["optim.lr"])
    """


def found_together(url, roots):
    """Four processes that found the study and add five trials each, at the same time."""
    command = [sys.executable, "-c", FOUND, url]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    processes = [subprocess.Popen([*command, str(root)], env=env, stderr=subprocess.PIPE, text=True) for root in roots]
    complaints = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, complaints


@pytest.mark.fault
def test_processes_that_found_a_study_together_lose_no_trial(tmp_path):  # C4
    found_together("sqlite:///optuna.db", [tmp_path] * 4)
    study = find_study(sweep_config(), tmp_path)
    assert sorted(trial.number for trial in study.trials) == list(range(20))


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory):
    """The URL of a fresh database on a server of our own; skips where there is no PostgreSQL, or no driver."""
    pytest.importorskip("psycopg")
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    initdb = shutil.which("initdb", path=os.pathsep.join([os.environ["PATH"], *map(str, binaries)]))
    if initdb is None:
        pytest.skip("no PostgreSQL here: Debian's package postgresql brings it")
    folder, as_user = tmp_path_factory.mktemp("pg"), {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        for path in (folder, *folder.parents):
            if path != Path("/"):
                path.chmod(path.stat().st_mode | 0o711)
        shutil.chown(folder, "nobody")
        as_user = {"user": "nobody", "cwd": "/"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = Path(initdb).resolve().parent
    made = subprocess.run([initdb, "-D", folder / "db", "-U", "t", "--auth=trust"], capture_output=True, **as_user)
    if made.returncode:
        pytest.skip(f"PostgreSQL makes no database here: {made.stderr.decode()[-200:]}")
    options = f"-p {port} -k '' -c listen_addresses=127.0.0.1"
    server = [commands / "pg_ctl", "-D", folder / "db", "-w", "-l", folder / "log", "-o", options]
    subprocess.run([*server, "start"], check=True, stdout=subprocess.DEVNULL, **as_user)
    yield f"postgresql://t@127.0.0.1:{port}/postgres"
    subprocess.run([*server, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL, **as_user)


@pytest.mark.fault
@pytest.mark.slow
def test_machines_that_share_a_postgresql_found_a_study_together_and_lose_no_trial(postgresql, tmp_path):
    roots = [tmp_path / str(i) for i in range(4)]  # four machines: no lock that they share
    found_together(postgresql, roots)
    study = find_study(sweep_config(storage=postgresql), tmp_path)
    assert sorted(trial.number for trial in study.trials) == list(range(20))
