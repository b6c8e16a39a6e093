"""Each error ends a command with one line and its exit code; a signal stops it after the current step."""

import errno
import os
import signal
import sys
import tempfile

import pytest

from pipeline import end_quietly
from pipeline.system import errors
from pipeline.system.entrypoint import exit_code_of
from pipeline.system.errors import Interrupted
from pipeline.system.signals import StopSignals
from stages import train


def raising(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InputError("x"), 2),
        (errors.IntegrityError("x"), 3),
        (errors.DivergedError("x"), 4),
        (errors.OutOfSpaceError("x"), 5),
        (errors.RunLocked("x"), 6),
        (errors.ModelMissing("x"), 7),
        (errors.TargetNotReached("x"), 8),
        (Interrupted("x", signal.SIGTERM), 143),
        (Interrupted("x", signal.SIGINT), 130),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 5),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), 5),
        (RuntimeError("Invalid buffer size: 20.48 GiB"), 5),  # of MPS
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), 5),
        (IsADirectoryError(21, "Is a directory", "there"), 2),
        (OSError(errno.ENOSPC, "No space left on device", "there"), 5),
        (OSError(errno.EFBIG, "File too large"), 5),  # of write and fsync, which name no file
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 5),
    ],
)
def test_each_error_has_its_exit_code_and_one_line(error, code, capsys):
    assert exit_code_of(raising(error)) == code
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    if isinstance(error, OSError) and code == 5:
        where = " in there" if error.filename else ""
        assert printed == f"error: disk full{where}: make room and run the same command again\n"
    elif isinstance(error, OSError):
        assert printed == "error: there: is a directory: fix it and repeat\n"


@pytest.mark.parametrize("bug", [ZeroDivisionError(), RuntimeError("x"), ModuleNotFoundError(name="pipeline.x")])
def test_success_is_zero_and_a_bug_is_raised(bug, monkeypatch):
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK", raising=False)
    assert exit_code_of(lambda: None) == 0
    assert os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
    with pytest.raises(type(bug)):
        exit_code_of(raising(bug))


def test_a_wrong_argument_of_a_stage_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--fast"])
    assert exit_code_of(train.main) == 2
    what = "unrecognized arguments: --fast: `python -m stages.train --help` shows what is possible"
    assert capsys.readouterr().err == f"error: {what}\n"


def test_signals_within_a_second_count_as_one(monkeypatch):  # a dying DVC sends one for each of its threads
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(Interrupted, match="SIGTERM at step 3: run the same command again"):
        stop.raise_if_received("at step 3")
    monkeypatch.setenv("SUBMITIT_FOLDER", "checkpoints/jobs/train-1")
    with pytest.raises(Interrupted, match="SIGTERM at step 3: Slurm runs it again to resume, unless the job was"):
        stop.raise_if_received("at step 3")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_temporary_files_and_ignored_ones_stay_ignored(number, tmp_path, interruptible, capsys):
    def work():
        with tempfile.TemporaryDirectory(dir=tmp_path):
            signal.raise_signal(number)
            signal.raise_signal(number)  # of the same death of a parent

    before = signal.signal(number, signal.SIG_IGN)
    assert exit_code_of(work) == 0
    signal.signal(number, before)
    assert exit_code_of(work) == 128 + number
    assert not any(tmp_path.iterdir())
    assert signal.getsignal(number) == before == signal.SIG_DFL
    line = f"error: interrupted by {number.name}: run the same command again to repeat it\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_ctrl_c_ends_the_first_imports_quietly_and_is_reported_from_then_on(before, interruptible):
    signal.signal(signal.SIGINT, before)
    end_quietly()
    assert signal.getsignal(signal.SIGINT) == (signal.SIG_IGN if before == signal.SIG_IGN else signal.SIG_DFL)
    assert exit_code_of(lambda: None) == 0
    assert signal.getsignal(signal.SIGINT) == before
