"""tracked_run: one training run, composed -> data, loop, target, samples, checkpoints, journal, MLflow, resume.

The stage `train` calls `run_tracked`, a trial of the sweep what that is made of: `open_run` and `follow`. A run goes
on from the newest checkpoint of the same fingerprint, steps until the target rule is met or budget or patience are
spent, and leaves the model of the best look.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.config.params import Params
from pipeline.data.batches import Split, TrainingData, steps_of, steps_per_epoch
from pipeline.model.evaluate import corpus_loss
from pipeline.model.generator import Generator
from pipeline.model.sampling import Sampling
from pipeline.model.weights import save_model
from pipeline.system.device import Machine, prepare_machine
from pipeline.system.distributed import joined, world_here
from pipeline.system.errors import InputError
from pipeline.system.files import locked, write_json, write_text
from pipeline.system.signals import StopSignals, interrupted
from pipeline.tracking.fingerprint import Identity, identify
from pipeline.tracking.journal import STEPS, TIMES, Journal, StepRow, TimeRow, write_rows
from pipeline.tracking.mlflow_store import project_root
from pipeline.tracking.recorder import OWNER_PID, Recorder
from pipeline.training.checkpoint import (
    Tensors,
    change_set_up,
    claim_folder,
    keep_newest,
    load_checkpoint,
    newest_state,
    save_checkpoint,
    tell_what_is_new,
)
from pipeline.training.config import RunConfig
from pipeline.training.loop import StepRecord, TrainState, fresh_state, train_steps
from pipeline.training.preflight import check_disk, check_fits
from pipeline.training.progress import Progress
from pipeline.training.results import flops_per_token, in_words, results_of, time_report, utilisation
from pipeline.training.target import best_step, first_met, is_finished, look_is_due, needs_corpus_loss

AfterStep = Callable[[StepRow, TimeRow], None]
RESUMES = "resumes"  # a line with the step for each time that the run went on


def run_tracked(params: Params, data: Path, models: Path, timing: Path, elastic: bool = False) -> None:
    """Train as `params` say on `data`/tokens; write the model, run.json and the journal to `models`, times to `timing`.

    An `elastic` run goes on from checkpoints of another set-up, and says that it is not exact. Raises Interrupted after
    a signal, everything saved; DivergedError where the loss is not finite; RunLocked where another process trains the
    same run; PeerLost where one of the processes of this training is gone.
    """
    config = RunConfig.of(params)
    world = world_here()
    if config.windows.micro_batch_size % world.size:
        raise InputError(
            f"{world.size} processes do not divide windows.micro_batch_size {config.windows.micro_batch_size} evenly: change one"
        )
    with joined(world):
        machine = prepare_machine(config.train, config.flops, world)
        text = read_data(config, machine, data)
        root = project_root()
        with StopSignals() as stop, open_run(config, machine, text, root / "checkpoints", models, elastic) as run:
            if run.finished:
                print(f"the run is finished, at step {run.state.step}: nothing to train")
            elif run.state.step == 0 and world.is_main:
                tell_what_is_new(run.folder, run.identity)
            if not run.finished or (run.folder / OWNER_PID).is_file():  # MLflow may lack its end
                with _shown(run, root, config.origin(params)) as show:
                    if not run.finished:
                        run.follow(stop, show)
            run.write_results(models, data / "bpe", timing)


def read_data(config: RunConfig, machine: Machine, data: Path) -> TrainingData:
    """Read what a run learns from `data`. Raises InputError where nothing is held out and the target needs it."""
    model = config.model
    text = TrainingData.read(
        data / "tokens", data / "bpe", config.windows.seq_len, model.vocab_size, model.fold_vocab, machine.device
    )
    if text.validation is None and (need := config.target.needs_held_out):
        raise InputError(f"{need}, but nothing is held out: set corpus.val_fraction above 0")
    return text


@contextmanager
def _shown(run: "TrackedRun", root: Path, tags: dict[str, str]) -> Iterator[AfterStep]:
    """What to call after each step; in rank 0, while MLflow is kept up to date."""
    if not run.world.is_main:
        yield lambda row, times: None
        return
    progress = Progress(run.state.step, run.state.tokens, run.max_steps, run.config.target.loss)
    with Recorder(root, run.folder, dict(run.identity), tags), progress:
        yield progress.show


@contextmanager
def open_run(
    config: RunConfig,
    machine: Machine,
    text: TrainingData,
    home: Path,
    models: Path | None = None,
    elastic: bool = False,
) -> Iterator["TrackedRun"]:
    """Hold the folder in `home` of the run that these make, and yield the run, as far as it had come.

    Raises OutOfSpaceError where a step would not fit into memory, or what the run saves, there and in `models`, on the
    disk; RunLocked where another process trains the same run.
    """
    check_fits(config, text.vocabulary, machine)
    identity = identify(text.sha256, config.decisive, machine)
    folder = home / identity["fingerprint"]
    with ExitStack() as stack:

        def claim() -> tuple[Identity, list[str]]:
            stack.enter_context(locked(folder.with_suffix(".lock")))
            return claim_folder(folder, identity, elastic)

        run = TrackedRun(config, machine, text, folder, *machine.world.on_main(claim))
        stack.callback(run.close)
        if not run.finished:
            machine.world.on_main(lambda: check_disk(config, text.vocabulary, machine, folder, models))
        yield run


class TrackedRun:
    """A run in its folder: state, journal, and what happens between two steps."""

    def __init__(
        self,
        config: RunConfig,
        machine: Machine,
        text: TrainingData,
        folder: Path,
        identity: Identity,
        changed: list[str],
    ) -> None:
        """Take the run up where it stopped; `changed` is what its set-up has become another in since, for good."""
        self.config, self.machine, self.text, self.folder, self.identity = config, machine, text, folder, identity
        self.world = machine.world
        self.max_steps = config.optim.max_steps(config.windows)
        self.steps_per_epoch = steps_per_epoch(text.train.size, config.windows)
        self.state: TrainState = fresh_state(config.model, text.vocabulary, config.optim, config.train, machine)
        self.state.model.trained_length = config.windows.seq_len
        self.journal = Journal(folder) if self.world.is_main else None
        self.rows: list[StepRow] = []
        self._resume(changed)
        self._wall_before_s = self.journal.times[-1]["wall_s"] if self.journal and self.journal.times else 0.0
        self._started = self._saved = time.perf_counter()

    def close(self) -> None:
        if self.journal:
            self.journal.close()

    def follow(self, stop: StopSignals, after_step: AfterStep) -> None:
        """Consume the loop: look, record, sample, save, until the target is met or the budget is spent.

        `after_step` is told of each step, once it is recorded; what it raises ends the run there.
        """
        config, step = self.config, self.state.step
        if step and self.world.is_main:
            print(f"going on after step {step} of {self.max_steps}, from {self.folder}")
            with (self.folder / RESUMES).open("a") as resumes:
                resumes.write(f"{step}\n")
        batches = steps_of(step + 1, self.text.train, config.windows, config.train.seed, self.world)
        for record in train_steps(self.state, batches, self.max_steps, config.optim, self.machine):
            row = self._look(record)
            times = self._note(row, record)
            self._sample_if_due()
            stopping = self._save_if_due(row, stop.received)
            after_step(row, times)
            if self.finished:
                break
            if stopping:
                raise interrupted(stopping, f"at step {record.step} of {self.max_steps}, all saved in {self.folder}")

    @property
    def finished(self) -> bool:
        """Whether the last step met the target rule, or spent the budget or the patience."""
        return bool(self.rows) and is_finished(self.rows, self.max_steps, self.config.target)

    def write_results(self, models: Path, bpe: Path, timing: Path) -> None:
        """Write the model of the best look, the run's record without times, its journal, and, apart, its times."""
        results = results_of(self.rows, self.config.target, self.text.train.size)
        if results["model_step"] != self.state.step:
            self.state.restore(*load_checkpoint(self.folder, results["model_step"]))
        model = self.state.whole_model()
        if model is None or self.journal is None:
            return
        save_model(models / "model", model, bpe)
        times = self.journal.times[: len(self.rows)]
        write_json(models / "run.json", {**self.identity, "n_params": self.config.model.n_params, "results": results})
        write_rows(models / STEPS, self.rows)
        write_rows(models / TIMES, times)
        write_json(timing, self._time_report(times))
        print(in_words(results, self.rows, self.config.target))

    def _resume(self, changed: list[str]) -> None:
        """Restore the newest checkpoint that can be gone on from, if there is one: rank 0 says which."""
        loaded: tuple[Tensors, dict[str, Any]] | None = None

        def find() -> list[StepRow]:
            nonlocal loaded
            assert self.journal, "this is rank 0"
            loaded = newest_state(self.journal, self.config.target, self.state)
            step = loaded[1]["step"] if loaded else 0
            if changed:
                change_set_up(self.journal, step, self.identity, changed)
            return self.journal.steps[:step]

        self.rows = self.world.on_main(find)
        if self.rows:
            self.state.restore(*(loaded or load_checkpoint(self.folder, len(self.rows))))

    def _look(self, record: StepRecord) -> StepRow:
        """Add the record's row to the run's; measure the text's losses where a look is due, or the last chance."""
        row = StepRow(
            step=record.step, tokens=record.tokens, loss=record.loss, grad_norm=record.grad_norm, lr=record.lr
        )
        self.rows.append(row)
        target, held_out = self.config.target, self.text.validation
        if self.finished or look_is_due(self.rows, self.steps_per_epoch, held_out is not None, target):
            self.state.model.eval()
            if held_out is not None:
                row["validation_loss"] = self._loss_on(held_out)
            if self.finished or needs_corpus_loss(self.rows, target):
                row["corpus_loss"] = self._loss_on(self.text.train)
        return row

    def _loss_on(self, part: Split) -> float:
        length, autocast = self.config.windows.seq_len, self.machine.autocast()
        return corpus_loss(self.state.model, part, length, autocast, world=self.world)

    def _note(self, row: StepRow, record: StepRecord) -> TimeRow:
        """Put the step into the journal; return its times, those of the first time where it was taken again."""
        before = self.journal.times if self.journal else []
        times = TimeRow(
            step=record.step,
            step_s=record.step_s,
            train_s=(before[-1]["train_s"] if before else 0.0) + record.step_s,
            wall_s=self._wall_before_s + time.perf_counter() - self._started,
            memory_bytes=self._memory_bytes(),
            logged_ms=time.time_ns() // 1_000_000,
        )
        if not self.journal:
            return times
        self.journal.append(row, times)
        return self.journal.times[record.step - 1]

    def _memory_bytes(self) -> int:
        if self.machine.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return int(psutil.Process().memory_info().rss)

    def _sample_if_due(self) -> None:
        """Let the model continue the fixed prompts, into the folder that the recorder reads."""
        samples, step = self.config.samples, self.state.step
        if not self.finished and (samples.interval_steps == 0 or step % samples.interval_steps):
            return
        model = self.state.whole_model()
        if model is None or not self.world.is_main:
            return
        generator = Generator(model, self.text.tokenizer, precision=self.machine.precision)
        greedy = Sampling(max_tokens=samples.max_tokens, temperature=0)
        texts = [generator.text(prompt, greedy) for prompt in samples.prompts]
        write_text(self.folder / "samples" / f"step-{step:06d}.txt", "\n\n---\n\n".join(texts) + "\n")

    def _save_if_due(self, row: StepRow, signal_received: int | None) -> int:
        """Save every so many steps or seconds, at the best look, before stopping, and at the end.

        Rank 0's clock is the world's, and a signal that any of its processes received, which is returned, is for all.
        """
        checkpoint = self.config.checkpoint
        best = best_step(self.rows, self.config.target)
        due = checkpoint.interval_steps and row["step"] % checkpoint.interval_steps == 0
        late = self.world.is_main and time.perf_counter() - self._saved >= checkpoint.interval_s
        stopping, is_late = self.world.largest(signal_received or 0, late)
        if due or is_late or stopping or self.finished or best == row["step"]:
            tensors = self.state.tensors()
            if self.journal:
                self.journal.sync()
                save_checkpoint(self.folder, self.state.step, tensors, self.state.facts())
                keep_newest(self.folder, 2, also=best)
            self._saved = time.perf_counter()
        return stopping

    def _time_report(self, times: list[TimeRow]) -> dict[str, Any]:
        model, length = self.config.model, self.config.windows.seq_len
        tokens_per_s = self.rows[-1]["tokens"] / times[-1]["train_s"]
        flops = flops_per_token(model, self.text.vocabulary.n_rows, length)
        mfu = utilisation(tokens_per_s, flops, self.machine, str(self.identity["environment"]["device"]))
        resumes = self.folder / RESUMES
        reached = first_met(self.rows, self.config.target)
        return time_report(self.rows, times, reached, mfu, len(resumes.read_text().split()) if resumes.exists() else 0)
