"""The consumers of a step's record: evaluation, samples and checkpoints."""

import math
import time
from collections.abc import Callable

from pipeline.data.openings import openings
from pipeline.model.evaluate import LOSSES, text_loss
from pipeline.model.generator import Generator
from pipeline.model.sampling import Sampling
from pipeline.system.errors import DivergedError
from pipeline.system.files import write_text
from pipeline.system.signals import StopSignals, interrupted
from pipeline.tracking.journal import StepRecord
from pipeline.training.checkpoint import keep_newest, save_checkpoint
from pipeline.training.extension import plateau_end
from pipeline.training.run import Run
from pipeline.training.target import RULES, best_step, evaluation_is_due

N_PROMPTS = 2  # of a sample, if params.yaml names none
Consumer = Callable[[StepRecord], None]  # called after each step; an exception ends the run


def evaluate(run: Run, record: StepRecord) -> None:
    """Compute the loss that the target rule needs when an evaluation is due, and all losses after the last step.

    Unless `target.eval_interval` is given, an evaluation that is due ends early where the loss is clearly above the
    target.
    """
    target, held_out = run.config.target, run.text.validation
    parts = {"train": run.text.train, "val": held_out}
    texts = {name: (text, windows) for name, (part, windows) in LOSSES.items() if (text := parts[part]) is not None}

    def measure(name: str, limit: float | None = None) -> None:
        if getattr(record, name) is None:
            run.state.model.eval()
            (text, windows), length = texts[name], run.config.windows.seq_len
            found = text_loss(
                run.state.model, text, windows(text.size, length), length, run.machine.autocast(), run.world, limit
            )
            if not math.isfinite(found.loss):
                raise DivergedError(
                    f"{name} is {found.loss} after step {record.step}, lr {record.lr:.3g}: the last checkpoint is "
                    "kept; try a smaller optim.lr or a longer optim.warmup"
                )
            setattr(record, name if found.complete else "loss_estimate", found.loss)

    if evaluation_is_due(run.records, run.steps_per_epoch, held_out is not None, target):
        if held_out is not None:
            measure("validation_loss")
        measure(RULES[target.rule].loss, None if target.eval_interval else target.loss)
    if run.finished:
        for name in texts:
            measure(name)


def sample(run: Run, record: StepRecord) -> None:
    """Write completions of the prompts to the run's folder `samples`, from which the recorder uploads them."""
    config = run.config.samples
    if not run.finished and (config.interval_steps == 0 or record.step % config.interval_steps):
        return
    model = run.state.whole_model()
    if model is None or not run.world.is_main:
        return
    tokenizer, tokens = run.text.tokenizer, run.text.train.tokens
    prompts = openings(tokens, tokenizer, N_PROMPTS) if config.prompts is None else config.prompts
    is_copy = model.wte.weight.device.type != run.machine.device.type  # a sharded model's, on the CPU
    generator = Generator(model, tokenizer, precision="fp32" if is_copy else run.machine.precision)
    greedy = Sampling(max_tokens=config.max_tokens, temperature=0)
    texts = [generator.text(prompt, greedy) for prompt in prompts]
    write_text(run.folder / "samples" / f"step-{record.step:06d}.txt", "\n\n---\n\n".join(texts) + "\n")


class Checkpoints:
    """Save a checkpoint at fixed intervals of steps or seconds, at the best step, after a signal and at the end.

    A run with a larger budget may start from the last step, or from the last one before the decay of its schedule. It
    needs that checkpoint and the best one up to there. So these are kept, and also the best of those before the newest.

    The interval in seconds is measured by rank 0. A signal received by one process stops all processes.
    """

    def __init__(self, run: Run, stop: StopSignals) -> None:
        self.run, self.stop = run, stop
        self._saved = time.perf_counter()
        self._plateau_end = plateau_end(run.config.optim, run.config.windows, run.text.train.size)

    def save(self, record: StepRecord) -> None:
        """Save if a checkpoint is due. Raises Interrupted after a signal, unless the run is finished."""
        run, config = self.run, self.run.config.checkpoint
        is_due = record.step == self._plateau_end or (
            config.interval_steps and record.step % config.interval_steps == 0
        )
        is_late = run.world.is_main and time.perf_counter() - self._saved >= config.interval_s
        signal, any_late = run.world.largest(self.stop.received or 0, is_late)
        if is_due or any_late or signal or run.finished or self._is_best(record):
            tensors = run.state.tensors()
            if run.journal:
                run.journal.sync()
                save_checkpoint(run.folder, record.step, tensors, run.state.scalars())
                best = {best_step(run.records[:n], run.config.target) for n in (-1, self._plateau_end)}
                keep_newest(run.folder, record.step, 2, also={self._plateau_end, *best})
            self._saved = time.perf_counter()
        if signal and not run.finished:
            raise interrupted(signal, f"at step {record.step} of {run.max_steps}, all saved in {run.folder}")

    def _is_best(self, record: StepRecord) -> bool:
        target = self.run.config.target
        is_evaluated = getattr(record, RULES[target.rule].loss) is not None
        return is_evaluated and best_step(self.run.records, target) == record.step
