"""A training run in its folder: state and records, resumed from the newest intact checkpoint."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path

import psutil
import torch

from pipeline.data.batches import TrainingData, steps_of, steps_per_epoch
from pipeline.model.published import origin_of
from pipeline.system.device import Machine
from pipeline.system.errors import IntegrityError, PipelineError
from pipeline.system.files import locked, read_json, write_json
from pipeline.tracking.descriptions import Result
from pipeline.tracking.fingerprint import IDENTITY, Identity, differences, identify
from pipeline.tracking.journal import STEPS, Journal, StepRecord
from pipeline.tracking.mlflow_tracker import RUN_ID
from pipeline.tracking.recorder import RECORDER_LOCK
from pipeline.training.checkpoint import Saved, load_checkpoint, newest_valid
from pipeline.training.config import RunConfig
from pipeline.training.extension import extend, set_aside
from pipeline.training.loop import TrainState, fresh_state, train_steps
from pipeline.training.preflight import check_disk, check_fits
from pipeline.training.target import best_step, is_finished
from pipeline.training.target_result import result_of

RESUMES = "resumes"  # one line for each resume: its step
REPEATED = "steps repeated with kernels that are not deterministic"  # in `inexact` of the identity


@contextmanager
def open_run(
    config: RunConfig, machine: Machine, text: TrainingData, home: Path, elastic: bool = False
) -> Iterator["Run"]:
    """Lock the run's folder in `home` and yield the run, resumed from its newest checkpoint.

    Raises OutOfSpaceError if the run does not fit into memory or on the disk, and RunLocked if another process trains
    the same run.
    """
    check_fits(config, text.vocabulary, machine)
    identity = identify(text.sha256, config.decisive, machine)
    folder = home / identity["fingerprint"]
    with ExitStack() as stack:

        def claim() -> tuple[Identity, list[str]]:
            stack.enter_context(locked(folder.with_suffix(".lock")))
            before, kept = last_identity(folder), None
            changed = differences(before["environment"], identity["environment"]) if before else []
            if changed and not elastic:
                kept = set_aside(folder)
            if not extend(folder, identity, config, text, elastic) and kept:
                print(
                    f"environment changed ({', '.join(changed)}): starting from step 0. Old checkpoints are in {kept}; "
                    "--elastic resumes anyway"
                )
            return claim_folder(folder, identity)

        run = Run(config, machine, text, folder, *machine.world.on_main(claim))
        stack.callback(run.close)
        if not run.finished:
            machine.world.on_main(lambda: check_disk(config, text.vocabulary, machine, folder))
        yield run


def last_identity(folder: Path) -> Identity | None:
    """The identity of the last attempt of the run in `folder`, if there was one."""
    path = folder / IDENTITY
    return read_json(path, f"`python -m pipeline clean {folder.name}`") if path.is_file() else None


def claim_folder(folder: Path, identity: Identity) -> tuple[Identity, list[str]]:
    """Create the run's folder or take it over; return the run's identity and the changes of its environment.

    If there are changes, the folder keeps the identity that it has, until the run has resumed.
    """
    if before := last_identity(folder):
        changed = differences(before["environment"], identity["environment"])
        return {**identity, "inexact": before["inexact"]} if changed else before, changed
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / IDENTITY, identity)
    return identity, []


class Run:
    """A run: its parameters and data, its folder, state, journal and records so far."""

    def __init__(
        self,
        config: RunConfig,
        machine: Machine,
        text: TrainingData,
        folder: Path,
        identity: Identity,
        changed: list[str],
    ) -> None:
        """Resume the run; `changed` lists the changes of its environment since the last attempt."""
        self.config, self.machine, self.text, self.folder, self.identity = config, machine, text, folder, identity
        self.world = machine.world
        if machine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # of an earlier run in this process
        self.state = self._fresh_state()
        self.journal = Journal(folder) if self.world.is_main else None
        self.records: list[StepRecord] = []
        self._resume(changed)
        before = self.journal.records if self.journal else []
        self._wall_before_s, self._started = before[-1].wall_s if before else 0.0, time.perf_counter()

    def close(self) -> None:
        if self.journal:
            self.journal.close()

    @cached_property
    def max_steps(self) -> int:
        return self.config.optim.max_steps(self.config.windows, self.text.train.size)

    @cached_property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.text.train.size, self.config.windows)

    @property
    def finished(self) -> bool:
        """Whether the last step met the target rule, or used up the budget or the patience."""
        return bool(self.records) and is_finished(self.records, self.max_steps, self.config.target)

    @property
    def result(self) -> Result | None:
        """What the run reached, once it is finished."""
        return result_of(self.records, self.identity["params"]["target"])

    @property
    def origin_tags(self) -> dict[str, str]:
        """The tag that names the published weights from which the run started, if there are any."""
        return {"init": origin_of(self.text.init)} if self.text.init else {}

    @property
    def resumes(self) -> int:
        """The number of resumes."""
        return len(path.read_text().split()) if (path := self.folder / RESUMES).exists() else 0

    def steps(self) -> Iterator[StepRecord]:
        """Take the remaining steps of the budget and yield a record after each."""
        config = self.config
        batches = steps_of(self.state.step + 1, self.text.train, config.windows, config.train.seed, self.world)
        for record in train_steps(self.state, batches, self.max_steps, config.optim, self.machine):
            self.records.append(record)
            yield record

    def log(self, record: StepRecord) -> None:
        """Add times and memory to the newest record and append it to the journal."""
        on_gpu = self.machine.device.type == "cuda"
        record.train_s = record.step_s + (self.records[-2].train_s if len(self.records) > 1 else 0.0)
        record.wall_s = self._wall_before_s + time.perf_counter() - self._started
        record.memory_bytes = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
        record.logged_ms = time.time_ns() // 1_000_000
        if self.journal:
            self.journal.append(record)

    def note_resume(self) -> None:
        """If the run was resumed, print a line and count the resume."""
        if (step := self.state.step) and self.world.is_main:
            print(f"resumes from step {step} of {self.max_steps}, in {self.folder}")
            with (self.folder / RESUMES).open("a") as resumes:
                resumes.write(f"{step}\n")

    def print_changes(self) -> None:
        """Print how this run differs from the newest other run."""
        others = set(self.folder.parent.glob(f"[!.]*/{IDENTITY}")) - {self.folder / IDENTITY}
        if last := max(others, key=lambda path: path.stat().st_mtime, default=None):
            with suppress(PipelineError):  # another run's damaged files are no reason to stop
                changed = ", ".join(differences(read_json(last), self.identity))
                print(f"a new run, which differs from the last one ({last.parent.name}): {changed}")

    def _fresh_state(self) -> TrainState:
        config = self.config
        state = fresh_state(
            config.model, self.text.vocabulary, config.optim, config.train, self.machine, self.text.init
        )
        state.model.trained_length = config.windows.seq_len
        return state

    def _resume(self, changed: list[str]) -> None:
        """Restore the newest valid checkpoint, if there is one. Rank 0 chooses it for all processes."""
        loaded: Saved | None = None

        def find() -> list[StepRecord]:
            nonlocal loaded
            assert self.journal, "this is rank 0"
            records = self.journal.records
            loaded = newest_valid(self.folder, best_step(records, self.config.target))
            step = loaded[1]["step"] if loaded else 0
            if len(records) < step:
                raise IntegrityError(
                    f"{self.folder / STEPS} has {len(records)} records, the checkpoint is of step {step}: "
                    f"`python -m pipeline clean {self.folder.name}`"
                )
            if changed or (records[step:] and not self.machine.exact):
                self._resume_inexactly(self.journal, step, changed or [REPEATED])
            self.journal.sync()
            return records[:step]

        self.records = self.world.on_main(find)
        if self.records:
            self.state.restore(*(loaded or load_checkpoint(self.folder, len(self.records))))

    def _resume_inexactly(self, journal: Journal, step: int, reasons: list[str]) -> None:
        """Record that the run is resumed after `step` in another environment, or on a machine that is not exact.

        Later steps of the last attempt are not repeated exactly. They stay in their MLflow run, and a new MLflow run
        begins.
        """
        if journal.records[step:]:
            with locked(self.folder / RECORDER_LOCK, wait=True):  # the last attempt's recorder may still read them
                journal.cut(step)
                (self.folder / RUN_ID).unlink(missing_ok=True)
        if step:
            self.identity["inexact"].append(f"{', '.join(reasons)} after step {step}")
            print(f"not exact from here on: {self.identity['inexact'][-1]}")
        write_json(self.folder / IDENTITY, self.identity)
