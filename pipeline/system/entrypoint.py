"""Run a stage or a command; report each error that a user can cause as one line on stderr and an exit code."""

import argparse
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from pipeline.system.errors import (
    BROKEN_PIPE,
    DISK_FULL,
    InputError,
    Interrupted,
    OutOfSpaceError,
    PeerLost,
    PipelineError,
)
from pipeline.system.signals import Signalled, SignalsAsErrors, die_with_dvc

RANK_0_REPORTS_WITHIN_S = 30
STAGES = Path(__file__).parents[2] / "stages"


class Parser(argparse.ArgumentParser):
    """A parser of arguments that raises InputError instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        fault = " ".join(message.removeprefix("argument ").split())
        raise InputError(f"{fault}: `{self.prog} --help` shows what is possible")


def run_stage(main: Callable[[], None]) -> None:
    """Run `main` and exit with its code. `main` contains its imports, so that their errors are reported too."""
    die_with_dvc()

    def stage() -> None:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # in a log, which shows the progress
        main()

    code = exit_code_of(stage)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C arrives while Python exits
    sys.exit(code)


def exit_code_of(main: Callable[[], None]) -> int:
    """Run `main` and return 0; on an error, print it as one line and return its exit code."""
    _prepare_streams()
    try:
        return _report(main)
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # reported already, or less than another error; Python would try again at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _prepare_streams() -> None:
    """Replace the standard streams that are closed, and write what the encoding of stdout lacks as escapes."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # as by `>&-`
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 (it has the descriptor of the closed one)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python itself does for stderr


def _report(main: Callable[[], None]) -> int:
    """Run `main` and write what it has printed, and return 0; on an error, print one line and return its exit code."""
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
        with SignalsAsErrors():
            main()
            sys.stdout.flush()
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
    except KeyboardInterrupt as error:
        by, code = (f" by {error}", error.exit_code) if isinstance(error, Signalled) else ("", 130)
        print(f"error: interrupted{by}: run the same command again to repeat it", file=sys.stderr)
        return code
    return 0


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch raised `error` because the GPU or the CPU is out of memory."""
    return re.search("out of memory|allocate memory|Invalid buffer size", str(error)) is not None
