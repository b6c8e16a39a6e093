"""Carry out a plan: bring the text, write params.yaml, run the pipeline, and show what was reached."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.config.params import PARAMS, load_params
from pipeline.config.recipes import require_keys, write_values
from pipeline.data.openings import openings
from pipeline.data.token_files import TokenFolder
from pipeline.data.tokenizer import load_tokenizer
from pipeline.model.generator import Generator
from pipeline.model.sampling import Sampling
from pipeline.model.weights import load_model
from pipeline.ops.chat import show
from pipeline.ops.plan import DOUBLINGS, PLANS, WIDTH, Plan, stored_plan
from pipeline.ops.policy import MEMORISE
from pipeline.ops.sources import bring, bring_weights
from pipeline.registry.register import IS_CHAMPION
from pipeline.system.errors import PipelineError
from pipeline.system.files import read_json, sha256_file, write_json, write_text
from pipeline.system.signals import StopSignals
from pipeline.tracking.fingerprint import flatten
from pipeline.tracking.run_record import read_run

SAMPLE_TOKENS = 100
SPACE = "sweep.space."  # begins the keys of a search space, from which a user may have removed some


class StageFailed(PipelineError):  # noqa: N818 (a result, not a fault of the command)
    """A stage of the pipeline has failed, and has said why."""


def learn(plan: Plan, in_place: bool, assume_yes: bool) -> None:
    """Bring the plan's text into texts/, write params.yaml, run `dvc repro`, and show what was reached.

    On a terminal, ask before anything is written, unless `assume_yes`. Raises StageFailed if a stage fails, and
    Interrupted after a signal.
    """
    if not assume_yes and sys.stdin.isatty() and input("Train it? [Y/n] ").strip().lower() not in ("", "y", "yes"):
        print("nothing was changed")
        return
    require_keys(_values_of(plan))  # before anything is written
    copies = bring(plan.source, in_place)
    if plan.weights:
        bring_weights(plan.weights, in_place)
    _train(plan, copies)
    for _ in range(DOUBLINGS):
        if not plan.may_be_longer or _reached():
            break
        plan = plan.longer()
        print(f"\nThe target was not reached: now {plan.lines['training']}", flush=True)
        _train(plan, copies)
    _show_outcome(plan)


def _train(plan: Plan, copies: dict[str, str]) -> None:
    """Store the plan, write its values into params.yaml, and run the pipeline."""
    values = _values_of(plan)
    _keep_params(values, flatten(load_params().values))
    origin = {"origin": plan.source.origin, "copies": copies}
    if not copies:  # the text is in texts/, where an earlier call may have copied it, or not on this machine
        origin |= {key: value for key, value in stored_plan(plan.source.name).items() if key in origin}
    write_json(plan.path, {
        "source": plan.source.source, "text_sha256": plan.text_sha256, **origin,
        "options": dataclasses.asdict(plan.options), "values": plan.values, "cost": plan.cost._asdict(),
        "lines": plan.lines,
    })  # fmt: skip
    print(write_values(values), flush=True)
    environment = plan.cost.environment() | (plan.fetched.environment() if plan.fetched else {})
    if plan.fetched and plan.text_sha256 != _text_sha256():  # DVC does not see that the text of a URL has changed
        _reproduce(environment, "--force", "--single-item", "download")
    _reproduce(environment)


def _values_of(plan: Plan) -> dict[str, Any]:
    """The plan's values without the ranges of keys that the user has removed from the search space."""
    present = flatten(load_params().values)
    return {key: value for key, value in plan.values.items() if key in present or not key.startswith(SPACE)}


def _text_sha256() -> str:
    """The SHA-256 of data/corpus.txt; empty if there is none."""
    return path.read_text().split(" ")[0] if (path := Path("data/corpus.sha256")).is_file() else ""


def _reached() -> bool:
    """Whether the last run has reached the target by its rule."""
    results = read_run(Path("models"))["results"]
    return results["to_target"][results["rule"]] is not None


def _keep_params(values: dict[str, Any], present: dict[str, Any]) -> None:
    """If `values` change those of params.yaml, `present`, keep a copy of it in PLANS, named by its hash."""
    if any(repr(present.get(key)) != repr(value) for key, value in values.items()):
        kept = PLANS / f"params-{sha256_file(PARAMS)[:8]}.yaml"
        kept.parent.mkdir(exist_ok=True)
        write_text(kept, PARAMS.read_text(encoding="utf-8"))
        print(f"{PARAMS} is changed as follows; {kept} is a copy of it as it was")


def _reproduce(environment: dict[str, str], *arguments: str) -> None:
    """Run `dvc repro` with this Python's programs first on the PATH.

    Ctrl-C reaches DVC and its stage from the terminal; another signal is passed on to DVC, with which its stage ends.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with StopSignals() as stop:
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro", *arguments], env={**os.environ, **environment, "PATH": path}
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                if stop.received not in (None, signal.SIGINT):
                    process.terminate()
        finally:
            if process.poll() is None:
                process.terminate()
        stop.raise_if_received("during `dvc repro`")
    if process.returncode:
        raise StageFailed("`dvc repro` failed, as it says above: the same command resumes where it ended")


def _more_training(plan: Plan) -> str:
    """What to do after a training that did not reach its target."""
    if plan.options.time_s is not None:
        return "the same command without --time trains longer"
    if plan.may_be_longer:
        return "the same command again trains with twice the epochs"
    return f"set optim.max_epochs to {plan.longer().values['optim.max_epochs']:g} in {PARAMS}, and run `dvc repro`"


def _show_outcome(plan: Plan) -> None:
    """Print the loss that was reached, a text by the model, and the commands that use it."""
    registered, results = read_json(Path("reports/registered.json")), read_run(Path("models"))["results"]
    reached, best = results["to_target"][results["rule"]], plan.options.wants_the_best
    spent = reached or results
    cost = f"{spent['steps']:,} steps, {spent['tokens']:,} tokens"
    word = "reached" if reached else "best" if best else "not reached"
    target = f"rule {results['rule']}" + f", target {results['target_loss']:g}" * (not best)
    print(f"\n{word:{WIDTH}} loss {results['loss']:.4f} after {cost} ({target})")
    label = f"{registered['model']} version {registered['version']}"
    verdict = registered["reason"] if registered["reason"] != IS_CHAMPION else "as before"
    print(f"{'model':{WIDTH}} {label}, {'champion: ' * registered['champion']}{verdict}")
    if not (reached or best) and plan.options.goal == MEMORISE:
        registered["next_step"] = _more_training(plan)
    if registered["next_step"]:
        print(f"{'next':{WIDTH}} {registered['next_step']}")
    model, tokens = load_model(Path("models/model")), TokenFolder(Path("data/tokens")).train
    tokenizer = load_tokenizer(Path("models/model"))
    prompt = (openings(tokens, tokenizer, 1) or [""])[0]
    print(f"\n{label} continues the beginning of its text:\n", flush=True)
    room = max(1, model.trained_length - len(tokenizer.encode(prompt)))  # the whole text is the model's context
    show(Generator(model, tokenizer), prompt, Sampling(max_tokens=min(SAMPLE_TOKENS, room), temperature=0.8, seed=1))
    if registered["champion"]:
        print("\n`make app` opens the page on this model; `python -m pipeline generate` writes with it in the terminal")
