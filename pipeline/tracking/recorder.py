"""tracking: a training run's folder -> its run in MLflow, kept up to date by a process of its own.

The journal is the truth, and MLflow gets its rows. Training neither imports MLflow nor waits for it, nor shares its
interpreter with it: a thread would cost training seconds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.system.errors import Interrupted, PeerLost, Pruned
from pipeline.system.files import write_text
from pipeline.system.host import SOURCE_ROOT
from pipeline.tracking import recorder_process as recorder
from pipeline.tracking.mlflow_store import first_line, require_usable

LAST_CALL_S = 60.0  # how long the end of training waits for the store
INTERRUPTED_S = 1.0  # and how long after a signal, when whoever sent it waits


class Recorder:
    """While it is open, what a training run writes into its folder goes to MLflow.

    Open it while the run folder's lock is held and after its Journal, which cuts torn rows off. A store that is down,
    locked or slow costs a warning; nothing is lost, for the journal has it. Where this process is killed, the other one
    notices, ships the rest and marks the run so.
    """

    def __init__(
        self, root: Path, run_folder: Path, identity: dict[str, Any], tags: dict[str, str], tick_s: float = 5.0
    ) -> None:
        """Raises InputError, before anything is begun, where the store's address is one that cannot be used."""
        require_usable(root)
        self._run_folder = run_folder
        self._arguments = [str(root.absolute()), str(run_folder.absolute()), str(tick_s)]
        self._start = {"identity": identity, "tags": tags}

    def __enter__(self) -> Self:
        path = os.pathsep.join([str(SOURCE_ROOT), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", recorder.__name__, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            process_group=0,  # Ctrl-C is for training alone; in a session of its own a low priority counts for nothing
            text=True,
        )
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)  # training comes first, from the first import on
        write_text(self._run_folder / recorder.OWNER_PID, str(self._process.pid))
        assert self._process.stdin is not None, "a pipe, as asked for"
        self._process.stdin.write(json.dumps(self._start) + "\n")
        self._process.stdin.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            wait_s = INTERRUPTED_S if isinstance(error, Interrupted | PeerLost) else LAST_CALL_S
            self._process.communicate(json.dumps(ending(error)), timeout=wait_s)
        except subprocess.TimeoutExpired:
            print("MLflow gets the rest of the run in the background", file=sys.stderr)
        else:
            if self._process.returncode:
                print("warning: MLflow lacks a part of the run: `dvc repro -f -s register` sends it", file=sys.stderr)


def ending(error: BaseException | None) -> dict[str, str]:
    """How a run ended, in MLflow's word and in ours."""
    if error is None:
        return {"status": "FINISHED", "ended": "done"}
    if isinstance(error, Pruned):
        return {"status": "FINISHED", "ended": f"PRUNED: {first_line(error)}"}
    stopped = isinstance(error, Interrupted | PeerLost | KeyboardInterrupt)
    return {"status": "KILLED" if stopped else "FAILED", "ended": f"{type(error).__name__}: {first_line(error)}"}
