"""Plan the training of a model on a text: measure the text, choose, and say why in one line for each choice."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.config.params import Params, load_params
from pipeline.config.recipes import BASE, SPACE, recipe_values
from pipeline.config.sections import SECTIONS, TrainConfig, study_name
from pipeline.data.corpus import Fetched
from pipeline.model.published import require_tokenizer
from pipeline.ops import policy
from pipeline.ops.params_check import check_params
from pipeline.ops.policy import GENERALISE, MEMORISE, Choice, Shape, Training
from pipeline.ops.sources import REMOTE, Source, Weights, is_copied, require_room
from pipeline.ops.survey import LENGTHS, Measured, Text, corpus_config, measure, read_text, tokenizer_for
from pipeline.registry.catalog import open_registry, source_of
from pipeline.system.device import Machine, prepare_machine
from pipeline.system.distributed import World
from pipeline.system.errors import InputError, IntegrityError, ModelMissing
from pipeline.system.files import read_json
from pipeline.system.host import project_root
from pipeline.system.words import duration, in_words
from pipeline.tracking.fingerprint import flatten
from pipeline.training.config import RunConfig
from pipeline.training.forecast import Forecast, forecast, step_flops, vocabulary_of
from pipeline.training.preflight import device_bytes

PLANS = Path("plans")  # the plan of each model, NAME.json, and each params.yaml that a plan has replaced
WIDTH = 11  # of the first column of a printed plan
FAR = 3.0  # times the time that is given, from which seconds need not be measured
LONG_S = 3600.0  # a longer training gets a hint to --time, and is not followed by another one
DOUBLINGS = 2  # longer trainings after one that has not reached its target, each with twice the epochs
PUBLISHED = {"model.fold_vocab": False, "optim.name": "adamw"}  # values for a training from published weights
LONGER = "; if that does not suffice, again with twice and four times the epochs, in all up to seven times as long"


def in_lines(sentences: dict[str, str]) -> str:
    """A line for each sentence, after its topic."""
    return "\n".join(f"{topic:{WIDTH}} {sentence}" for topic, sentence in sentences.items())


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asks for; None: chosen from the text."""

    target: float | None = None
    goal: str = MEMORISE
    tokenizer: str | None = None
    size: str | None = None  # a recipe, whose model, windows and optimiser are used
    time_s: float | None = None
    column: str | None = None  # of a table
    init: str | None = None  # published weights to start from, as model.init

    @property
    def wants_the_best(self) -> bool:
        """Whether the best model is wanted, since early stopping ends the run before the target."""
        return self.goal == GENERALISE and self.target is None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The training of a model on a text, and the reasons."""

    source: Source
    text_sha256: str
    options: Options
    values: dict[str, Any]  # of params.yaml, by dotted key
    cost: Forecast
    lines: dict[str, str]  # topic -> sentence for the user
    fetched: Fetched | None = None  # the text, if it is not on this machine otherwise
    weights: Weights | None = None  # published weights to start from
    n_doublings: int = 0  # how often the epochs were doubled, at most DOUBLINGS

    def __str__(self) -> str:
        return in_lines(self.lines)

    @property
    def path(self) -> Path:
        """Where the plan is stored."""
        return PLANS / f"{self.source.name}.json"

    @property
    def may_be_longer(self) -> bool:
        """Whether a training that has not reached its target may be followed by a longer one."""
        return self.options.goal == MEMORISE and self.options.time_s is None and self.cost.train_s <= LONG_S

    def longer(self) -> "Plan":
        """The same plan with twice the epochs."""
        epochs = round(2 * self.values["optim.max_epochs"], 1)
        cost = self.cost._replace(train_s=2 * self.cost.train_s, evaluation_s=2 * self.cost.evaluation_s)
        seconds = duration(cost.train_s + cost.evaluation_s)
        lines = {
            "training": f"at most {epochs:g} epochs, {seconds}, since half of them did not reach the target",
            "cost": _cost_line(cost, self.options, self.values["corpus.fraction"]),
        }
        return dataclasses.replace(
            self,
            values=self.values | policy.budget_values(epochs),
            cost=cost,
            lines=self.lines | lines,
            n_doublings=self.n_doublings + 1,
        )


def make_plan(source: Source, options: Options, folder: Path, weights: Weights | None = None) -> Plan:
    """Read the text and plan its training. A stored plan of the same text and options is used again.

    Nothing is written but temporary files in `folder`, among them a text that was downloaded. Raises InputError if the
    text, its name, an option, the target or a section of params.yaml is not possible.
    """
    params = load_params()
    params.check(*SECTIONS)
    base = recipe_values(options.size or BASE)
    corpus, stored = corpus_config(source, options.column), stored_plan(source.name)
    _require_own_name(source, params)
    require_room(source, stored.get("copies", {}))
    text = read_text(source, corpus, folder)
    same = {"source": source.source, "text_sha256": text.sha256, "options": dataclasses.asdict(options)}
    if stored.items() >= same.items():
        values, cost, lines = stored["values"], Forecast(**stored["cost"]), stored["lines"]
        plan = Plan(source, text.sha256, options, values, cost, lines, n_doublings=stored.get("n_doublings", 0))
    else:
        plan = _new_plan(source, text, options, base, params, folder, weights)
    plan = dataclasses.replace(plan, weights=weights)
    if source.files:
        text.path.unlink()
        return plan
    fetched = Fetched(source.source, options.column, str(text.path.absolute()), text.sha256)
    return dataclasses.replace(plan, fetched=fetched)


def stored_plan(name: str) -> dict[str, Any]:
    """The stored plan of a model; empty if there is none."""
    return dict(read_json(path, "remove it")) if (path := PLANS / f"{name}.json").is_file() else {}


def _require_own_name(source: Source, params: Params) -> None:
    """Raise InputError if a plan, a params.yaml or a registered model has the model's name for another text.

    A text that was moved is the same if it is equal to its copies in texts/. A registry that cannot be read is not
    asked.
    """
    if stored := stored_plan(source.name):
        others = [stored["source"] if is_copied(source) or not source.copies else stored["origin"]]
    else:
        read = [flatten(each.values) for each in (params, *map(load_params, sorted(PLANS.glob("params-*.yaml"))))]
        others = [values.get("corpus.source") for values in read if values.get("registry.model") == source.name]
        if not others:
            with suppress(ModelMissing, IntegrityError):
                others = [source_of(open_registry(project_root()), source.name) or source.source]
    for other in others:
        if not any(_is_same_place(str(other), own) for own in (source.origin, source.source)):
            text = stored.get("source", other)
            text += f", a copy of {other}" * (text != other)
            raise InputError(f"the model name {source.name} belongs to the text {text}: choose another --name")


def _is_same_place(one: str, other: str) -> bool:
    """Whether two sources are the same URL, or paths to the same place by any spelling."""
    is_local = not (REMOTE.match(one) or REMOTE.match(other))
    return one == other or (is_local and Path(one).resolve() == Path(other).resolve())


def _new_plan(
    source: Source,
    text: Text,
    options: Options,
    base: dict[str, Any],
    params: Params,
    folder: Path,
    weights: Weights | None,
) -> Plan:
    """Plan for the whole text; if it does not fit into the time, plan again for the part that does.

    Again, because a tokenizer that is trained on a shorter text has fewer ids.
    """
    share, shape = 1.0, _shape_of(base) if options.size else None
    if weights:
        base |= PUBLISHED | {"model.init": weights.init}
        shape = policy.shape_of_published(*(weights.published.shape[key] for key in ("n_layer", "n_head", "n_embd")))
    for attempt in (1, 2):
        lengths = (base["windows.seq_len"],) if options.size else LENGTHS
        first, asked = text.first(share), options.tokenizer or ("gpt2" if weights else None)
        tokenizer, measured = _choose_tokenizer(first, asked, folder / str(attempt), lengths)
        if weights:
            tokenizer = tokenizer if options.tokenizer else tokenizer._replace(why="that of GPT-2's weights")
            ours = tokenizer_for(first, tokenizer.value, folder / str(attempt))
            require_tokenizer(
                weights.published, ours, text.sample[:100_000].partition(b"\0")[0].decode(errors="ignore")
            )
        if not measured.lowest_loss and options.goal == MEMORISE:
            raise InputError(
                f"the text has {measured.n_tokens:,} tokens, too few for a window ({min(lengths) + 1:,} are needed): "
                "give more text" + " or another --size" * bool(options.size)
            )
        target, training_on, bound = _goal(measured, options, shape)
        costs = Costs(params, base, measured, options.goal, target)
        training = training_on(measured.n_tokens)
        if options.time_s is not None:
            training = _fit(options.time_s, training, training_on, costs)
        if training.n_tokens >= measured.n_tokens:
            break
        share *= training.n_tokens / measured.n_tokens
    share = 1.0 if share >= 1 else float(f"{share:.2g}")
    values = base | policy.values_of(training, options.goal, target) | _text_values(source, tokenizer, share, target)
    values |= {"corpus.column": options.column, "registry.require_target": not options.wants_the_best}
    cost = costs.of(training)
    check_params(_merged(params, values))
    plan = Plan(source, text.sha256, options, values, cost, {})
    lines = {
        "text": _text_line(source, text, measured, share),
        "tokenizer": f"{tokenizer.value}: {tokenizer.why}",
        "lowest loss": bound,
        **({"weights": _weights_line(weights)} if weights else {}),
        "model": _model_line(training, measured, f"the recipe {options.size}" if options.size else options.init),
        "training": _training_line(training, options.goal, target, measured) + LONGER * plan.may_be_longer,
        "cost": _cost_line(cost, options, share),
        "space": _space_line(cost, costs.machine),
        "name": f"{source.name}, for the page, generate, models and export",
    }
    return dataclasses.replace(plan, lines=lines)


class Costs:
    """Forecasts of trainings on a text; the steps of each shape are timed once."""

    def __init__(self, params: Params, base: dict[str, Any], measured: Measured, goal: str, target: float) -> None:
        self.params, self.base, self.measured, self.goal, self.target = params, base, measured, goal, target
        train = params.section(TrainConfig)
        if train.shard and train.processes > 1:
            raise InputError("train.shard: the steps of a sharded model cannot be timed for a plan: set it to false")
        self.vocabulary = vocabulary_of(measured.n_vocab, measured.n_used, base["model.fold_vocab"])
        self.machine = prepare_machine(train, world=World(size=train.processes, local_size=train.processes))
        self._timed: dict[Shape, tuple[Training, Forecast]] = {}

    def of(self, training: Training) -> Forecast:
        """The cost of a training, in proportion to the tokens of the first one of its shape, which is timed."""
        if training.shape not in self._timed:
            held_out = training.n_held_out
            tokens = training.n_tokens - held_out
            found = forecast(self._config_of(training), self.machine, self.vocabulary, tokens, held_out)
            self._timed[training.shape] = training, found
        first, cost = self._timed[training.shape]
        share = training.n_tokens / first.n_tokens
        return cost._replace(
            train_s=training.steps * cost.step_s,
            evaluation_s=share * cost.evaluation_s,
            evaluate_s=share * cost.evaluate_s,
        )

    def seconds_within(self, training: Training, time_s: float) -> float:
        """Seconds of all stages; only estimated from the FLOPs of another shape if they are far above `time_s`."""
        if training.shape not in self._timed and self._timed:
            first, cost = next(iter(self._timed.values()))
            estimate = training.steps * cost.step_s * self._step_flops(training) / self._step_flops(first)
            if estimate > FAR * time_s:
                return estimate
        cost = self.of(training)
        return cost.train_s + cost.evaluation_s + cost.evaluate_s + policy.FIXED_S

    def _config_of(self, training: Training) -> RunConfig:
        values = self.base | policy.values_of(training, self.goal, self.target)
        return RunConfig.of(_merged(self.params, values)).sized_for(self.measured.n_vocab)

    def _step_flops(self, training: Training) -> int:
        return step_flops(self._config_of(training), self.vocabulary.n_rows)


def _merged(params: Params, values: dict[str, Any]) -> Params:
    """The parameters as they are when `values` are written, without ranges that the user has removed."""
    present = flatten(params.values)
    return params.with_values({key: values[key] for key in values if key in present or not key.startswith(SPACE)})


def _choose_tokenizer(text: Text, asked: str | None, folder: Path, lengths: Sequence[int]) -> tuple[Choice, Measured]:
    """The tokenizer, and the text in its ids. Raises InputError if the tokenizer that is `asked` for cannot be made."""
    if asked is not None:
        return Choice(asked, "as given"), measure(text, asked, folder, lengths)

    @cache
    def with_tokenizer(name: str) -> Measured | None:
        try:
            return measure(text, name, folder, lengths)
        except (InputError, IntegrityError):
            return None

    def tokens_with(name: str) -> int | None:
        return found.n_tokens if (found := with_tokenizer(name)) else None

    choice = policy.choose_tokenizer(text.n_bytes, text.characters * text.scale, text.ascii_share, tokens_with)
    return choice, with_tokenizer(choice.value) or measure(text, choice.value, folder, lengths)


def _shape_of(recipe: dict[str, Any]) -> Shape:
    """The shape of a recipe's model."""
    step_tokens = recipe["windows.seq_len"] * recipe["windows.micro_batch_size"]
    step_tokens *= recipe["windows.gradient_accumulation_steps"]
    n_layer, n_head, n_embd = (recipe[f"model.{key}"] for key in ("n_layer", "n_head", "n_embd"))
    return Shape(n_layer, n_head, n_embd, step_tokens, math.inf, recipe["optim.lr"], recipe["optim.muon_lr"])


def _goal(measured: Measured, options: Options, shape: Shape | None) -> tuple[float, Callable[[int], Training], str]:
    """The target, the training on so many tokens of the text, and a sentence about the lowest possible loss."""
    bits = measured.entropy / math.log(2)
    if options.goal == MEMORISE:
        ambiguity = measured.ambiguity(measured.n_tokens)
        seq_len, target = policy.window_and_target(measured.lowest_loss, ambiguity, options.target)
        bound = f"{measured.lowest_loss[seq_len]:.3f} nats a token from anywhere, in windows of {seq_len} tokens"
        if options.target is None and target > policy.DEFAULT_TARGET:
            bound += f": the text repeats itself, so the target is {target:g} instead of {policy.DEFAULT_TARGET:g}"
        if target < policy.LOWEST_REACHED:
            bound += f"; but no training here has reached less than {policy.LOWEST_REACHED:g} yet"
        return target, lambda n: policy.memorise(n, bits, seq_len, target, measured.ambiguity(n), shape), bound
    counts = measured.loss_of_counts(policy.HELD_OUT)
    target = policy.held_out_target(measured.n_tokens, counts, options.target, published=options.init is not None)
    seq_len = policy.held_out_window(measured.lowest_loss)
    bound = f"not known for the held-out text; counts of n-grams reach {counts:.2f} nats a token on it"
    return target, lambda n: policy.generalise(n, bits, seq_len, shape), bound


def _fit(time_s: float, whole: Training, training_on: Callable[[int], Training], costs: Costs) -> Training:
    """The training on as much of the text as fits into the time; InputError if too little of it does."""
    least = training_on(min(policy.LEAST_TOKENS, whole.n_tokens))
    least_s = costs.seconds_within(least, time_s)

    def seconds_of(training: Training) -> float:
        return costs.seconds_within(training, time_s)

    if (fitted := policy.largest_within(time_s, whole.n_tokens, training_on, seconds_of)) is None:
        raise InputError(
            f"--time {duration(time_s)}: the text is too large for it, its first {least.n_tokens:,} tokens take "
            f"{duration(least_s)}, and all of it {duration(seconds_of(whole))}: allow more time, or name a shorter text"
        )
    return fitted


def _text_values(source: Source, tokenizer: Choice, share: float, target: float) -> dict[str, Any]:
    return {
        "corpus.source": source.source,
        "corpus.sha256": None,
        "corpus.mirrors": [],
        "corpus.tokenizer": tokenizer.value,
        "corpus.fraction": share,
        "samples.prompts": None,
        "registry.model": source.name,
        "registry.max_target_loss": max(policy.HIGHEST_TARGET, target),
        "registry.replace_champion": True,  # the last text that was learnt under a name is the one that is wanted
        "sweep.study": study_name(source.name),
    }


def _text_line(source: Source, text: Text, measured: Measured, share: float) -> str:
    documents = f"{text.n_documents:,} documents, " if text.n_documents > 1 else ""
    used = "" if share == 1 else f"of which the first {100 * share:g}% is learnt, "
    about = "about " if share < 1 or text.scale > 1 else ""
    notes = "".join(f"; {note}" for note in text.notes if " documents in " not in note)
    return (
        f"{source.source}: {documents}{text.n_bytes:,} bytes, {used}{about}{measured.n_tokens:,} tokens, "
        f"{measured.n_used:,} different ones{notes}"
    )


def _weights_line(weights: Weights) -> str:
    published = weights.published
    place = f", copied to {weights.init}" if weights.copies else ""
    if published.commit:
        n_bytes = published.download_bytes
        place = f", {in_words(n_bytes, 'B')} to download" if n_bytes else ", in the cache of the Hub"
    return f"{published.name}: {published.config.n_params:,} parameters to start from{place}"


def _model_line(training: Training, measured: Measured, given: str | None) -> str:
    shape, bits = training.shape, training.n_tokens * measured.entropy / math.log(2)
    measured_size = "the size that learnt such texts in the fewest seconds"
    larger = "a size with the capacity for such a text, which was not measured"
    why = f"as in {given}" if given else measured_size if shape.max_bits <= policy.MEASURED_BITS else larger
    if bits > shape.capacity_bits:
        why += ", but too small to memorise all of it"
    return (
        f"{shape.n_layer} layers of {shape.n_embd}, {why}: its blocks can memorise "
        f"{in_words(shape.capacity_bits, 'bit')} ({policy.BITS_PER_PARAMETER} a parameter), the text has "
        f"{in_words(bits, 'bit')}"
    )


def _training_line(training: Training, goal: str, target: float, measured: Measured) -> str:
    steps = f"{training.steps:,} steps of {training.step_windows} windows of {training.seq_len} tokens"
    until = (
        f"until its loss from anywhere in the text is below {target:g}"
        if goal == MEMORISE
        else f"until its loss on the last tenth of the text, which is held out, is below {target:.3g} or falls no more"
    )
    factor = policy.repetition_factor(measured.ambiguity(training.n_tokens)) if goal == MEMORISE else 1.0
    repeated = (
        f" ({factor:.1f} times as many as usual, since the text repeats its passages)"
        if factor > policy.REPEATED
        else ""
    )
    return f"at most {training.max_epochs:g} epochs{repeated}, {steps}, {until}"


def _cost_line(cost: Forecast, options: Options, share: float) -> str:
    seconds = cost.train_s + cost.evaluation_s
    line = (
        f"at most {duration(seconds)} of training on this machine, and about "
        f"{duration(policy.FIXED_S + cost.evaluate_s)} for the other stages"
    )
    if options.time_s is not None and share < 1:
        return f"{line}; the rest of the text is too large for {duration(options.time_s)}"
    if options.time_s is None and seconds > LONG_S:
        return f"{line}; --time 10m learns the part of the text that fits into ten minutes"
    return line


def _space_line(cost: Forecast, machine: Machine) -> str:
    memory = device_bytes(cost.memory_bytes, machine)
    return f"{in_words(memory, 'B')} of memory, {in_words(cost.disk_bytes, 'B')} of disk"
