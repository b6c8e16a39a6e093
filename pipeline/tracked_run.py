"""tracked_run: one training run, composed -> data, loop, target, samples, checkpoints, journal, MLflow, resume.

The stage `train` calls `run_tracked`, a trial of the sweep what that is made of: `open_run` and `follow`. A run goes
on from the newest checkpoint of the same fingerprint, steps until the target rule is met or the budget is spent, and
leaves the model whose corpus loss was lowest.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.checkpoint import is_intact, keep_newest, load_checkpoint, newest_valid, save_checkpoint, save_model
from pipeline.config import Params
from pipeline.errors import IntegrityError
from pipeline.evaluate import corpus_loss
from pipeline.files import locked, write_json, write_text
from pipeline.fingerprint import Identity, identify
from pipeline.generate import Generator
from pipeline.interrupt import StopSignals
from pipeline.journal import STEPS, TIMES, Journal, StepRow, TimeRow, write_rows
from pipeline.machine import Machine, prepare_machine
from pipeline.memory import check_fits
from pipeline.progress import Progress
from pipeline.run_config import RunConfig
from pipeline.run_folder import claim_folder, tell_what_is_new
from pipeline.sampling import Sampling
from pipeline.store import project_root
from pipeline.target import RULES, check_is_worth_it, first_met, is_met
from pipeline.text import Text
from pipeline.timing import flops_per_token, time_report, utilisation
from pipeline.tracking import Recorder
from pipeline.train import StepRecord, TrainState, fresh_state, train_steps
from pipeline.windows import steps_of, steps_per_pass

RESUMES = "resumes"  # a line with the step for each time that the run went on


def run_tracked(params: Params, data: Path, models: Path, timing: Path) -> None:
    """Train as `params` say on `data`/tokens; write the model, run.json and the journal to `models`, times to `timing`.

    Raises Interrupted after a signal, everything saved; DivergedError where the loss is not finite; RunLocked where
    another process trains the same run.
    """
    config = RunConfig.of(params)
    machine = prepare_machine(config.train, config.flops)
    text = Text.read(data / "tokens", data / "bpe", config, machine)
    root = project_root()
    with StopSignals() as stop, open_run(config, machine, text, root / "checkpoints") as run:
        if run.finished:
            print(f"the run is finished, at step {run.state.step}: nothing to train")
        else:
            if run.state.step == 0:
                tell_what_is_new(run.folder, run.identity)
            progress = Progress(run.state.step, run.state.tokens, run.max_steps, config.target.loss)
            with Recorder(root, run.folder, dict(run.identity), config.origin(params)), progress:
                run.follow(stop, progress.show)
        run.write_results(models, data / "bpe", timing)


@contextmanager
def open_run(config: RunConfig, machine: Machine, text: Text, home: Path) -> Iterator["TrackedRun"]:
    """Hold the folder in `home` of the run that these make, and yield the run, as far as it had come.

    Raises OutOfSpaceError where a step would not fit into memory; RunLocked where another process trains the same run.
    """
    check_fits(config, text.vocabulary, machine)
    identity = identify(text.data_sha256, config.decisive, machine)
    folder = home / identity["fingerprint"]
    with locked(folder.with_suffix(".lock")):
        claim_folder(folder, identity)
        run = TrackedRun(config, machine, text, folder, identity)
        try:
            yield run
        finally:
            run.journal.close()


class TrackedRun:
    """A run in its folder: state, journal, and what happens between two steps."""

    def __init__(self, config: RunConfig, machine: Machine, text: Text, folder: Path, identity: Identity) -> None:
        self.config, self.machine, self.text, self.folder, self.identity = config, machine, text, folder, identity
        self.max_steps = config.optim.max_steps(config.windows)
        self.steps_per_pass = steps_per_pass(len(text.train), config.windows)
        self.state: TrainState = fresh_state(config.model, text.vocabulary, config.optim, config.train, machine)
        self.state.model.trained_length = config.windows.length
        self.journal = Journal(folder)
        self._resume()
        self.rows: list[StepRow] = self.journal.steps[: self.state.step]
        self._wall_before_s = self.journal.times[-1]["wall_s"] if self.journal.times else 0.0
        self._started = self._saved = time.perf_counter()

    def follow(self, stop: StopSignals, after_step: Callable[[StepRow, TimeRow], None]) -> None:
        """Consume the loop: look, record, sample, save, until the target is met or the budget is spent.

        `after_step` is told of each step, once it is recorded; what it raises ends the run there.
        """
        config, step = self.config, self.state.step
        if step:
            print(f"going on after step {step} of {self.max_steps}, from {self.folder}")
            with (self.folder / RESUMES).open("a") as resumes:
                resumes.write(f"{step}\n")
        batches = steps_of(step + 1, self.text.train, config.windows, config.train.seed)
        for record in train_steps(self.state, batches, self.max_steps, config.optim, self.machine):
            self.journal.append(row := self._look(record), self._times(record))
            self._sample_if_due()
            self._save_if_due(row, stop.received is not None)
            after_step(row, self.journal.times[record.step - 1])
            if self.finished:
                break
            stop.raise_if_received(f"at step {record.step} of {self.max_steps}, all saved in {self.folder}")

    @property
    def finished(self) -> bool:
        """Whether the last step met the target rule or spent the budget."""
        if not self.rows:
            return False
        target = self.config.target
        return self.rows[-1]["step"] >= self.max_steps or is_met(
            self.rows[-target.average_steps :], target.rule, target
        )

    def write_results(self, models: Path, bpe: Path, timing: Path) -> None:
        """Write the model of the best look, the run's record without times, its journal, and, apart, its times."""
        best = best_step(self.rows)
        assert best is not None, "a run ends with a look"
        if best != self.state.step:
            self.state.restore(*load_checkpoint(self.folder, best))
        target, reached = self.config.target, first_met(self.rows, self.config.target)
        results = {
            "steps": len(self.rows),
            "tokens": self.rows[-1]["tokens"],
            "model_step": best,
            "train_tokens": len(self.text.train),
            "corpus_loss": self.rows[best - 1]["corpus_loss"],
            "target_loss": target.loss,
            "rule": target.rule,
            "to_target": {rule: self._cost(reached[rule]) for rule in RULES},
        }
        save_model(models / "model", self.state.model, bpe)
        write_json(models / "run.json", {**self.identity, "n_params": self.config.model.n_params, "results": results})
        write_rows(models / STEPS, self.rows)
        write_rows(models / TIMES, self.journal.times[: len(self.rows)])
        write_json(timing, self._time_report(reached))
        self._tell(results)

    def _resume(self) -> None:
        """Restore the newest intact checkpoint, if there is one.

        The checkpoint of the best look is needed at the end: where it is lost, go on from before it, and look again.
        """
        loaded = newest_valid(self.folder)
        best = best_step(self.journal.steps)
        if loaded and best and best <= loaded[1]["step"] and not is_intact(self.folder, best):
            loaded = newest_valid(self.folder, up_to=best - 1)
        if not loaded:
            return
        self.state.restore(*loaded)
        if len(self.journal.steps) < self.state.step:
            raise IntegrityError(f"{self.folder / STEPS} has {len(self.journal.steps)} rows, the checkpoint is of step "
                                 f"{self.state.step}: `python -m pipeline clean {self.folder.name}`")  # fmt: skip

    def _look(self, record: StepRecord) -> StepRow:
        """Add the record's row to the run's; measure the text's loss where it is worth a pass, or the last chance."""
        row = StepRow(
            step=record.step, tokens=record.tokens, loss=record.loss, grad_norm=record.grad_norm, lr=record.lr
        )
        self.rows.append(row)
        pass_ended = self.text.validation is not None and record.step % self.steps_per_pass == 0
        worth_it = check_is_worth_it(self.rows, self.steps_per_pass, self.config.target)
        if self.finished or pass_ended or worth_it:
            self.state.model.eval()
            length = self.config.windows.length
            row["corpus_loss"] = corpus_loss(self.state.model, self.text.train, length, self.machine.autocast())
            if self.text.validation is not None:
                row["validation_loss"] = corpus_loss(
                    self.state.model, self.text.validation, length, self.machine.autocast()
                )
        return row

    def _times(self, record: StepRecord) -> TimeRow:
        times = self.journal.times
        return TimeRow(
            step=record.step,
            step_s=record.step_s,
            train_s=(times[-1]["train_s"] if times else 0.0) + record.step_s,
            wall_s=self._wall_before_s + time.perf_counter() - self._started,
            memory_bytes=self._memory_bytes(),
            logged_ms=time.time_ns() // 1_000_000,
        )

    def _memory_bytes(self) -> int:
        if self.machine.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return int(psutil.Process().memory_info().rss)

    def _sample_if_due(self) -> None:
        """Let the model continue the fixed prompts, into the folder that the recorder reads."""
        record, step = self.config.record, self.state.step
        if not self.finished and (record.sample_steps == 0 or step % record.sample_steps):
            return
        generator = Generator(self.state.model, self.text.tokenizer, precision=self.machine.precision)
        greedy = Sampling(max_tokens=record.sample_tokens, temperature=0)
        texts = [generator.text(prompt, greedy) for prompt in record.sample_prompts]
        write_text(self.folder / "samples" / f"step-{step:06d}.txt", "\n\n---\n\n".join(texts) + "\n")

    def _save_if_due(self, row: StepRow, stopping: bool) -> None:
        """Save every so many steps or seconds, at the best look, before stopping, and at the end."""
        record = self.config.record
        best = best_step(self.rows)
        due = record.checkpoint_steps and row["step"] % record.checkpoint_steps == 0
        late = time.perf_counter() - self._saved >= record.checkpoint_s
        if due or late or stopping or self.finished or best == row["step"]:
            self.journal.sync()
            save_checkpoint(self.folder, self.state.step, self.state.tensors(), self.state.facts())
            keep_newest(self.folder, 2, also=best)
            self._saved = time.perf_counter()

    def _cost(self, step: int | None) -> dict[str, int] | None:
        return None if step is None else {"steps": step, "tokens": self.rows[step - 1]["tokens"]}

    def _time_report(self, reached: dict[str, int | None]) -> dict[str, Any]:
        model, length = self.config.model, self.config.windows.length
        times = self.journal.times[: len(self.rows)]
        tokens_per_s = self.rows[-1]["tokens"] / times[-1]["train_s"]
        flops = flops_per_token(model, self.text.vocabulary.n_rows, length)
        mfu = utilisation(tokens_per_s, flops, self.machine, str(self.identity["environment"]["device"]))
        resumes = self.folder / RESUMES
        return time_report(self.rows, times, reached, mfu, len(resumes.read_text().split()) if resumes.exists() else 0)

    def _tell(self, results: dict[str, Any]) -> None:
        cost = results["to_target"][results["rule"]]
        found = f"{results['rule']} rule, target {results['target_loss']:g}, corpus loss {results['corpus_loss']:.4f}"
        if cost:
            print(f"target reached after {cost['steps']} steps, {cost['tokens']:,} tokens ({found})")
        else:
            print(f"target not reached in {results['steps']} steps, {results['tokens']:,} tokens ({found})")


def best_step(rows: list[StepRow]) -> int | None:
    """The step whose look at the text found the lowest corpus loss, the first of equals; None before the first look."""
    looks = [row for row in rows if "corpus_loss" in row]
    return min(looks, key=lambda row: (row["corpus_loss"], row["step"]))["step"] if looks else None
