"""Repeat runs with other seeds: the present parameters, or the best trials of a study beside them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pipeline.config.params import Params
from pipeline.config.sections import SlurmConfig, SweepConfig
from pipeline.data.token_files import count_tokens, data_sha256
from pipeline.report.style import save_png
from pipeline.sweep.controller import prepared_tokens, require_best, run_study
from pipeline.sweep.figures import UNITS, seeds_figure
from pipeline.sweep.mlflow_run import Outcome
from pipeline.sweep.placement import Placement, place_workers
from pipeline.sweep.search_space import values_of, with_values
from pipeline.sweep.statistics import SeedGroup, Spread, rank, verdict, welch_p
from pipeline.sweep.study import (
    CONFIRMED,
    SHARED,
    VALUES,
    enqueue_list,
    failure_of,
    find_study,
    has_ended,
    latest_trials,
    require_same,
    shared_settings,
)
from pipeline.sweep.worker import SPENT
from pipeline.system.errors import InputError
from pipeline.system.files import sha256_json, write_json
from pipeline.system.host import project_root
from pipeline.system.words import counted
from pipeline.tracking.fingerprint import source_hashes
from pipeline.training.config import RunConfig

SEED = "train.seed"
RESULTS = "results.json"  # in a study's folder
MAX_SEEDS = 1000
STATES = {TrialState.COMPLETE: "reached", TrialState.PRUNED: "missed"}


def run_replicate(params: Params, sweep: SweepConfig, n_seeds: int, slurm: SlurmConfig | None = None) -> None:
    """Train the parameters with `n_seeds` seeds from train.seed on; print the spread of what they spent.

    Seeds that were trained before are not trained again, and are part of the result. Raises TargetNotReached if no
    seed has reached the target.
    """
    config = RunConfig.of(params)
    listed = [{SEED: seed} for seed in _seeds(params, config.train.seed, n_seeds)]
    placement = place_workers(sweep, config.train, slurm)
    tokens = prepared_tokens("replicate")
    config.require_length(count_tokens(tokens))
    sweep = sweep.updated(objective="tokens")
    sha256 = data_sha256(tokens)
    require_best(_run_list(params, sweep, placement, "replicate", [SEED], listed, sha256, _replicate_outcome))


def run_confirm(params: Params, sweep: SweepConfig, top: int, n_seeds: int, slurm: SlurmConfig | None = None) -> None:
    """Train the `top` best trials of a study and the values of params.yaml with `n_seeds` seeds each; name the winner.

    The seeds follow train.seed. The study's own seed is not among them: its best trials were chosen by it, so that
    their costs with it are too low on average. Raises TargetNotReached if no trial of the study has reached the target.
    """
    if top < 1:
        raise InputError(f"--top {top}: at least 1 trial is compared with the values of params.yaml")
    config, searched = RunConfig.of(params), find_study(sweep, project_root())
    seeds = _seeds(params, config.train.seed + 1, n_seeds)
    require_best(searched)
    shared = searched.user_attrs[SHARED]
    if not shared["space"]:
        raise InputError(f"study {sweep.study} is a list of trials: name a searched study")
    placement = place_workers(sweep, config.train, slurm)
    tokens = prepared_tokens(sweep.study)
    sweep = sweep.updated(space=shared["space"], objective=shared["objective"])
    weighted = config.with_weights(tokens.parent)
    require_same(searched, shared_settings(sweep, weighted, sha256 := data_sha256(tokens)))
    config.require_length(count_tokens(tokens))
    keys = [key for key in sweep.axes if key != SEED]
    chosen = {"default": values_of(config, keys)}
    for trial in best_distinct(searched, keys, chosen["default"], top):
        chosen[f"trial {trial.number}"] = {key: trial.user_attrs[VALUES][key] for key in keys}
    if len(chosen) == 1:
        raise InputError(
            f"study {sweep.study}: only the values of params.yaml have reached the target: allow more trials"
        )
    if len(chosen) <= top:
        print(f"only {counted(len(chosen) - 1, 'trial')} with other values than params.yaml reached the target")
    listed = [{**values, SEED: seed} for seed in seeds for values in chosen.values()]

    def outcome(study: Study, figures: Path) -> Outcome:
        groups = [
            SeedGroup(name, values, [trial for seed in seeds for trial in ended(study, {**values, SEED: seed})])
            for name, values in chosen.items()
        ]
        found = _confirm_outcome(study, groups, len(seeds), figures)
        if winner := found.tags.get("winner"):
            confirmed = {"name": winner, "values": chosen[winner], "compared": [*chosen.values()]}
            searched.set_user_attr(CONFIRMED, confirmed | {"verdict": found.tags["verdict"]})
        return found

    require_best(_run_list(params, sweep, placement, f"{sweep.study}-confirm", [*keys, SEED], listed, sha256, outcome))


def best_distinct(study: Study, keys: Sequence[str], default: dict[str, Any], top: int) -> list[FrozenTrial]:
    """The best trials, at most `top`, whose values of `keys` differ from each other's and from the default's."""
    seen, found = [default], []
    reached = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    for trial in sorted(reached, key=lambda trial: (trial.value, trial.number)):
        values = {key: trial.user_attrs[VALUES][key] for key in keys}
        if values not in seen:
            seen.append(values)
            found.append(trial)
    return found[:top]


def ended(study: Study, values: dict[str, Any]) -> list[FrozenTrial]:
    """The trial with these values that was trained to its end, if there is one."""
    trials = (trial for trial in latest_trials(study) if trial.user_attrs.get(VALUES) == values and has_ended(trial))
    return [trial for trial in trials if trial.state is not TrialState.COMPLETE or SPENT in trial.user_attrs][:1]


def _seeds(params: Params, first: int, count: int) -> list[int]:
    if not 1 <= count <= MAX_SEEDS:
        raise InputError(f"--seeds {count}: a number of seeds from 1 to {MAX_SEEDS}")
    seeds = list(range(first, first + count))
    RunConfig.of(with_values(params, {SEED: seeds[-1]}, 1))  # a seed has 63 bits
    return seeds


def _run_list(
    params: Params,
    sweep: SweepConfig,
    placement: Placement,
    prefix: str,
    varied: list[str],
    listed: list[dict[str, Any]],
    data_sha256: str,
    outcome: Callable[[Study, Path], Outcome],
) -> Study:
    """Run the study of a list of trials, whose name has a hash of all that the trials share, the code included."""
    plain = sweep.updated(space={}, sampler="random", pruner="none", patience=None, trials=len(listed))
    config = RunConfig.of(params).with_weights(project_root() / "data")
    shared = shared_settings(plain, config, data_sha256, varied)
    name = f"{prefix}-{sha256_json(shared | {'sources': source_hashes()})[:8]}"
    sweep = plain.updated(study=name)

    def with_places(study: Study, figures: Path) -> Outcome:
        found = outcome(study, figures)
        places = f"written: {figures.parent / RESULTS} and {figures / 'curves.png'}"
        return found._replace(text=f"{found.text}\n{places}")

    return run_study(params, sweep, shared, placement, lambda study: enqueue_list(study, listed), with_places)


def _replicate_outcome(study: Study, figures: Path) -> Outcome:
    """The spread over all seeds of the study."""
    trials = latest_trials(study)
    seeds = sorted({trial.user_attrs[VALUES][SEED] for trial in trials})
    done = {seed: trial for seed in seeds for trial in ended(study, {SEED: seed})}
    newest = {trial.user_attrs[VALUES][SEED]: trial for trial in trials}
    group = SeedGroup("all seeds", {}, list(done.values()))
    spreads = {key: Spread.of(costs) for key in UNITS if (costs := group.costs(key))}
    n_reached = len(done) - group.n_missed
    rows = [_row(seed, done.get(seed, newest[seed])) for seed in seeds]
    write_json(
        figures.parent / RESULTS,
        {
            "seeds": len(done),
            "reached": n_reached,
            **{key: spread._asdict() for key, spread in spreads.items()},
            "runs": rows,
        },
    )
    save_png(seeds_figure([group], study.user_attrs[SHARED]), figures / "curves.png")
    lines = [f"study {study.study_name}: {len(done)} of {len(seeds)} seeds trained, {n_reached} reached the target"]
    if done:
        lines[0] += f" ({n_reached / len(done):.0%})"
    lines.append(pd.DataFrame([_cells(row) for row in rows]).to_string(index=False, na_rep=""))
    metrics: dict[str, float] = {"seeds": len(done)}
    if done:
        metrics["share_reached"] = n_reached / len(done)
    for key, spread in spreads.items():
        metrics |= {f"{key}/{name}": value for name, value in spread._asdict().items() if value is not None}
    if spreads:
        table = {UNITS[key]: _spread_cells(key, spread) for key, spread in spreads.items()}
        lines.append(pd.DataFrame(table).T.to_string())
    result = f"mean {spreads['tokens'].mean:,.0f} tokens" if "tokens" in spreads else ""
    return Outcome("\n".join(lines), metrics, result=result)


def _confirm_outcome(study: Study, groups: list[SeedGroup], n_seeds: int, figures: Path) -> Outcome:
    """The groups, ranked; the winner and the verdict once all of their runs have ended."""
    shared = study.user_attrs[SHARED]
    objective, default = shared["objective"], groups[0]
    ranked, unit = rank(groups, objective), UNITS[objective]
    save_png(seeds_figure(ranked, shared), figures / "curves.png")
    rows: list[dict[str, Any]] = []
    metrics: dict[str, float] = {}
    for place, group in enumerate(ranked, start=1):
        costs = group.costs(objective)
        spread = Spread.of(costs) if costs else None
        p = None if group is default else welch_p(costs, default.costs(objective))
        rows.append(
            {
                "rank": place,
                "candidate": group.name,
                "reached": f"{len(costs)} of {len(group.trials)}",
                **(_spread_cells(objective, spread) if spread else {}),
                "Welch's p": "" if p is None else f"{p:.2g}",
                **group.values,
            }
        )
        name = group.name.replace(" ", "_")
        found = {"mean": spread.mean, "sd": spread.sd, "p": p} if spread else {}
        metrics |= {f"{name}/{key}": value for key, value in found.items() if value is not None}
        metrics[f"{name}/reached"] = len(costs)
    n_ended = sum(len(group.trials) for group in groups)
    n_runs = n_seeds * len(groups)
    write_json(figures.parent / RESULTS, {"objective": objective, "runs": n_runs, "ended": n_ended, "ranking": rows})
    head = f"study {study.study_name}: {n_ended} of {n_runs} runs have ended; {unit} to the target, by candidate:"
    table = pd.DataFrame(rows).to_string(index=False, na_rep="")
    if n_ended < n_runs:
        failed = {why for trial in latest_trials(study) if (why := failure_of(trial))}
        why = f" ({'; '.join(sorted(failed)[:3])})" if failed else ""
        return Outcome(f"{head}\n{table}\nno winner yet{why}: the same command trains the rest", metrics)
    if not ranked[0].costs(objective):
        return Outcome(f"{head}\n{table}", metrics)
    said = verdict(ranked, default, objective, unit)
    return Outcome(f"{head}\n{table}\n{said}", metrics, {"winner": ranked[0].name, "verdict": said})


def _row(seed: int, trial: FrozenTrial) -> dict[str, Any]:
    """A seed's run: its state, what it spent, and why it did not reach the target."""
    reason = failure_of(trial)
    state = STATES.get(trial.state, "missed" if has_ended(trial) else trial.state.name.lower())
    return {
        "seed": seed,
        "state": state,
        **(trial.user_attrs.get(SPENT, {}) if has_ended(trial) else {}),
        **({"why": reason} if reason else {}),
        "fingerprint": trial.user_attrs.get("fingerprint"),
        "mlflow_run_id": trial.user_attrs.get("mlflow_run_id"),
    }


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """A row of the printed table."""
    numbers = {key: _number(key, value) if key in UNITS else str(value) for key, value in row.items()}
    return {UNITS.get(key, key): text for key, text in numbers.items() if key not in ("fingerprint", "mlflow_run_id")}


def _spread_cells(key: str, spread: Spread) -> dict[str, str]:
    return {name: "" if value is None else _number(key, value) for name, value in spread._asdict().items()}


def _number(key: str, value: float) -> str:
    return f"{value:,.0f}" if key == "tokens" or isinstance(value, int) else f"{value:,.1f}"
