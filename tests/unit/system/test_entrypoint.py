"""Each event ends a command with one line and its exit code; signals are waited for."""

import os
import signal

import pytest

from pipeline.system.entrypoint import exit_code_of
from pipeline.system.errors import (
    DivergedError,
    InputError,
    IntegrityError,
    Interrupted,
    ModelMissing,
    OutOfSpaceError,
    RunLocked,
)
from pipeline.system.signals import StopSignals


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("x"), 2),
        (IntegrityError("x"), 3),
        (DivergedError("x"), 4),
        (OutOfSpaceError("x"), 5),
        (MemoryError(), 5),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), 5),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), 5),
        (RunLocked("x"), 6),
        (ModelMissing("x"), 7),
        (Interrupted("x", signal.SIGTERM), 143),
        (Interrupted("x", signal.SIGINT), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_event_has_its_exit_code_and_one_line(error, code, capsys):
    def fail():
        raise error

    assert exit_code_of(fail) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_success_is_zero_and_a_bug_is_not_swallowed():
    assert exit_code_of(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        exit_code_of(lambda: 1 / 0)


def test_a_module_of_ours_that_is_missing_is_a_bug():
    with pytest.raises(ModuleNotFoundError):
        exit_code_of(lambda: __import__("pipeline.no_such_module"))


def test_a_file_that_cannot_be_written_is_named_in_a_line(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    assert exit_code_of(lambda: (tmp_path / "there").write_text("x")) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'there'}: is a directory")
    assert said.count("\n") == 1


def test_signals_that_come_together_count_as_one():  # a dying DVC sends one for each of its threads
    with StopSignals() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    with pytest.raises(Interrupted, match="SIGTERM at step 3: run the same command again"):
        stop.raise_if_received("at step 3")


def test_a_signal_that_comes_again_acts_at_once(monkeypatch, interruptible):
    monkeypatch.setattr(StopSignals, "SAME_S", 0.0)
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
