"""The record of a training step, and the append-only journal that keeps one for each step of a run.

The journal is two files of JSON lines in the run's folder: `steps.jsonl` holds the fields of a StepRecord that are the
same whenever the run is repeated, `times.jsonl` the others. Line i of both belongs to step i.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from pipeline.system.errors import InputError, IntegrityError
from pipeline.system.files import naming_full_disk, write_text

if TYPE_CHECKING:
    import pandas as pd

STEPS, TIMES = "steps.jsonl", "times.jsonl"


def varying(default: Any) -> Any:
    """A field that differs when the run is repeated, such as a duration; its place is times.jsonl."""
    return field(default=default, metadata={"file": TIMES})


@dataclass
class StepRecord:
    """What is known of one optimiser step; every field goes into the journal and to MLflow under its own name.

    A field whose default is None is written only at the steps that have a value for it. A new field must have that
    default, or journals from before it are refused. Durations are in seconds, without the time between two attempts.
    """

    step: int  # counts from 1
    tokens: int  # seen so far, this step included
    loss: float  # nats per token on this step's windows, before the update
    grad_norm: float  # L2 over all parameters, before clipping
    lr: float  # of AdamW
    validation_loss: float | None = None  # of the held-out text, after the update
    corpus_loss: float | None = None  # of the training text, after the update
    step_s: float = varying(0.0)  # of this step; a GPU may still be at its update, which the next step then waits for
    train_s: float = varying(0.0)  # of all steps so far
    wall_s: float = varying(0.0)  # since the run's start
    memory_bytes: int = varying(0)
    logged_ms: int = varying(0)  # the instant, in Unix milliseconds, that MLflow gets

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """The record with the values of `row`, whose other keys are ignored."""
        return cls(**{f.name: row[f.name] for f in fields(cls) if f.name in row})

    def row(self, name: str) -> dict[str, Any]:
        """The line for the file `name`, STEPS or TIMES."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name == "step" or _file_of(f) == name}
        return {key: value for key, value in values.items() if value is not None}


def _file_of(f: "Field[Any]") -> str:
    return str(f.metadata.get("file", STEPS))


class Journal:
    """The two files of a run, open for appending; a line torn by a kill is cut off when it is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pairs = zip(_whole_rows(folder / STEPS), _whole_rows(folder / TIMES), strict=False)
        self.records = [StepRecord.of(times | exact) for exact, times in pairs]
        self._open()

    def append(self, record: StepRecord) -> None:
        """Add a step's record.

        A step that is already there was taken again after a resume: its exact fields must be equal, and `record` gets
        the times of the first time. Raises IntegrityError where they are not equal, OutOfSpaceError where the disk is
        full.
        """
        if record.step <= len(self.records):
            before = self.records[record.step - 1]
            if (now := record.row(STEPS)) != (then := before.row(STEPS)):
                raise IntegrityError(
                    f"step {record.step} came out as {now}, was {then} before the resume in {self.folder}: "
                    "`python -m pipeline clean` and train again"
                )
            vars(record).update(before.row(TIMES))
            return
        assert record.step == len(self.records) + 1, "records come in order"
        self.records.append(record)
        with naming_full_disk(self.folder):
            for name, file in self._files.items():
                file.write(json.dumps(record.row(name), allow_nan=False) + "\n")
                file.flush()

    def cut(self, step: int) -> None:
        """Forget the records after `step`."""
        self.close()
        del self.records[step:]
        self._open()

    def sync(self) -> None:
        """Force all records to the disk, so that neither a checkpoint nor MLflow is ahead of the journal."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # of a line for which the disk had no room: that was reported
                file.close()

    def _open(self) -> None:
        self._files = {name: _open_cut(self.folder / name, len(self.records)) for name in (STEPS, TIMES)}


def read_steps(path: Path) -> "pd.DataFrame":
    """The lines of a steps.jsonl or times.jsonl, indexed by step. Raises InputError where it is missing or empty."""
    import pandas as pd

    if not path.is_file() or not (rows := _whole_rows(path)):
        raise InputError(f"{path} holds no steps: run `dvc repro train`")
    return pd.DataFrame(rows).set_index("step", drop=False)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, atomically."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """All lines up to the first that is torn, or no line of a journal."""
    rows: list[dict[str, Any]] = []
    needed = {"step"} | {f.name for f in fields(StepRecord) if _file_of(f) == path.name and f.default is not None}
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or row.get("step") != len(rows) + 1 or not _is_sound(row, needed):
            break
        rows.append(row)
    return rows


def _is_sound(row: dict[str, Any], needed: set[str]) -> bool:
    """Whether a line has the keys that are needed, and only finite numbers."""
    return needed <= row.keys() and all(type(value) in (int, float) and abs(value) < 1e300 for value in row.values())


def _open_cut(path: Path, lines: int) -> TextIO:
    """Open a file for appending after its first `lines` lines."""
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(sum(len(file.readline()) for _ in range(lines)))
    return path.open("a", encoding="utf-8", newline="\n")
