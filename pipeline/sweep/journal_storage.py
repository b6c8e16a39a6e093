"""Store studies in a journal file on a disk that machines may share, with heartbeats as leases: files beside it."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import JournalStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._storage import JournalOperation
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pipeline.system.errors import InputError
from pipeline.system.files import flock
from pipeline.tracking.mlflow_errors import first_line

FIRST_BYTES = b'{"op_code":'  # of every line of a journal
BLOCK_BYTES = 4096
# What a running trial writes is not synced at once: a power failure ends the trial as well, and its end is synced
# together with all that is before it. Each sync takes milliseconds, for which all workers wait.
SYNCED_LATER = (
    JournalOperation.SET_TRIAL_PARAM,
    JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE,
    JournalOperation.SET_TRIAL_USER_ATTR,
)


class JournalFile(JournalFileBackend):  # type: ignore[misc]
    """Optuna's journal file under a lock that ends with its process; an incomplete last line is removed.

    Optuna's own locks are files: after a kill they stop all others for 30 seconds, and two of those may then break
    the lock and write together. The system releases an flock when its process dies; NFS and Lustre have it too. A
    killed writer, or a full disk, may leave an incomplete line. Optuna does not read it, but would append to it, and
    no process could read the file again.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or create it. Raises InputError if it is no journal, or if the disk does not support locks.

        On a read-only disk it can be read, and a write raises StorageInternalError.
        """
        self._path = path
        with _translate_disk_errors(path):
            super().__init__(str(path))
            with self._locked() if os.access(path, os.W_OK) else path.open("rb") as file:
                head = file.read(len(FIRST_BYTES))
        if not FIRST_BYTES.startswith(head):
            raise InputError(f"sweep.storage: {path} is not a journal of studies: name another file")

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        intact = log_number_from
        with _translate_disk_errors(self._path):
            try:
                for log in super().read_logs(log_number_from):
                    intact += 1
                    yield log
            except ValueError as error:
                raise StorageInternalError(
                    f"line {intact + 1} of {self._path} is damaged ({first_line(error)}): while no worker runs, "
                    f"restore a copy of the file, or keep the lines before (`head -n {intact}`); or name another file"
                ) from None

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        data = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with _translate_disk_errors(self._path), self._locked() as file:
            _remove_incomplete_line(file)
            while data:  # a write may be partial
                data = data[file.write(data) :]
            if any(log["op_code"] not in SYNCED_LATER for log in logs):
                os.fsync(file)

    @contextmanager
    def _locked(self) -> Iterator[FileIO]:
        """Open and lock the file; NFS updates the length when it opens a file. A removed file is not made again."""
        with open(self._path, "rb+", buffering=0, opener=_open_to_append) as file:
            flock(file, fcntl.LOCK_EX)
            yield file


class JournalStudyStorage(JournalStorage, BaseHeartbeat):  # type: ignore[misc]
    """Optuna's JournalStorage with heartbeats, which it lacks: a trial that runs has a lease.

    A lease is an empty file, JOURNAL.leases/ID of the trial. A heartbeat sets its modification time. A trial is stale
    if its lease is older than `timeout_s`. Both times are those of the disk, so that the clocks of the machines do not
    matter. The journal does not grow with heartbeats.
    """

    def __init__(self, path: Path, timeout_s: float, on_stale: Callable[[Study, FrozenTrial], None]) -> None:
        """Open the journal, or create it. Raises InputError if it is no journal, StorageInternalError for faults."""
        self._timeout_s, self._on_stale = timeout_s, on_stale
        self._leases = path.with_name(f"{path.name}.leases")
        super().__init__(JournalFile(path))

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        try:
            return bool(super().set_trial_state_values(trial_id, state, values))
        finally:
            if state.is_finished():  # or another process has ended the trial
                self._lease(trial_id).unlink(missing_ok=True)

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(OSError):  # the next heartbeat may succeed
            self._touch(self._lease(trial_id))

    def get_heartbeat_interval(self) -> int:
        return max(1, int(self._timeout_s / 6))

    def get_heartbeat_stale_trial_callback(self) -> Callable[[Study, FrozenTrial], None]:
        return self._on_stale

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        with _translate_disk_errors(self._leases):
            ages_s = {trial._trial_id: self._age_s(trial._trial_id) for trial in running}
        return [trial_id for trial_id, age_s in ages_s.items() if age_s > self._timeout_s]

    def _age_s(self, trial_id: int) -> float:
        """The age of a lease. A trial without one gets it now: its process may have died before the first heartbeat."""
        try:
            with self._lease(trial_id).open() as file:  # NFS updates the times when it opens a file
                renewed_s = os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            self._touch(self._lease(trial_id))
            return 0.0
        self._touch(clock := self._leases / "clock")
        return clock.stat().st_mtime - renewed_s

    def _lease(self, trial_id: int) -> Path:
        return self._leases / str(trial_id)

    def _touch(self, path: Path) -> None:
        self._leases.mkdir(exist_ok=True)
        path.touch()


def _open_to_append(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_APPEND)


def _remove_incomplete_line(file: FileIO) -> None:
    """Cut the file after its last line break. The rest is what a writer left that did not finish."""
    end = size = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - BLOCK_BYTES)
        file.seek(begin)
        if found := file.read(end - begin).rfind(b"\n") + 1:
            end = begin + found
            break
        end = begin
    if end < size:
        file.truncate(end)


@contextmanager
def _translate_disk_errors(path: Path) -> Iterator[None]:
    """Raise StorageInternalError, with a hint, if the disk fails."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise StorageInternalError(
            f"{path}: {(error.strerror or str(error)).lower()}: fix it, or name another file"
        ) from None
