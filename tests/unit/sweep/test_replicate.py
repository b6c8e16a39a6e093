"""Lists of trials: what is queued and taken, how their studies are named, and which trials are confirmed."""

import json

import pytest
from optuna.trial import TrialState

from pipeline.config.params import load_params
from pipeline.sweep import replicate
from pipeline.sweep.figures import seeds_figure
from pipeline.sweep.mlflow_run import Outcome
from pipeline.sweep.replicate import best_distinct, ended, run_confirm, run_replicate
from pipeline.sweep.statistics import SeedGroup
from pipeline.sweep.study import SHARED, VALUES, enqueue_list, has_work, latest_trials, requeue, suggest
from pipeline.sweep.worker import SPENT
from pipeline.system.errors import InputError, Pruned
from tests.studies import ROOT, add, new_study, shared_by, sweep_config

SEEDS = [{"train.seed": seed} for seed in (1, 2, 3)]


@pytest.fixture
def listed():
    """The settings of a list of trials."""
    return sweep_config(space={}, sampler="random", pruner="none", trials=1)


@pytest.fixture
def study(listed):
    return new_study(listed)


def take(study, listed):
    """Take the next trial as a worker does; return it and its values."""
    trial = study.ask()
    return trial, suggest(trial, listed)


def test_every_trial_of_a_list_is_taken_once_and_a_longer_list_adds_only_the_rest(study, listed):
    assert not has_work(study, listed)
    enqueue_list(study, SEEDS[:2])
    enqueue_list(study, SEEDS[:2])
    first, second = take(study, listed), take(study, listed)
    assert [first[1], second[1]] == SEEDS[:2]
    assert not has_work(study, listed)
    study.tell(first[0], 1.0)
    requeue(study, study.trials[1])  # its retry has the same values
    enqueue_list(study, SEEDS)
    assert [take(study, listed)[1], take(study, listed)[1]] == [SEEDS[1], SEEDS[2]]
    assert not has_work(study, listed)


@pytest.mark.parametrize(
    ("state", "reason", "is_again"),
    [
        (TrialState.COMPLETE, None, False),
        (TrialState.PRUNED, None, False),  # it missed the target within its budget
        (TrialState.FAIL, "DivergedError: loss is nan", False),
        (TrialState.FAIL, "OutOfSpaceError: the disk is full", True),
        (TrialState.FAIL, None, True),  # its worker died more often than it is retried
    ],
)
def test_a_trial_is_queued_again_only_if_training_it_again_may_end_otherwise(study, listed, state, reason, is_again):
    attributes = {VALUES: SEEDS[0]} | ({"reason": reason} if reason else {})
    add(study, state, value=1.0 if state is TrialState.COMPLETE else None, **attributes)
    enqueue_list(study, SEEDS[:1])
    assert has_work(study, listed) == is_again


def test_a_worker_that_comes_too_late_for_the_last_trial_leaves_no_trial_in_the_results(study, listed):
    enqueue_list(study, SEEDS[:1])
    take(study, listed)
    late = study.ask()
    with pytest.raises(Pruned, match="no trial of the list is left"):
        suggest(late, listed)
    study.tell(late, state=TrialState.PRUNED)
    assert [trial.user_attrs[VALUES] for trial in latest_trials(study)] == SEEDS[:1]


def test_only_a_trial_that_was_trained_to_its_end_counts(study):
    add(study, TrialState.FAIL, **{VALUES: SEEDS[0], "reason": "OutOfSpaceError: full", SPENT: {"tokens": 9}})
    assert ended(study, SEEDS[0]) == []
    add(study, value=1.0, **{VALUES: SEEDS[0]})  # found to be the same as another one, and not trained
    add(study, value=1.0, **{VALUES: SEEDS[0], SPENT: {"tokens": 10}})
    add(study, TrialState.PRUNED, **{VALUES: SEEDS[1]})
    assert [trial.number for values in SEEDS for trial in ended(study, values)] == [2, 3]


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Returns the settings, shared settings and list of trials of the study that a command starts."""

    def of(command, *arguments, data="d" * 64, **changes):
        found = {}

        def run_study(params, sweep, shared, placement, queue, outcome):
            queue(study := new_study(sweep))
            study.set_user_attr(SHARED, shared)
            found["name"], found["values"] = sweep.study, [trial.user_attrs[VALUES] for trial in study.trials]
            found["text"] = outcome(study, tmp_path / "s" / "figures").text
            return study

        monkeypatch.setattr(replicate, "run_study", run_study)
        monkeypatch.setattr(replicate, "prepared_tokens", lambda _: tmp_path)
        monkeypatch.setattr(replicate, "count_tokens", lambda _: 34_219)
        monkeypatch.setattr(replicate, "data_sha256", lambda _: data)
        monkeypatch.setattr(replicate, "require_best", lambda _: None)
        params = load_params(ROOT / "params.yaml")
        for key, value in changes.items():
            section, name = key.split(".")
            params.values[section][name] = value
        command(params, sweep_config(), *arguments)
        return found

    return of


def test_the_name_of_a_set_of_seeds_stands_for_all_that_its_runs_share(started, tmp_path, monkeypatch):
    first = started(run_replicate, 2)
    assert first["values"] == SEEDS[:2]
    assert first["text"].startswith(f"study {first['name']}: 0 of 2 seeds trained, 0 reached the target\n")
    assert first["text"].endswith(f"\nwritten: {tmp_path}/s/results.json and {tmp_path}/s/figures/curves.png")
    assert first["name"].startswith("replicate-")
    for same in ({"train.seed": 7}, {"train.threads": 2}):
        assert started(run_replicate, 5, **same)["name"] == first["name"]
    assert started(run_replicate, 3, **{"train.seed": 7})["values"] == [{"train.seed": seed} for seed in (7, 8, 9)]
    others = [
        started(run_replicate, 2, **{"optim.lr": 0.006}),
        started(run_replicate, 2, **{"target.loss": 0.03}),
        started(run_replicate, 2, data="e" * 64),
    ]
    monkeypatch.setattr(replicate, "source_hashes", lambda: {"pipeline/training/loop.py": "changed"})
    others.append(started(run_replicate, 2))
    assert len({first["name"], *(other["name"] for other in others)}) == 5


@pytest.mark.parametrize(("n_seeds", "seed"), [(0, 1), (-3, 1), (10**6, 1), (2, 2**63 - 1)])
def test_an_impossible_number_of_seeds_is_refused(started, n_seeds, seed):
    with pytest.raises(InputError, match=r"--seeds|train\.seed"):
        started(run_replicate, n_seeds, **{"train.seed": seed})


@pytest.fixture
def searched(monkeypatch):
    """A searched study, by the value of its trials that reached the target, in the order of their numbers."""

    def with_trials(*found):
        study = new_study(sweep := sweep_config())
        study.set_user_attr(SHARED, shared_by(sweep))
        for value, lr in found:
            add(study, value=value, **{VALUES: {"optim.lr": lr}})
        monkeypatch.setattr(replicate, "find_study", lambda *_: study)
        return study

    return with_trials


def test_the_best_trials_that_differ_are_confirmed_beside_the_default_with_seeds_of_their_own(started, searched):
    searched((50.0, 0.005), (30.0, 0.02), (31.0, 0.02), (40.0, 0.03), (60.0, 0.04))  # the default's lr is 0.005
    found = started(run_confirm, 2, 2)
    assert found["name"].startswith("s-confirm-")
    assert found["values"] == [{"optim.lr": lr, "train.seed": seed} for seed in (2, 3) for lr in (0.005, 0.02, 0.03)]
    assert "0 of 6 runs have ended" in found["text"]
    assert "no winner yet" in found["text"]


def test_fewer_trials_than_asked_are_confirmed_with_a_note_and_none_is_refused(started, searched, capsys):
    searched((50.0, 0.005), (30.0, 0.02))
    assert len(started(run_confirm, 3, 1)["values"]) == 2
    assert "only 1 trial with other values" in capsys.readouterr().out
    searched((50.0, 0.005))
    with pytest.raises(InputError, match=r"only the values of params\.yaml have reached the target"):
        started(run_confirm, 3, 1)
    with pytest.raises(InputError, match="--top 0"):
        started(run_confirm, 0, 1)


def test_a_study_with_other_settings_or_a_list_of_trials_is_not_confirmed(started, searched):
    study = searched((50.0, 0.005), (30.0, 0.02))
    with pytest.raises(InputError, match=r"study s has other settings: optim\.max_grad_norm"):
        started(run_confirm, 1, 1, **{"optim.max_grad_norm": 0.5})
    study.set_user_attr(SHARED, study.user_attrs[SHARED] | {"space": {}})
    with pytest.raises(InputError, match="is a list of trials"):
        started(run_confirm, 1, 1)


def trained(study, seed, tokens, state=TrialState.COMPLETE):
    spent = {"tokens": tokens, "steps": tokens // 10, "train_s": tokens / 100}
    curve = {tokens // 2: 5.0, tokens: 0.1}
    value = float(tokens) if state is TrialState.COMPLETE else None
    add(study, state, value, curve, **{VALUES: {"train.seed": seed}, SPENT: spent, "fingerprint": f"f{seed}"})


def test_the_spread_over_the_seeds_is_printed_stored_and_logged(study, tmp_path):
    for seed, tokens in ((3, 1300), (1, 1000), (2, 1100)):
        trained(study, seed, tokens)
    trained(study, 4, 2000, TrialState.PRUNED)
    found = replicate._replicate_outcome(study, tmp_path / "figures")
    assert isinstance(found, Outcome)
    # deviations of 1,000, 1,100 and 1,300 from 1,133.3: squares 17,778 + 1,111 + 27,778 = 46,667, over two
    assert found.metrics == pytest.approx({
        "seeds": 4, "share_reached": 0.75,
        "tokens/mean": 1133.333, "tokens/sd": 152.753, "tokens/min": 1000, "tokens/max": 1300,
        "steps/mean": 113.333, "steps/sd": 15.2753, "steps/min": 100, "steps/max": 130,
        "train_s/mean": 11.3333, "train_s/sd": 1.52753, "train_s/min": 10, "train_s/max": 13,
    }, rel=1e-4)  # fmt: skip
    assert "4 of 4 seeds trained, 3 reached the target (75%)" in found.text
    *_, head, tokens, steps, seconds = (line.split() for line in found.text.splitlines())
    assert head == ["mean", "sd", "min", "max"]
    assert tokens == ["tokens", "1,133", "153", "1,000", "1,300"]
    assert steps == ["steps", "113.3", "15.3", "100", "130"]
    assert seconds == ["seconds", "of", "training", "11.3", "1.5", "10.0", "13.0"]
    stored = json.loads((tmp_path / "results.json").read_text())
    assert (stored["seeds"], stored["reached"], stored["tokens"]["max"]) == (4, 3, 1300)
    assert [(run["seed"], run["state"], run["fingerprint"]) for run in stored["runs"]] == [
        (1, "reached", "f1"), (2, "reached", "f2"), (3, "reached", "f3"), (4, "missed", "f4"),
    ]  # fmt: skip
    assert (tmp_path / "figures" / "curves.png").is_file()


def test_the_figure_has_a_curve_for_each_run_and_the_mean_of_each_group(study):
    for seed, tokens in ((1, 1000), (2, 1200)):
        trained(study, seed, tokens)
    trained(study, 3, 1500, TrialState.PRUNED)
    first, second, third = study.trials
    groups = [SeedGroup("default", {}, [first, second]), SeedGroup("trial 3", {}, [third])]
    axes = seeds_figure(groups, study.user_attrs[SHARED]).axes[0]
    assert axes.get_title(loc="left") == "2 of 3 runs reached the target (dotted: mean; shaded: ± deviation)"
    ends = [max(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2 and line.get_ls() == "-"]
    assert sorted(ends) == [1000, 1200, 1500]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_ls() == ":"] == [1100]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["default", "trial 3"]


@pytest.mark.parametrize(
    ("tokens", "marks"),
    [((1000, 1200), " (dotted: mean; shaded: ± deviation)"), ((1000, 1000), " (dotted: mean)"), ((), "")],
)
def test_the_title_explains_only_the_marks_that_are_there(study, tokens, marks):
    for seed, each in enumerate(tokens):
        trained(study, seed, each)
    axes = seeds_figure([SeedGroup("all seeds", {}, study.trials)], study.user_attrs[SHARED]).axes[0]
    assert axes.get_title(loc="left") == f"{len(tokens)} of {len(tokens)} runs reached the target{marks}"


def test_equal_values_are_one_trial_and_the_order_is_that_of_the_values_cost(study):
    for value, lr in ((3.0, 0.1), (1.0, 0.2), (2.0, 0.2), (2.5, 0.3)):
        add(study, value=value, **{VALUES: {"optim.lr": lr}})
    found = best_distinct(study, ["optim.lr"], {"optim.lr": 0.3}, 5)
    assert [trial.number for trial in found] == [1, 0]
