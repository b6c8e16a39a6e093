"""Run the pipeline with the parameters of params.yaml: say what is due and how long it takes, and what was reached."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipeline.config.params import Params, load_params
from pipeline.config.sections import CorpusConfig, RegistryConfig
from pipeline.data.token_files import data_sha256
from pipeline.data.tokenizer import n_vocab_in, parse_tokenizer
from pipeline.ops.outcome import StageFailed, reproduce, show_outcome
from pipeline.ops.params_check import check_params
from pipeline.ops.plan import in_lines
from pipeline.ops.policy import FIXED_S
from pipeline.system.device import Machine, prepare_machine
from pipeline.system.distributed import World
from pipeline.system.files import read_json
from pipeline.system.processes import run_dvc
from pipeline.system.words import duration
from pipeline.tracking.fingerprint import IDENTITY, identify
from pipeline.training.checkpoint import checkpoint_steps
from pipeline.training.config import RunConfig
from pipeline.training.forecast import forecast, vocabulary_of
from pipeline.training.preflight import check_fits

SHOWCASE = Path("docs/showcase")  # params.yaml and the reports of the default run
STATISTICS = "corpus.json"  # of the stage `tokenize`, in reports/
SHARDED = "not known: the steps of a sharded model (train.shard) are not timed"
AFTER_TOKENIZE = "not known yet: it follows when the text is tokenized"


class Size(NamedTuple):
    """The size of a text, in tokens."""

    train: int
    held_out: int
    n_used: int  # different ids
    n_vocab: int
    is_exact: bool


def repro(force: bool, dry_run: bool) -> None:
    """Print what `dvc repro` will do and how long it takes, run it, and show what was reached.

    `force`: run every stage again; `dry_run`: only print. Raises InputError if params.yaml is not valid, and as
    `reproduce` and `show_outcome` do.
    """
    params = load_params()
    check_params(params)
    due = stages() if force else due_stages()
    size = size_of_text(params, due) if due else None
    print(in_lines(plan_of(params, due, size)), flush=True)
    if due:
        print(in_lines({"time": time_of(params, due, size)}), flush=True)
    if dry_run:
        return
    if not force and size is None and "train" in due:
        reproduce({}, "tokenize")
        due = due[due.index("train") :]
        print(in_lines({"time": time_of(params, due, size_of_text(params, due))}), flush=True)
    if due:
        reproduce({}, *["--force"] * force)
    show_outcome()


def stages() -> list[str]:
    """The names of all stages, in their order."""
    return list(_pipeline())


def due_stages() -> list[str]:
    """The stages that DVC will run, in their order: those that have changed, and all that depend on them.

    DVC skips one of the latter if what it reads turns out to be as before. Raises StageFailed if DVC fails.
    """
    if not Path("dvc.lock").is_file():
        return stages()
    done = run_dvc("status", "--json", capture_output=True)
    if done.returncode:
        print(done.stderr.strip(), file=sys.stderr)
        raise StageFailed(
            "`dvc status` failed, as it says above: fix it and repeat the command. A damaged dvc.lock may be removed: "
            "finished stages then come from DVC's cache"
        )
    changed = json.loads(done.stdout)
    due, written = list[str](), set[str]()
    for name, stage in _pipeline().items():
        if name in changed or written.intersection(stage.get("deps", [])):
            due.append(name)
            outs = [out for kind in ("outs", "metrics") for out in stage.get(kind, [])]
            written |= {out if isinstance(out, str) else next(iter(out)) for out in outs}
    return due


def _pipeline() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return found


def size_of_text(params: Params, due: list[str]) -> Size | None:
    """The size of the text by the last `tokenize`, or an estimate if its text is that of the showcase; else None."""
    corpus, share = params.section(CorpusConfig), 1.0
    statistics, n_vocab = Path("reports") / STATISTICS, parse_tokenizer(corpus.tokenizer)[1]
    if is_exact := "tokenize" not in due:
        n_vocab = n_vocab_in(Path("data/tokenizer"))
    elif (path := SHOWCASE / "params.yaml").is_file():
        known = load_params(path).section(CorpusConfig)
        if (known.source, known.tokenizer) != (corpus.source, corpus.tokenizer):
            return None
        statistics, share = SHOWCASE / STATISTICS, corpus.fraction / known.fraction
    if n_vocab is None or not statistics.is_file():
        return None
    found = read_json(statistics)
    if is_exact:
        return Size(found["tokens"], found["validation_tokens"], found["distinct_ids"], n_vocab, True)
    total = share * (found["tokens"] + found["validation_tokens"])
    held_out = round(corpus.val_fraction * total)
    n_used = min(n_vocab, round(found["distinct_ids"] * share**0.5))  # Heaps' law
    return Size(round(total) - held_out, held_out, n_used, n_vocab, False)


def plan_of(params: Params, due: list[str], size: Size | None) -> dict[str, str]:
    """What will be done, in one sentence for each topic."""
    if not due:
        return {"stages": "none is due: nothing has changed since the last run"}
    lines = {"stages": f"{', '.join(due)} {'are' if len(due) > 1 else 'is'} due"}
    if "train" in due:
        config, corpus, name = RunConfig.of(params), params.section(CorpusConfig), params.section(RegistryConfig).model
        model, windows, target = config.model, config.windows, config.target
        used = f", of which the first {100 * corpus.fraction:g}% is used" if corpus.fraction < 1 else ""
        tokens = f", {'' if size.is_exact else 'about '}{size.train:,} tokens to train on" if size else ""
        steps = f"{config.optim.max_steps(windows, size.train):,} steps" if size else "steps"
        lines |= {
            "text": f"{corpus.source}{used}{tokens}",
            "model": f"{name}: {model.n_layer} layers of {model.n_embd}, tokenizer {corpus.tokenizer}",
            "training": f"at most {config.optim.max_epochs:g} epochs, {steps} of {windows.step_windows} windows of "
            f"{windows.seq_len} tokens, until the loss is below {target.loss:g} by the rule {target.rule}",
        }
    return lines


def time_of(params: Params, due: list[str], size: Size | None) -> str:
    """How long the stages take on this machine; the steps of the training are timed for a few seconds.

    Raises OutOfSpaceError if a step does not fit into memory.
    """
    if not {"train", "evaluate"} & set(due):
        return f"less than {duration(FIXED_S)}"
    if size is None:
        return AFTER_TOKENIZE
    config = RunConfig.of(params).sized_for(size.n_vocab)
    processes = config.train.processes
    machine = prepare_machine(config.train, config.flops(size.train), World(size=processes, local_size=processes))
    vocabulary = vocabulary_of(config.model.n_ids, size.n_used, config.model.fold_vocab)
    if config.train.shard and processes > 1:
        check_fits(config, vocabulary, machine)
        return SHARDED
    cost = forecast(config, machine, vocabulary, size.train, size.held_out, min_s=0)
    others = f"about {duration(FIXED_S + cost.evaluate_s)}"
    if "train" not in due:
        return others
    n_steps = config.optim.max_steps(config.windows, size.train)
    step = resumed_step(config, machine) if size.is_exact else 0
    seconds = (1 - min(1.0, step / n_steps)) * (cost.train_s + cost.evaluation_s)
    training = f"at most {duration(seconds)} of training on this machine"
    return f"{training}{f', which resumes from step {step:,},' * bool(step)} and {others} for the other stages"


def resumed_step(config: RunConfig, machine: Machine) -> int:
    """The step of the checkpoint from which the training of data/tokens will resume; 0 without one."""
    identity = identify(data_sha256(Path("data/tokens")), config.with_weights(Path("data")).decisive, machine)
    folder = Path("checkpoints") / identity["fingerprint"]
    if not (folder / IDENTITY).is_file() or read_json(folder / IDENTITY)["environment"] != identity["environment"]:
        return 0
    return max(checkpoint_steps(folder), default=0)
