"""Carry out a plan: bring the text, write params.yaml, run the pipeline, and show what was reached."""

import dataclasses
import sys
from pathlib import Path

from pipeline.config.params import PARAMS
from pipeline.config.recipes import changed_keys, locked_params, write_values
from pipeline.ops.outcome import reproduce, show_outcome
from pipeline.ops.plan import DOUBLINGS, PLANS, Plan, stored_plan
from pipeline.ops.policy import MEMORISE
from pipeline.ops.sources import bring, bring_weights
from pipeline.system.files import sha256_file, write_json, write_text
from pipeline.tracking.run_record import read_run


def learn(plan: Plan, in_place: bool, assume_yes: bool) -> None:
    """Bring the plan's text into texts/, write params.yaml, run `dvc repro`, and show what was reached.

    On a terminal, ask before anything is written, unless `assume_yes`. Raises RunLocked if another command uses
    params.yaml, and as `bring`, `reproduce` and `show_outcome` do.
    """
    if not assume_yes and sys.stdin.isatty() and not _is_confirmed():
        print("nothing was changed")
        return
    with locked_params():
        changed_keys(plan.values)  # raises InputError before anything is written
        copies = bring(plan.source, in_place, stored_plan(plan.source.name).get("copies", {}))
        if plan.weights:
            bring_weights(plan.weights, in_place)
        _train(plan, copies)
        while plan.may_be_longer and plan.n_doublings < DOUBLINGS and not _reached():
            plan = plan.longer()
            print(f"\nThe target was not reached: now {plan.lines['training']}", flush=True)
            _train(plan, copies)
        _store(dataclasses.replace(plan, n_doublings=0), copies)  # the same command again may train longer
        show_outcome(_more_training(plan))


def _is_confirmed() -> bool:
    try:
        return input("Train it? [Y/n] ").strip().lower() in ("", "y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False


def _train(plan: Plan, copies: dict[str, str]) -> None:
    """Store the plan, write its values into params.yaml, and run the pipeline."""
    if changed_keys(plan.values):
        _keep_params()
    _store(plan, copies)
    print(write_values(plan.values), flush=True)
    environment = plan.cost.environment() | (plan.fetched.environment() if plan.fetched else {})
    if plan.fetched and plan.text_sha256 != _text_sha256():  # DVC does not see that the text of a URL has changed
        reproduce(environment, "--force", "--single-item", "download")
    reproduce(environment)


def _store(plan: Plan, copies: dict[str, str]) -> None:
    """Store the plan, with the copies of its text in texts/."""
    origin = {"origin": plan.source.origin, "copies": copies}
    if not copies:  # the text is in texts/, where an earlier call may have copied it, or not on this machine
        origin |= {key: value for key, value in stored_plan(plan.source.name).items() if key in origin}
    write_json(plan.path, {
        "source": plan.source.source, "text_sha256": plan.text_sha256, **origin,
        "options": dataclasses.asdict(plan.options), "values": plan.values, "cost": plan.cost._asdict(),
        "lines": plan.lines, "n_doublings": plan.n_doublings,
    })  # fmt: skip


def _text_sha256() -> str:
    """The SHA-256 of data/corpus.txt; empty if there is none."""
    return path.read_text().split(" ")[0] if (path := Path("data/corpus.sha256")).is_file() else ""


def _reached() -> bool:
    """Whether the last run has reached the target by its rule."""
    results = read_run(Path("models"))["results"]
    return results["to_target"][results["rule"]] is not None


def _keep_params() -> None:
    """Keep a copy of params.yaml in PLANS, named by its hash."""
    kept = PLANS / f"params-{sha256_file(PARAMS)[:8]}.yaml"
    kept.parent.mkdir(exist_ok=True)
    write_text(kept, PARAMS.read_bytes().decode())
    print(f"{PARAMS} is changed as follows; {kept} is a copy of it as it was")


def _more_training(plan: Plan) -> str | None:
    """What to do after a training that did not reach its target; None if the outcome knows best."""
    if plan.options.goal != MEMORISE:
        return None
    if plan.options.time_s is not None:
        return "the same command without --time trains longer"
    return "the same command again trains with twice the epochs" if plan.may_be_longer else None
