"""Decide which version is champion: the promotion gate, and promotion and rollback by hand."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.config.params import load_params
from pipeline.config.sections import TrainConfig
from pipeline.data.token_files import TokenFolder
from pipeline.registry.artifacts import label_of, open_version, translate_store_errors
from pipeline.registry.catalog import CHAMPION, find_version, printable, registered_model
from pipeline.system.errors import ModelMissing
from pipeline.tracking.mlflow_store import Store

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION_BEFORE = "champion_before"  # tag of the registered model: the version that a rollback restores
ROLLED_BACK = "rolled_back"  # tag of a version that lost the alias by a rollback
PASSED, VERDICT = "passed_gate", "verdict"  # tags of a version: true or false, and the reason
SAME_LOSS = 0.01  # relative difference that is allowed between two machines for the loss of one model


@dataclass(frozen=True)
class Candidate:
    """What the gate needs from a new version; losses are in nats per token."""

    sliding_loss: float | None  # over its whole training text, from the stage `evaluate`; None: not evaluated
    evaluated_loss: float | None  # of the kind that the run's target rule needs, from the stage `evaluate`
    trained_loss: float  # the same of the saved model, in run.json
    journal_loss: float  # the same of the saved model, in the journal
    model_step: int
    target_loss: float
    n_tokens: int  # of the training text
    data_sha256: str
    rolled_back: bool = False


@dataclass(frozen=True)
class Champion:
    """What the gate needs from the present champion."""

    version: str
    sliding_loss: float | None  # over its whole training text; None: an earlier version of the project registered it
    n_tokens: int
    data_sha256: str
    candidate_loss: Callable[[], float]  # of the candidate on this text; called only if the texts differ


class Verdict(NamedTuple):
    promotes: bool
    reason: str


def judge(candidate: Candidate, champion: Champion | None, max_target_loss: float) -> Verdict:
    """Decide whether `candidate` gets the alias champion, and why.

    Its records must agree, and its target must be at most `max_target_loss` and met by its sliding loss, whatever rule
    ended its training. If there is a champion, its training text must have at least as many tokens, and its sliding
    loss on the champion's text must not be higher.
    """
    loss, measured, trained = candidate.sliding_loss, candidate.evaluated_loss, candidate.trained_loss
    target = candidate.target_loss
    if candidate.rolled_back:
        return Verdict(False, "was rolled back by hand")
    if loss is None or measured is None:
        return Verdict(False, "is not evaluated: `dvc repro evaluate` measures its loss")
    if candidate.journal_loss != trained:
        return Verdict(False, f"run.json disagrees with its journal: loss {trained:.4f} at step {candidate.model_step}")
    if not math.isclose(measured, trained, rel_tol=SAME_LOSS):
        return Verdict(False, f"metrics.json says loss {measured:.4f}, training measured {trained:.4f}: evaluate again")
    if target > max_target_loss:
        return Verdict(False, f"target {target:g} is above registry.max_target_loss {max_target_loss:g}")
    if loss >= target:
        return Verdict(False, f"sliding rule not met: loss {loss:.4f}, target {target:g}")
    if champion is None:
        return Verdict(True, "reached the target, and there was no champion")
    if candidate.n_tokens < champion.n_tokens:
        needed = f"champion {champion.version} on {champion.n_tokens:,}"
        return Verdict(False, f"trained on {candidate.n_tokens:,} tokens, {needed}")
    if champion.sliding_loss is None:
        return Verdict(True, f"reached the target; the sliding loss of champion {champion.version} is not known")
    if candidate.data_sha256 != champion.data_sha256:
        loss = champion.candidate_loss()
    its_own = f"whose own loss is {champion.sliding_loss:.4f}"
    reason = f"sliding loss {loss:.4f} on the tokens of champion {champion.version}, {its_own}"
    return Verdict(True, reason) if loss <= champion.sliding_loss else Verdict(False, f"worse: {reason}")


def next_step(version: str, champion: str | None, other_text: bool) -> str:
    """What to do after `version` was not promoted, in one line; `other_text`: the champion's text is another one."""
    served = f"the page and `generate` use champion {champion}" if champion else "there is no champion yet"
    own = "; or give this text a model of its own: set registry.model to a new name and run `dvc repro`"
    return f"{served}: `python -m pipeline models promote {version}` makes version {version} champion{own * other_text}"


def model_loss(project: Path, tokens: Path) -> float:
    """Compute the sliding loss of `project`'s model over all of `tokens`.

    Device and precision are those of the section `train` in params.yaml.
    """
    from pipeline.data.batches import Split
    from pipeline.model.evaluate import sliding_loss
    from pipeline.model.weights import load_model
    from pipeline.system.device import prepare_machine

    machine = prepare_machine(load_params(project / "params.yaml").section(TrainConfig))
    model = load_model(project / "models" / "model").to(machine.device)
    text = Split(TokenFolder(tokens).train, model.vocabulary, machine.device)
    return sliding_loss(model, text, model.trained_length, machine.autocast())


def set_champion(store: Store, name: str, version: "ModelVersion") -> str | None:
    """Move the alias champion to `version`; return the former champion's number, which a rollback restores."""
    before = store.client.get_registered_model(name).aliases.get(CHAMPION)
    if before is not None and str(before) != str(version.version):
        store.client.set_registered_model_tag(name, CHAMPION_BEFORE, str(before))
    store.client.set_registered_model_alias(name, CHAMPION, version.version)
    if ROLLED_BACK in version.tags:
        store.client.delete_model_version_tag(name, version.version, ROLLED_BACK)
    return None if before is None else str(before)


def promote(store: Store, name: str, which: str) -> str:
    """Verify a version and make it champion, even if the gate refused it; return a line for the user."""
    version = find_version(store, name, which)
    open_version(store, version)
    with translate_store_errors(store, name):
        before = set_champion(store, name, version)
    if before == str(version.version):
        return f"{label_of(version)} is already champion"
    instead = f" instead of version {before}" if before else ""
    refused = (
        f", although the gate refused it: {version.tags.get(VERDICT)}" if version.tags.get(PASSED) == "false" else ""
    )
    return printable(f"{label_of(version)} is now champion{instead}{refused}")


def rollback(store: Store, name: str) -> str:
    """Give the alias champion back to the former champion; a second call undoes it. Returns a line for the user."""
    with translate_store_errors(store, name):
        model = registered_model(store, name)
    current, before = model.aliases.get(CHAMPION), model.tags.get(CHAMPION_BEFORE)
    if before is None or before == str(current):
        raise ModelMissing(f"{name} has no former champion: a rollback needs a version that was champion before")
    line = promote(store, name, before)
    if current is not None:
        with translate_store_errors(store, name):
            store.client.set_model_version_tag(name, str(current), ROLLED_BACK, "true")
    return line
