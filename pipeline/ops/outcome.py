"""Run `dvc repro`, and show what was reached; `learn` and `repro` end with it."""

import contextlib
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from pipeline.config.params import PARAMS, load_params
from pipeline.config.sections import RegistryConfig
from pipeline.data.openings import openings
from pipeline.data.token_files import TokenFolder
from pipeline.data.tokenizer import load_tokenizer
from pipeline.model.generator import Generator
from pipeline.model.sampling import Sampling
from pipeline.model.weights import load_model
from pipeline.ops.chat import show
from pipeline.ops.plan import in_lines
from pipeline.registry.catalog import CHAMPION, aliases_of, find_version, open_registry
from pipeline.registry.promotion import next_step as promote_it
from pipeline.registry.register import IS_BEST, IS_CHAMPION
from pipeline.system.errors import ModelMissing, PipelineError, TargetNotReached
from pipeline.system.files import read_json
from pipeline.system.host import git, project_root
from pipeline.system.processes import dvc_command
from pipeline.system.signals import StopSignals
from pipeline.tracking.mlflow_store import store_errors
from pipeline.tracking.run_record import read_run

SAMPLE_TOKENS = 100
REGISTERED = Path("reports/registered.json")


class StageFailed(PipelineError):  # noqa: N818 (a result, not a fault of the command)
    """A stage of the pipeline has failed, and has said why."""


def reproduce(environment: dict[str, str], *arguments: str) -> None:
    """Run `dvc repro` with this Python's programs first on the PATH.

    Ctrl-C reaches DVC and its stage from the terminal; another signal is passed on to DVC, with which its stage ends.
    Raises StageFailed if a stage fails, and Interrupted after a signal.
    """
    command, variables = dvc_command("repro", *arguments)
    with StopSignals() as stop:
        process = subprocess.Popen(command, env=variables | environment)
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


def show_outcome(next_step: str | None = None) -> None:
    """Print the loss that was reached, a text by the model, and the commands that use it.

    Raises TargetNotReached if the run missed a target that params.yaml requires; `next_step` says what to do then.
    """
    registered, run = _registered(), read_run(Path("models"))
    results = run["results"]
    reached = results["to_target"][results["rule"]]
    best = not load_params().section(RegistryConfig).require_target
    spent = reached or results
    cost = f"{spent['steps']:,} steps, {spent['tokens']:,} tokens"
    word = "reached" if reached else "best" if best else "not reached"
    target = f"rule {results['rule']}" + f", target {results['target_loss']:g}" * (not best)
    label = f"{registered['model']} version {registered['version']}"
    verdict = "as before" if registered["reason"] in (IS_CHAMPION, IS_BEST) else registered["reason"]
    lines = {
        word: f"loss {results['loss']:.4f} after {cost} ({target})",
        "model": f"{label}, {'champion: ' * registered['champion']}{verdict}",
    }
    if registered["next_step"] and (reached or best):
        lines["next"] = registered["next_step"]
    if git("status", "--porcelain", "--", "dvc.lock"):
        lines["git"] = (
            "dvc.lock has this result and is not committed: leave it, or share the model as "
            "docs/guides/dvc-remote.md says"
        )
    if git("status", "--porcelain", "--", str(PARAMS)):
        lines["params"] = f"{PARAMS} differs from the committed one: `git checkout {PARAMS}` restores that"
    print(f"\n{in_lines(lines)}")
    _show_sample(label)
    if registered["champion"]:
        print("\n`make app` serves this model; `totarget generate` continues prompts with it in the terminal")
    if not (reached or best):
        raise TargetNotReached(
            f"target {results['target_loss']:g} not reached, the loss is {results['loss']:.4f} after {cost}: "
            f"{next_step or _train_longer(run) or registered['next_step']}"
        )


def _registered() -> dict[str, Any]:
    """The result of the stage `register`, with what the store says now if DVC has skipped the stage.

    The stage is run if the store is new, or lacks the version. If the store does not answer, the result is that of the
    last time.
    """
    registered: dict[str, Any] = read_json(REGISTERED)
    if REGISTERED.stat().st_mtime > psutil.Process().create_time():  # this command has run the stage
        return registered
    number = registered["version"]
    try:
        store = open_registry(project_root())
        champion = aliases_of(store, registered["model"]).get(CHAMPION)
        find_version(store, registered["model"], number)
    except ModelMissing as error:
        if isinstance(error.__cause__, store_errors()):
            print(f"warning: {error}", file=sys.stderr)
            return registered
        reproduce({}, "--force", "--single-item", "register")
        return dict(read_json(REGISTERED))
    if registered["champion"] == (champion == number):
        return registered
    reason = IS_CHAMPION if champion == number else f"version {champion} is champion" if champion else "no champion"
    return registered | {
        "champion": champion == number,
        "reason": reason,
        "next_step": promote_it(number, champion, None),
    }


def _show_sample(label: str) -> None:
    """Let the model continue the beginning of its text."""
    model, tokens = load_model(Path("models/model")), TokenFolder(Path("data/tokens")).train
    tokenizer = load_tokenizer(Path("models/model"))
    prompt, half = (openings(tokens, tokenizer, 1) or [""])[0], model.trained_length // 2
    if (n := len(tokenizer.encode(prompt))) > half:
        prompt = prompt[: len(prompt) * half // n]
    print(f"\n{label} continues the beginning of its text:\n", flush=True)
    room = max(1, model.trained_length - len(tokenizer.encode(prompt)))  # the whole text is the model's context
    show(Generator(model, tokenizer), prompt, Sampling(max_tokens=min(SAMPLE_TOKENS, room), temperature=0.8, seed=1))


def _train_longer(run: dict[str, Any]) -> str | None:
    """What to do after a run that has used up its budget; None if it ended earlier, out of patience."""
    results = run["results"]
    if results["steps"] < results.get("max_steps", 0):
        return None
    epochs = 2 * run["params"]["optim"]["max_epochs"]
    return f"set optim.max_epochs to {epochs:g} in {PARAMS}, and run `totarget repro`"
