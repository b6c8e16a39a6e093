"""Run a stage or a command; report each error that a user can cause as one line on stderr and an exit code."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from pipeline.system.errors import (
    BROKEN_PIPE,
    DISK_FULL,
    InputError,
    Interrupted,
    OutOfSpaceError,
    PeerLost,
    PipelineError,
)
from pipeline.system.signals import die_with_dvc

RANK_0_REPORTS_WITHIN_S = 30
STAGES = Path(__file__).parents[2] / "stages"


def run_stage(main: Callable[[], None]) -> None:
    """Run `main` and exit with its code. `main` contains its imports, so that their errors are reported too."""
    die_with_dvc()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # also in a log, which shows the progress
    code = exit_code_of(main)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C arrives while Python exits
    sys.exit(code)


def exit_code_of(main: Callable[[], None]) -> int:
    """Run `main` and return 0; on an error, print it as one line and return its exit code."""
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # torch reads it when it is imported, and says what lacks
    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # set by `end_quietly`, for the imports up to here
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if find_spec("fcntl") is None:  # Windows; this file and its imports also load there, with Python alone
            raise InputError("this program runs on Linux and macOS: on Windows, run it in WSL 2")
        if Path(sys.path[0]).resolve() == STAGES:  # tokenize.py would replace Python's own module
            raise InputError(
                "this is the folder stages/: run `python -m stages.NAME` from its parent, the project's folder"
            )
        main()
    except PipelineError as error:
        line = f"error: {error}"
        if os.environ.get("RANK", "0") == "0" or isinstance(error, OutOfSpaceError | PeerLost):
            print(line, file=sys.stderr)
        elif not isinstance(error, Interrupted):  # a signal stops every process, and torchrun waits for all
            time.sleep(RANK_0_REPORTS_WITHIN_S)  # if rank 0 reports the same error, torchrun ends this process
            print(line, file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "pipeline").startswith(("pipeline", "stages", "webapp")):
            raise
        print(f"error: {sys.executable} has no {error.name}: activate .venv, which `make repro` makes", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno in DISK_FULL:
            where = "" if error.filename is None else f" in {error.filename}"
            print(f"error: disk full{where}: make room and run the same command again", file=sys.stderr)
            return 5
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {(error.strerror or str(error)).lower()}: fix it and repeat", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        print("error: out of memory: close other programs or choose a smaller recipe", file=sys.stderr)
        return 5
    except KeyboardInterrupt:
        print("error: interrupted: run the same command again to repeat it", file=sys.stderr)
        return 130
    return 0


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch raised `error` because the GPU or the CPU is out of memory."""
    return re.search("out of memory|allocate memory|Invalid buffer size", str(error)) is not None
