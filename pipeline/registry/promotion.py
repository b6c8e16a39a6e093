"""Decide which version is champion: the promotion gate, and promotion and rollback by hand."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.config.params import load_params
from pipeline.config.sections import RegistryConfig, TrainConfig
from pipeline.data.token_files import TokenFolder, Tokens
from pipeline.registry.artifacts import label_of, open_version
from pipeline.registry.catalog import CHAMPION, find_version, printable, registered_model, rule_alias, rule_of
from pipeline.system.errors import InputError, ModelMissing
from pipeline.tracking.mlflow_store import Store, translate_store_errors
from pipeline.training.target import RULES

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION_BEFORE = "champion_before"  # tag of the registered model: the version that a rollback restores
ROLLED_BACK = "rolled_back"  # tag of a version: "true" if it lost the alias champion by a rollback
PASSED, VERDICT = "passed_gate", "verdict"  # tags of a version: true or false, and the reason
SAME_LOSS = 0.01  # relative difference that is allowed between two machines for the loss of one model
PASSAGES, PASSAGE_TOKENS = 200, 64  # of a held-out text, to find out whether a model was trained on it
MAX_KNOWN = 0.1  # share of these passages that may occur in the training text: texts repeat themselves


@dataclass(frozen=True)
class Candidate:
    """What the gate needs from a new version. Losses are those that its target rule compares, in nats per token."""

    rule: str
    loss: float | None  # from the stage `evaluate`; None: not evaluated
    trained_loss: float  # the same of the saved model, in run.json
    journal_loss: float  # the same of the saved model, in the journal
    model_step: int
    target_loss: float
    n_tokens: int  # of the training text
    data_sha256: str
    rolled_back: bool = False


@dataclass(frozen=True)
class Champion:
    """What the gate needs from the best version so far of the candidate's target rule."""

    name: str  # for messages: champion N, or the version that is the best of its rule
    loss: float | None  # that the rule compares, on its own text; None: an earlier version of the project registered it
    n_tokens: int
    data_sha256: str
    candidate_loss: Callable[[], float]  # of the candidate on this text; called only if the texts differ


class Verdict(NamedTuple):
    is_best: bool  # gets the alias of its rule
    promotes: bool  # gets the alias champion
    reason: str


def judge(
    candidate: Candidate, best: Champion | None, config: RegistryConfig, other: tuple[str, str] | None = None
) -> Verdict:
    """Decide whether `candidate` is the best version of its target rule, whether it gets the alias champion, and why.

    `best` is the best version of this rule so far; `other` is the champion's number and rule if that is another rule.
    Such a champion stays, since losses of two rules cannot be compared; with `replace_champion`, each version without
    a flaw replaces it.

    A version without a flaw has a rule that makes champions, records that agree and, unless `require_target` is false,
    a loss below the target. For a rule that compares the loss of the training text, the target must be at most
    `max_target_loss`. The loss of a held-out text depends on text and tokenizer, so it has no such bound.

    The best version of its rule: the loss on the tokens of `best` must not be higher than its own and, if they are
    training tokens, the candidate's text must not have fewer of them. With `replace_champion`, a `best` of another text
    is replaced without a comparison.
    """
    if flaw := flaw_of(candidate, config):
        return Verdict(False, False, flaw)
    is_best, reason = _compare(candidate, best, config, other)
    if other is None:
        return Verdict(is_best, is_best, reason)
    number, its_rule = other
    if config.replace_champion:
        return Verdict(is_best, True, reason + replaces(number, its_rule))
    stays = f"; champion {number} has the rule {its_rule} and stays" if is_best else ""
    return Verdict(is_best, False, f"{reason}{stays}")


def replaces(number: str, rule: str) -> str:
    """The end of the reason of a version that replaces the champion `number`, which has another rule."""
    return f"; it replaces champion {number}, which has the rule {rule}"


def flaw_of(candidate: Candidate, config: RegistryConfig) -> str | None:
    """Why the candidate cannot become champion, whatever other versions there are; None if nothing is wrong with it."""
    loss, trained, target = candidate.loss, candidate.trained_loss, candidate.target_loss
    rule, name = RULES[candidate.rule], candidate.rule
    if candidate.rolled_back:
        return "was rolled back by hand"
    if not rule.makes_champion:
        strong = " or ".join(each for each in RULES if RULES[each].makes_champion)
        return f"the rule {name} makes no champion: set target.rule to {strong}"
    if loss is None:
        return "is not evaluated: `dvc repro evaluate` measures its loss"
    if candidate.journal_loss != trained:
        return f"run.json disagrees with its journal: loss {trained:.4f} at step {candidate.model_step}"
    if not math.isclose(loss, trained, rel_tol=SAME_LOSS):
        return f"metrics.json says loss {loss:.4f}, training measured {trained:.4f}: evaluate again"
    if target > config.max_target_loss and not rule.needs_held_out:
        return f"target {target:g} is above registry.max_target_loss {config.max_target_loss:g}"
    if loss >= target and config.require_target:
        return f"{name} rule not met: loss {loss:.4f}, target {target:g}"
    return None


def _compare(
    candidate: Candidate, best: Champion | None, config: RegistryConfig, other: tuple[str, str] | None
) -> tuple[bool, str]:
    """Whether a candidate without a flaw is the best version of its rule, and why; arguments as for `judge`."""
    assert candidate.loss is not None  # that is a flaw
    loss, rule, name = candidate.loss, RULES[candidate.rule], candidate.rule
    reached = "reached the target" if loss < candidate.target_loss else "is not required to reach the target"
    if best is None:
        return True, f"{reached}, and there was no champion" + f" of the rule {name}" * (other is not None)
    if candidate.data_sha256 != best.data_sha256 and config.replace_champion:
        return True, f"{reached}, and replaces {best.name}, which has another text"
    if candidate.n_tokens < best.n_tokens and not rule.needs_held_out:
        return False, f"trained on {candidate.n_tokens:,} tokens, fewer than the {best.n_tokens:,} of {best.name}"
    if best.loss is None:
        return True, f"{reached}; no {name} loss is recorded for {best.name}"
    if candidate.data_sha256 != best.data_sha256:
        loss = best.candidate_loss()
    tokens = "held-out tokens" if rule.needs_held_out else "tokens"
    reason = f"{name} loss {loss:.4f} on the {tokens} of {best.name}, whose own loss is {best.loss:.4f}"
    return (True, reason) if loss <= best.loss else (False, f"worse: {reason}")


def next_step(version: str, champion: str | None, other: str | None) -> str:
    """What to do after `version` was not promoted, in one line; `other`: what differs in the champion, text or rule."""
    served = f"the page and `generate` use champion {champion}" if champion else "there is no champion yet"
    own = f"; or give this {other} a model of its own: set registry.model to a new name and run `dvc repro`"
    promote = f"`python -m pipeline models promote {version}` makes version {version} champion"
    return f"{served}: {promote}{own if other else ''}"


def model_loss(project: Path, tokens: Path, name: str) -> float:
    """Compute the loss `name` of LOSSES of `project`'s model on `tokens`, the token folder of another version.

    Device and precision are those of the section `train` in params.yaml. Raises InputError if it is the loss of a
    held-out text on which the model was trained.
    """
    from pipeline.data.batches import Split
    from pipeline.model.evaluate import LOSSES, text_loss
    from pipeline.model.weights import load_model
    from pipeline.system.device import prepare_machine

    part, windows = LOSSES[name]
    text: Tokens = getattr(TokenFolder(tokens), part)
    if part == "val" and (known := known_share(text, TokenFolder(project / "data" / "tokens").train)) > MAX_KNOWN:
        raise InputError(f"was trained on {known:.0%} of the other version's held-out text: they cannot be compared")
    machine = prepare_machine(load_params(project / "params.yaml").section(TrainConfig))
    model = load_model(project / "models" / "model").to(machine.device)
    length, split = model.trained_length, Split(text, model.vocabulary, machine.device)
    return text_loss(model, split, windows(split.size, length), length, machine.autocast()).loss


def known_share(text: Tokens, training: Tokens) -> float:
    """Share of PASSAGES passages of `text`, spread evenly over it, that occur in the training text's first tokens."""
    from pipeline.data.corpus_index import CorpusIndex

    index, length = CorpusIndex.of(training), min(PASSAGE_TOKENS, len(text))
    starts = sorted({round(i * (len(text) - length) / (PASSAGES - 1)) for i in range(PASSAGES)})
    passages = (text.read(start, start + length).tolist() for start in starts)
    return sum(bool(index.passages(passage, length)) for passage in passages) / len(starts)


def set_best(store: Store, name: str, version: "ModelVersion") -> None:
    """Move the alias of its target rule to `version`, if that rule makes champions."""
    if (rule := rule_of(version.tags)) and rule.makes_champion:
        store.client.set_registered_model_alias(name, rule_alias(version.tags["rule"]), version.version)


def is_rolled_back(tags: Mapping[str, str]) -> bool:
    """Whether a version lost the alias champion by a rollback and has not got it back."""
    return tags.get(ROLLED_BACK) == "true"


def set_champion(store: Store, name: str, version: "ModelVersion") -> str | None:
    """Move the alias champion to `version`; return the former champion's number, which a rollback restores."""
    before = store.client.get_registered_model(name).aliases.get(CHAMPION)
    if before is not None and str(before) != str(version.version):
        store.client.set_registered_model_tag(name, CHAMPION_BEFORE, str(before))
    store.client.set_registered_model_alias(name, CHAMPION, version.version)
    if is_rolled_back(version.tags):
        store.client.set_model_version_tag(name, version.version, ROLLED_BACK, "false")
    return None if before is None else str(before)


def promote(store: Store, name: str, which: str) -> str:
    """Verify a version and make it champion, even if the gate refused it; return a line for the user."""
    version = find_version(store, name, which)
    open_version(store, version)
    with translate_store_errors(store.uri, name):
        set_best(store, name, version)
        return _set_champion_by_hand(store, name, version)


def rollback(store: Store, name: str) -> str:
    """Give the alias champion back to the former champion; a second call gives it to the other version again.

    `register` never makes the version that loses it champion again, nor compares others with it. The former champion
    gets the alias of its own rule only if no other version has it. Nothing is deleted, which a server may permit to
    fewer users. Returns a line for the user.
    """
    with translate_store_errors(store.uri, name):
        model = registered_model(store, name)
    current, before = model.aliases.get(CHAMPION), model.tags.get(CHAMPION_BEFORE)
    if before is None or before == str(current):
        raise ModelMissing(f"{name} has no former champion: a rollback needs a version that was champion before")
    version = find_version(store, name, before)
    open_version(store, version)
    with translate_store_errors(store.uri, name):
        if model.aliases.get(rule_alias(version.tags.get("rule", ""))) in (None, current):
            set_best(store, name, version)
        line = _set_champion_by_hand(store, name, version)
        if current is not None:
            store.client.set_model_version_tag(name, str(current), ROLLED_BACK, "true")
    return line


def _set_champion_by_hand(store: Store, name: str, version: "ModelVersion") -> str:
    """Move the alias champion to a verified version; return a line for the user."""
    before = set_champion(store, name, version)
    if before == str(version.version):
        return f"{label_of(version)} is already champion"
    instead = f" instead of version {before}" if before else ""
    refused = (
        f", although the gate refused it: {version.tags.get(VERDICT)}" if version.tags.get(PASSED) == "false" else ""
    )
    return printable(f"{label_of(version)} is now champion{instead}{refused}")
