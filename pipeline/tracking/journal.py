"""Keep the records of a run's training steps in an append-only journal.

The journal is two files of JSON lines in the run's folder: `steps.jsonl` has the fields of a StepRecord that are the
same each time the run is repeated, `times.jsonl` the others. Line i of both files belongs to step i.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from pipeline.system.errors import InputError, IntegrityError
from pipeline.system.files import report_full_disk, write_text

if TYPE_CHECKING:
    import pandas as pd

STEPS, TIMES = "steps.jsonl", "times.jsonl"


def varying(default: Any) -> Any:
    """A field that may differ when the run is repeated, such as a duration; it is written to times.jsonl."""
    return field(default=default, metadata={"file": TIMES})


def evaluated() -> Any:
    """A field for a mean loss over a whole text; it has a value after the steps at which this loss is evaluated."""
    return field(default=None, metadata={"evaluated": True})


@dataclass
class StepRecord:
    """The metrics of one optimiser step; every field goes into the journal and to MLflow under its own name.

    A field whose default is None is written only at the steps that have a value for it. A new field must have that
    default: otherwise older journals are refused. Durations are in seconds, without the time between two attempts.
    """

    step: int  # counts from 1
    tokens: int  # read so far, this step included
    loss: float  # nats per token on this step's windows, before the update
    grad_norm: float  # L2 over all parameters, before clipping
    lr: float  # of AdamW
    sliding_loss: float | None = evaluated()  # of the training text in sliding windows, after the update
    corpus_loss: float | None = evaluated()  # of the training text in fixed windows, after the update
    validation_loss: float | None = evaluated()  # of the held-out text, after the update
    loss_estimate: float | None = None  # of the loss that the target rule needs, from a part of the text
    # On a GPU the update may still be running at the end of `step_s`; the next step then waits for it.
    step_s: float = varying(0.0)
    train_s: float = varying(0.0)  # of all steps so far
    wall_s: float = varying(0.0)  # since the run's start
    memory_bytes: int = varying(0)
    logged_ms: int = varying(0)  # Unix time in milliseconds; the metrics' timestamp in MLflow

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Create a record from `values`; unknown keys are ignored."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def line(self, name: str) -> dict[str, Any]:
        """The values for one line of the file `name`, STEPS or TIMES."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name == "step" or _file_of(f) == name}
        return {key: value for key, value in values.items() if value is not None}


def _file_of(f: "Field[Any]") -> str:
    return str(f.metadata.get("file", STEPS))


EVALUATED_LOSSES = [f.name for f in fields(StepRecord) if "evaluated" in f.metadata]


class Journal:
    """The two files of a run, and their records so far.

    The first write, or `sync`, removes incomplete lines, as a kill leaves them, and all that follows such a line.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records = read_records(folder)

    def append(self, record: StepRecord) -> None:
        """Add a step's record.

        If the journal has the step already, the step was repeated after a resume: its fields in steps.jsonl must be
        equal, and `record` gets the first attempt's fields in times.jsonl. Raises IntegrityError if they are not equal,
        OutOfSpaceError if the disk is full.
        """
        if record.step <= len(self.records):
            before = self.records[record.step - 1]
            if (now := record.line(STEPS)) != (then := before.line(STEPS)):
                raise IntegrityError(
                    f"step {record.step} gave {now} after the resume, but {then} before it, in {self.folder}: "
                    "run `python -m pipeline clean` and train again"
                )
            vars(record).update(before.line(TIMES))
            return
        assert record.step == len(self.records) + 1, "records come in order"
        with report_full_disk(self.folder):
            files = self._files  # opened behind the records so far
            self.records.append(record)
            for name, file in files.items():
                file.write(json.dumps(record.line(name), allow_nan=False) + "\n")
                file.flush()

    def cut(self, step: int) -> None:
        """Remove the records after `step`."""
        self.close()
        del self.records[step:]
        self.sync()

    def sync(self) -> None:
        """Flush all records to the disk, so that the journal is never behind a checkpoint or MLflow."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in vars(self).pop("_files", {}).values():
            with suppress(OSError):  # a line did not fit on the disk; `append` reported it
                file.close()

    @cached_property
    def _files(self) -> dict[str, TextIO]:
        return {name: _open_cut(self.folder / name, len(self.records)) for name in (STEPS, TIMES)}


def read_records(folder: Path) -> list[StepRecord]:
    """The records of a run's journal up to the first incomplete or invalid line; the files are not changed."""
    pairs = zip(_complete_lines(folder / STEPS), _complete_lines(folder / TIMES), strict=False)
    return [StepRecord.of(times | exact) for exact, times in pairs]


def read_steps(path: Path) -> "pd.DataFrame":
    """The lines of a steps.jsonl or times.jsonl, indexed by step. Raises InputError if it is missing or empty."""
    import pandas as pd

    if not (lines := _complete_lines(path)):
        raise InputError(f"{path} contains no steps: run `dvc repro train`")
    return pd.DataFrame(lines).set_index("step", drop=False)


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines, atomically."""
    write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """The lines before the first incomplete or invalid one; none if there is no file."""
    found: list[dict[str, Any]] = []
    needed = {"step"} | {f.name for f in fields(StepRecord) if _file_of(f) == path.name and f.default is not None}
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        try:
            values = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict) or values.get("step") != len(found) + 1 or not _is_valid(values, needed):
            break
        found.append(values)
    return found


def _is_valid(values: dict[str, Any], needed: set[str]) -> bool:
    """Whether a line has the needed keys, and only finite numbers."""
    return needed <= values.keys() and all(type(v) in (int, float) and abs(v) < 1e300 for v in values.values())


def _open_cut(path: Path, lines: int) -> TextIO:
    """Open a file for appending after its first `lines` lines."""
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(sum(len(file.readline()) for _ in range(lines)))
    return path.open("a", encoding="utf-8", newline="\n")
