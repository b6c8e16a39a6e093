"""journal: one row a step, appended -> the truth about a run, read again as data frames.

Two files of JSON lines in the run's folder. `steps.jsonl` holds what is the same whenever the run is repeated: step,
tokens, loss, grad_norm, lr and, at steps where they were measured, corpus_loss and validation_loss. `times.jsonl` holds
what is not: step_s, train_s, wall_s, memory_bytes and logged_ms (the instant, in Unix milliseconds, under which MLflow
gets the row). Row i of both files belongs to step i + 1.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, TypedDict

import pandas as pd

from pipeline.system.errors import InputError, IntegrityError
from pipeline.system.files import naming_full_disk, write_text

STEPS, TIMES = "steps.jsonl", "times.jsonl"


class StepRow(TypedDict, total=False):
    """What repeats exactly; nats per token, before the update, but for corpus_loss and validation_loss, after it."""

    step: int
    tokens: int
    loss: float
    grad_norm: float
    lr: float
    corpus_loss: float
    validation_loss: float


class TimeRow(TypedDict):
    """What does not repeat; seconds since the run's start, time between attempts left out."""

    step: int
    step_s: float
    train_s: float
    wall_s: float
    memory_bytes: int
    logged_ms: int


NEEDED = {STEPS: {"step", "tokens", "loss", "grad_norm", "lr"}, TIMES: set(TimeRow.__annotations__)}  # in each row


class Journal:
    """The two files of a run, open for appending; a row torn by a kill is cut off when it is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[StepRow] = _whole_rows(folder / STEPS)
        self.times: list[TimeRow] = _whole_rows(folder / TIMES)
        complete = min(len(self.steps), len(self.times))
        del self.steps[complete:], self.times[complete:]
        self._files = [_open_cut(folder / name, complete) for name in (STEPS, TIMES)]

    def append(self, step_row: StepRow, time_row: TimeRow) -> None:
        """Add a step's rows.

        A step that is already there was taken again after a resume: its row must be equal, and its first time stays.
        Raises IntegrityError where it is not equal, OutOfSpaceError where the disk is full.
        """
        step = step_row["step"]
        if step <= len(self.steps):
            if (before := self.steps[step - 1]) != step_row:
                raise IntegrityError(f"step {step} came out as {step_row}, was {before} before the resume in "
                                     f"{self.folder}: `python -m pipeline clean` and train again")  # fmt: skip
            return
        assert step == len(self.steps) + 1, "rows come in order"
        self.steps.append(step_row)
        self.times.append(time_row)
        with naming_full_disk(self.folder):
            for file, row in zip(self._files, (step_row, time_row), strict=True):
                file.write(json.dumps(row, allow_nan=False) + "\n")
                file.flush()

    def cut(self, step: int) -> None:
        """Forget the rows after `step`: another set-up, which would come to other numbers, takes these steps again."""
        self.close()
        del self.steps[step:], self.times[step:]
        self._files = [_open_cut(self.folder / name, step) for name in (STEPS, TIMES)]

    def sync(self) -> None:
        """Force all rows to the disk, so that neither a checkpoint nor MLflow is ahead of the journal."""
        for file in self._files:
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._files:
            with suppress(OSError):  # of a row for which the disk had no room: that was told
                file.close()


def read_steps(path: Path) -> pd.DataFrame:
    """Split of a steps.jsonl or times.jsonl, indexed by step. Raises InputError where it is missing or empty."""
    if not path.is_file() or not (rows := _whole_rows(path)):
        raise InputError(f"{path} holds no steps: run `dvc repro train`")
    return pd.DataFrame(rows).set_index("step", drop=False)


def write_rows(path: Path, rows: list[Any]) -> None:
    """Write rows as JSON lines, atomically."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def _whole_rows(path: Path) -> list[Any]:
    """All rows up to the first that is torn, or no row of a journal."""
    rows: list[Any] = []
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or row.get("step") != len(rows) + 1 or not _is_sound(row, NEEDED[path.name]):
            break
        rows.append(row)
    return rows


def _is_sound(row: dict[str, Any], needed: set[str]) -> bool:
    """Whether a row has the keys that are needed, and finite numbers alone."""
    return needed <= row.keys() and all(type(value) in (int, float) and abs(value) < 1e300 for value in row.values())


def _open_cut(path: Path, rows: int) -> TextIO:
    """Open a file for appending after its first `rows` lines."""
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(sum(len(file.readline()) for _ in range(rows)))
    return path.open("a", encoding="utf-8", newline="\n")
