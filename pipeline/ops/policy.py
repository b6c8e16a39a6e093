"""Choose tokenizer, model and training for a text, as pure functions of what was measured, and say why."""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from pipeline.system.errors import InputError

MEMORISE, GENERALISE = "memorise", "generalise"
GOALS = (MEMORISE, GENERALISE)
DEFAULT_TARGET = 0.02  # nats per token, of the goal memorise: most passages are then recited word for word
HIGHEST_TARGET = 0.1  # of a champion; the default where a text repeats itself
HELD_OUT = 0.1  # share of the text, for the goal generalise
MIN_HELD_OUT = 2_000  # tokens of a text of which a tenth is held out
BELOW_COUNTS = 0.75  # of the loss of n-gram counts on the held-out text: a network from scratch does not get below it
BELOW_COUNTS_PUBLISHED = 0.25  # the same of published weights: a model that knows the language gets further
BITS_PER_PARAMETER = 3.6  # that a GPT memorises at most (arXiv 2505.24832)
LOWEST_REACHED = 0.009  # nats per token from anywhere in a text (RECORDS.md)
LEAST_TOKENS = 1_000  # of a text: with --time, no fewer are learnt
MARGIN = 1.25  # a target is at least this multiple of the lowest possible loss
DEFAULT_MARGIN = 2.0  # the same of DEFAULT_TARGET; not measured
FIXED_S = 45.0  # seconds of the other stages: imports, evaluation, figures, registration
MICRO_BATCH_TOKENS = 8192  # at most
REPEATED = 1.1  # a text that needs so many times as many epochs as usual is said to repeat its passages
MOST_REPEATED = 4.0  # times as many epochs for a text that repeats its passages; no text that needs more was measured
PUBLISHED_LR = 0.1  # of AdamW for published weights, divided by the model's width: 1.3e-4 for GPT-2; not measured
SEARCHED = (0.75, 1.1)  # range of a sweep, as shares of the training budget
SEARCHED_LR, SEARCHED_MUON_LR = (0.4, 4.0), (1 / 3, 5 / 3)  # the same of the learning rates


class Choice(NamedTuple):
    """A value, and the reason for it."""

    value: Any
    why: str


# The tokenizer

MIN_GPT2_BYTES = 3.0  # bytes of text in a token, from which GPT-2's tokenizer is used
MIN_ASCII = 0.8  # share of the text's bytes; below it GPT-2's tokenizer is not tried
BPE_SIZES = (512, 1024, 2048, 4096, 8192, 16384)
CHARACTERS_PER_ID = 32  # of a text, for each id of a tokenizer that is trained on it
FEWER = 0.7  # tokens of a byte-pair encoding for each character, at most; with more, characters are used


def choose_tokenizer(
    n_bytes: float, characters: float, ascii_share: float, tokens_with: Callable[[str], float | None]
) -> Choice:
    """The tokenizer that gives few tokens, each of which occurs often enough to be learnt.

    `tokens_with`: number of tokens of the text with a tokenizer, None if it cannot be made; called only if needed.
    """
    n_gpt2: float | None = None
    if ascii_share < MIN_ASCII:
        why = f"{100 * (1 - ascii_share):.0f}% of the bytes are not ASCII, for which GPT-2's tokens are too short"
    elif (n_gpt2 := tokens_with("gpt2")) is None:
        why = "GPT-2's tokenizer could not be downloaded"
    else:
        gpt2 = Choice("gpt2", f"{n_bytes / n_gpt2:.1f} bytes of this text a token")
        if n_bytes >= MIN_GPT2_BYTES * n_gpt2:
            return gpt2
        why = f"GPT-2's tokens have only {n_bytes / n_gpt2:.1f} bytes of this text"
    for size in reversed(BPE_SIZES):
        if size * CHARACTERS_PER_ID <= characters and (n := tokens_with(name := f"bpe:{size}")) is not None:
            if n > FEWER * characters:
                break
            if n_gpt2 is not None and n_gpt2 <= n:
                return gpt2
            return Choice(name, f"{why}, and tokens that are trained on it have {n_bytes / n:.1f}")
    if n_gpt2 is not None and n_gpt2 <= FEWER * characters:
        return gpt2
    return Choice("chars", f"{why}, and the text is too short to train longer ones")


# The model and its training


class Shape(NamedTuple):
    """The blocks of a model, and how they are trained."""

    n_layer: int
    n_head: int
    n_embd: int
    step_tokens: int
    max_bits: float  # of a text; for a longer text the next shape needs fewer seconds
    lr: float = 0.01
    muon_lr: float = 0.024

    @property
    def capacity_bits(self) -> float:
        """Bits that the blocks can memorise at most."""
        return BITS_PER_PARAMETER * 12 * self.n_layer * self.n_embd**2


MEASURED_BITS = 1e6  # of a text, up to which shapes were measured

# The first three were measured with texts of 3 kbit to .5 Mbit (benchmarks/LOG.md). The others have a capacity of eight
# times the bits of the text and more; rates and steps are those of the recipes of this size.
SHAPES = (
    Shape(2, 2, 128, 256, 4e4),
    Shape(2, 4, 256, 512, 2e5),
    Shape(2, 8, 512, 2048, 1e6, 0.005),
    Shape(6, 6, 384, 2048, 4.5e6, 0.01, 0.026),
    Shape(8, 8, 512, 4096, 1e7, 0.01),
    Shape(12, 12, 768, 6144, 3.5e7, 0.003, 0.02),
    Shape(24, 16, 1024, 6144, 1.2e8, 0.002, 0.02),
    Shape(36, 20, 1280, 6144, 3e8, 0.0015, 0.02),
)


class Training(NamedTuple):
    """What is trained, on how many tokens of the text."""

    shape: Shape
    seq_len: int
    n_tokens: int  # of the text that is used, with what is held out
    max_epochs: float  # of the training split
    n_held_out: int = 0

    @property
    def step_windows(self) -> int:
        return max(1, self.shape.step_tokens // self.seq_len)

    @property
    def steps(self) -> int:
        return math.ceil(self.max_epochs * (self.n_tokens - self.n_held_out) / (self.step_windows * self.seq_len))


def shape_for(n_bits: float) -> Shape:
    """The shape for a text of so many bits; the largest one if none has the capacity."""
    return next((shape for shape in SHAPES if n_bits <= shape.max_bits), SHAPES[-1])


def shape_of_published(n_layer: int, n_head: int, n_embd: int) -> Shape:
    """The shape of published weights, with the step of the measured shape that is as wide."""
    like = next((shape for shape in SHAPES if n_embd <= shape.n_embd), SHAPES[-1])
    lr = float(f"{PUBLISHED_LR / n_embd:.2g}")
    return Shape(n_layer, n_head, n_embd, like.step_tokens, math.inf, lr, like.muon_lr)


def repetition_factor(ambiguity: float) -> float:
    """How many times as many epochs a text needs whose passages have this ambiguity, in nats (benchmarks/LOG.md)."""
    return min(1 + ambiguity + ambiguity**2, MOST_REPEATED)


def epochs_to_memorise(n_tokens: int, step_tokens: int, target: float, ambiguity: float) -> float:
    """Epochs of the training budget: about a fifth more than texts of 285 to 34,219 tokens needed (benchmarks/LOG.md).

    A target that is lower by a factor of ten needs 30% more. A text that repeats its passages needs more, by their
    `ambiguity`. A budget has 120 steps at least.
    """
    epochs = 13 * math.pow(max(1.0, 34_000 / n_tokens), 0.23) * repetition_factor(ambiguity)
    epochs *= 1 + 0.3 * max(0.0, math.log10(HIGHEST_TARGET / target))
    return round(max(epochs, 120 * step_tokens / n_tokens), 1)


def epochs_to_generalise(n_tokens: int) -> float:
    """Epochs after which a validation loss rises again, approximately; early stopping ends the run before."""
    return round(max(1.0, 10 * math.pow(15_000 / n_tokens, 0.25)), 1)


def window_and_target(lowest_loss: dict[int, float], ambiguity: float, target: float | None) -> tuple[int, float]:
    """The shortest window, of 64 tokens or more, in which the target is possible, and the target.

    Without a target it is DEFAULT_TARGET, or at least HIGHEST_TARGET if the text repeats itself: the first budget may
    not suffice for less (benchmarks/LOG.md). Raises InputError if the target is not possible.
    """
    _require_positive(target)
    lengths = [T for T in lowest_loss if T >= 64] or list(lowest_loss)
    T = next((T for T in lengths if (target or HIGHEST_TARGET) >= MARGIN * lowest_loss[T]), lengths[-1])
    possible = math.ceil(100 * MARGIN * lowest_loss[T]) / 100
    if target is None:
        repeats = repetition_factor(ambiguity) > REPEATED or DEFAULT_MARGIN * lowest_loss[T] > DEFAULT_TARGET
        return T, max(possible, HIGHEST_TARGET if repeats else DEFAULT_TARGET)
    if target < MARGIN * lowest_loss[T]:
        raise InputError(
            f"--target {target:g} is not possible: the text repeats itself, and in windows of {T} tokens no model gets "
            f"below {lowest_loss[T]:.3f}: choose {possible:g} or more"
        )
    return T, target


def _require_positive(target: float | None) -> None:
    if target is not None and not 0 < target < math.inf:
        raise InputError(f"--target {target:g}: give a loss above 0, in nats per token")


def held_out_target(n_tokens: int, counts: float, target: float | None, published: bool = False) -> float:
    """The validation loss to reach; by default one that the text is too short for, so that early stopping ends the run.

    `counts`: loss of n-gram counts on the held-out text; `published`: training starts from published weights, for which
    no target is too low. Raises InputError if the text is too short for the target.
    """
    _require_positive(target)
    if n_tokens < MIN_HELD_OUT:
        raise InputError(
            f"the text has {n_tokens:,} tokens, too few to hold out a tenth ({MIN_HELD_OUT:,} are needed): "
            "give more text, or --goal memorise"
        )
    lowest = round((BELOW_COUNTS_PUBLISHED if published else BELOW_COUNTS) * counts, 2)
    if target is not None and target < lowest and not published:
        raise InputError(
            f"--target {target:g}: the text is too small for it, counts of n-grams reach {counts:.2f} on the held-out "
            f"tenth and a network about {lowest:g}: give more text, a higher target, or --goal memorise"
        )
    return target or lowest


def held_out_window(lengths: Collection[int]) -> int:
    """Tokens in a window: 128, or the most that the text has; of a recipe with a longer window, that."""
    return max((T for T in lengths if T <= 128), default=min(lengths))


def memorise(
    n_tokens: int, entropy_bits: float, seq_len: int, target: float, ambiguity: float, shape: Shape | None = None
) -> Training:
    """The training that memorises `n_tokens` of a text.

    `entropy_bits`: of a token by itself; `ambiguity`: of passages, in nats.
    """
    shape = shape or shape_for(n_tokens * entropy_bits)
    return Training(shape, seq_len, n_tokens, epochs_to_memorise(n_tokens, shape.step_tokens, target, ambiguity))


def generalise(n_tokens: int, entropy_bits: float, seq_len: int, shape: Shape | None = None) -> Training:
    """The training on `n_tokens` of a text, of which a tenth is held out."""
    shape = shape or shape_for(n_tokens * entropy_bits)
    n_train = round(n_tokens * (1 - HELD_OUT))
    return Training(shape, seq_len, n_tokens, epochs_to_generalise(n_train), n_tokens - n_train)


def largest_within(
    time_s: float,
    n_tokens: int,
    training_on: Callable[[int], Training],
    seconds_of: Callable[[Training], float],
) -> Training | None:
    """The training on the most tokens of the text that takes at most `time_s`; None if LEAST_TOKENS do not fit.

    `training_on`: the training on so many tokens; `seconds_of`: its seconds.
    """
    n = float(n_tokens)
    while n >= min(LEAST_TOKENS, n_tokens):
        if seconds_of(training := training_on(int(n))) <= time_s:
            return training
        n *= 0.95
    return None


def dropout_for(shape: Shape, goal: str) -> float:
    """Dropout for a held-out loss: the larger the text, the less; none to memorise."""
    if goal == MEMORISE or shape.max_bits > 3.5e7:
        return 0.0
    return 0.2 if shape.max_bits < 4.5e6 else 0.1


def _searched_values(training: Training) -> dict[str, Any]:
    """The values of params.yaml for the ranges that a sweep searches around a training, but for its budget."""
    shape, T, windows = training.shape, training.seq_len, training.step_windows
    ranges = {"lr": (shape.lr, SEARCHED_LR), "muon_lr": (shape.muon_lr, SEARCHED_MUON_LR)}
    ends = {
        f"sweep.space.optim.{name}.{end}": float(f"{share * rate:.2g}")
        for name, (rate, shares) in ranges.items()
        for end, share in zip(("low", "high"), shares, strict=True)
    }
    steps = sorted({T * n for n in (max(1, windows // 2), windows, 2 * windows)})
    return {**ends, "sweep.space.windows.step_tokens": steps}


def budget_values(max_epochs: float) -> dict[str, Any]:
    """The values of params.yaml for a training budget: the budget, and the range that a sweep searches around it."""
    low, high = (round(share * max_epochs, 1) for share in SEARCHED)
    space = "sweep.space.optim.max_epochs"
    return {"optim.max_epochs": max_epochs, f"{space}.low": low, f"{space}.high": high}


def values_of(training: Training, goal: str, target: float) -> dict[str, Any]:
    """The values of params.yaml for a training, by dotted key."""
    shape, T, windows = training.shape, training.seq_len, training.step_windows
    parts = next(n for n in range(1, windows + 1) if windows % n == 0 and windows // n * T <= MICRO_BATCH_TOKENS)
    held_out = goal == GENERALISE
    return {
        "corpus.val_fraction": HELD_OUT if held_out else 0.0,
        "model.n_layer": shape.n_layer,
        "model.n_head": shape.n_head,
        "model.n_embd": shape.n_embd,
        "model.block_size": T,
        "model.dropout": dropout_for(shape, goal),
        "windows.seq_len": T,
        "windows.micro_batch_size": windows // parts,
        "windows.gradient_accumulation_steps": parts,
        "windows.order": "jittered",
        "optim.lr": shape.lr,
        "optim.muon_lr": shape.muon_lr,
        **budget_values(training.max_epochs),
        **_searched_values(training),
        "optim.warmup": 0.02,
        "target.loss": target,
        "target.rule": "validation" if held_out else "sliding",
        "target.eval_interval": max(1, training.steps // 20) if held_out else None,
        "target.early_stopping_patience": 4 if held_out else None,
    }
