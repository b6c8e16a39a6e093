"""Names and descriptions of runs and versions in MLflow, for people: text, model, and what was reached."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

SOURCE_TAG = "corpus.source"  # tag of a run: the text, as corpus.source names it
COMMON = {"input", "train", "text", "texts", "data", "corpus", "main", "resolve"}  # names that say nothing of a text
OUTCOMES = ("Reached: ", "Not reached: ")


class Result(NamedTuple):
    """What a finished run reached: the loss that its target rule compares, and where it was measured."""

    loss: float  # nats per token
    step: int
    tokens: int
    is_met: bool


def text_name(source: str) -> str:
    """A short name of the text `source`, a path or a URL, such as tinyshakespeare for .../tinyshakespeare/input.txt."""
    parts = [
        part for part in re.split(r"[/:]+", source.split("?")[0]) if part.strip(".") and not set("*?[") & set(part)
    ]
    names = [PurePosixPath(part).name.split(".")[0] or part for part in parts]
    return next((name for name in reversed(names) if name.lower() not in COMMON), names[-1] if names else "text")


def source_tag(params: Mapping[str, Any]) -> dict[str, str]:
    """The tag of a run that names its text; empty if `params`, the values of params.yaml, do not name one."""
    corpus = params.get("corpus")
    source = corpus.get("source") if isinstance(corpus, Mapping) else None
    return {SOURCE_TAG: str(source)} if source else {}


def base_name(tags: Mapping[str, str], identity: Mapping[str, Any]) -> str:
    """The name of a run that is not finished: text and shape, or study and trial."""
    if "trial" in tags and "mlflow.parentRunId" in tags:
        return f"{tags['study']}-{tags['trial']}"
    text = text_name(tags[SOURCE_TAG]) if SOURCE_TAG in tags else f"text {identity['data_sha256'][:8]}"
    return " ".join(filter(None, (text, _shape(identity["params"]), tags.get("dvc_experiment"))))


def run_name(tags: Mapping[str, str], identity: Mapping[str, Any], result: Result | None = None) -> str:
    """The name of a run, with its result if it is finished, such as `diary 3x256 0.0169 in 222 steps`."""
    name = base_name(tags, identity)
    return f"{name} {result.loss:.4f} in {result.step:,} steps" if result else name


def is_given_name(name: str, tags: Mapping[str, str], identity: Mapping[str, Any]) -> bool:
    """Whether a run still has the name that `run_name` gave it, or an earlier version of this project."""
    bases = "|".join(re.escape(base_name(known, identity)) for known in _with_and_without_text(tags))
    return re.fullmatch(rf"({bases})( [\d.]+ in [\d,]+ steps)?|{identity['fingerprint']}", name) is not None


def is_given_note(note: str, tags: Mapping[str, str], identity: Mapping[str, Any]) -> bool:
    """Whether a run still has no description, or the one that `run_note` gave it."""
    kept = "\n\n".join(part for part in note.split("\n\n") if not part.startswith(OUTCOMES))
    return not note or kept in [run_note(known, identity) for known in _with_and_without_text(tags)]


def _with_and_without_text(tags: Mapping[str, str]) -> list[Mapping[str, str]]:
    """The tags, and those that a run has if it was created where the text was not known."""
    return [tags, {key: value for key, value in tags.items() if key != SOURCE_TAG}]


def run_note(tags: Mapping[str, str], identity: Mapping[str, Any], result: Result | None = None) -> str:
    """The description of a run, in Markdown."""
    target = identity["params"].get("target", {})
    lines = [f"Training of a GPT-2{_of_shape(identity)} {_start(tags, identity)} on {_text(tags, identity)}."]
    if target:
        lines.append(f"Target: loss below {target['loss']:g} nats per token by the rule `{target['rule']}`.")
    if result:
        lines.append(f"{OUTCOMES[not result.is_met]}{_reached(result)}.")
    lines.append(
        f"The tag `fingerprint`, `{identity['fingerprint']}`, names its data, parameters and code, and its folder in "
        "`checkpoints/`. A registered model of it is among the logged models; its description says how to use it."
    )
    return "\n\n".join(lines)


def study_name(base: str, params: Mapping[str, Any], result: str = "") -> str:
    """The name of a study's run: `base`, text, shape, and what was found."""
    text = "".join(map(text_name, source_tag(params).values()))
    return " ".join(filter(None, (base, text, _shape(params), result)))


def version_note(
    name: str, tags: Mapping[str, str], identity: Mapping[str, Any], result: Result | None, metrics: Mapping[str, Any]
) -> str:
    """The description of a registered version, in Markdown; `metrics` is metrics.json, or empty."""
    lines = [f"A GPT-2{_of_shape(identity)}, trained {_start(tags, identity)} on {_text(tags, identity)}."]
    if result:
        words = "Target reached" if result.is_met else "Target not reached"
        rule = identity["params"].get("target", {}).get("rule", "batch")
        lines.append(f"{words}: {_reached(result)}, by the rule `{rule}`.")
    if (recall := metrics.get("verbatim_recall_anywhere")) is not None:
        length = metrics.get("recall_tokens", 32)
        lines.append(f"It recites {recall:.0%} of the passages of {length} tokens from anywhere in its training text.")
    return "\n\n".join([*lines, _use(name)])


def model_note(name: str, tags: Mapping[str, str], identity: Mapping[str, Any]) -> str:
    """The description of a registered model, in Markdown."""
    return "\n\n".join(
        [
            f"GPT-2 models, trained on {_text(tags, identity)}.",
            "The version with the alias `champion` is the one in use; `candidate` is the newest.",
            _use(name),
        ]
    )


def is_given_model_note(note: str, name: str, tags: Mapping[str, str], identity: Mapping[str, Any]) -> bool:
    """Whether a registered model still has no description, or the one that `model_note` gave it for some text."""
    (head, *rest), (ours, *others) = note.split("\n\n"), model_note(name, tags, identity).split("\n\n")
    return not note or (rest == others and head.startswith(ours.partition(" on ")[0]) and "\n" not in head)


def _shape(params: Mapping[str, Any]) -> str:
    model = params.get("model", {})
    return f"{model['n_layer']}x{model['n_embd']}" if model else ""


def _of_shape(identity: Mapping[str, Any]) -> str:
    model = identity["params"].get("model", {})
    return f" of {model['n_layer']} layers, {model['n_embd']} wide" if model else ""


def _start(tags: Mapping[str, str], identity: Mapping[str, Any]) -> str:
    init = tags.get("init") or identity["params"].get("model", {}).get("init")
    return f"from the published weights {init}" if init else "from scratch"


def _text(tags: Mapping[str, str], identity: Mapping[str, Any]) -> str:
    digest = f"tokens SHA-256 `{identity['data_sha256'][:16]}`"
    if SOURCE_TAG not in tags:
        return f"a text ({digest})"
    return f"{text_name(tags[SOURCE_TAG])} (`{tags[SOURCE_TAG]}`, {digest})"


def _reached(result: Result) -> str:
    return f"{result.loss:.4f} nats per token after {result.step:,} steps and {result.tokens:,} tokens"


def _use(name: str) -> str:
    return (
        f"Use, in the project's folder: `make app` for the page, `totarget generate PROMPT`, `mlflow models serve -m "
        f"models:/{name}@champion --env-manager local`, or `totarget export gguf DIR` for other programs."
    )
