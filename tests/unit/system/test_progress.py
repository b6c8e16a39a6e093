"""The progress of long work: lines in a log, a bar on a terminal."""

import io
import sys

import pytest
from tqdm import std

from pipeline.system.progress import Bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The time that tqdm sees, in seconds."""
    now = [0.0]
    monkeypatch.setattr(std, "time", lambda: now[0])
    monkeypatch.setattr(Bar, "monitor_interval", 0)  # its thread would use the real time
    return now


def work(clock, steps, **options):
    with Bar(total=steps, desc="evaluate", unit="tokens", **options) as bar:
        for _ in range(steps):
            clock[0] += 1.0
            bar.update()
            bar.refresh()  # as libraries do, to change the description


def test_a_log_gets_a_line_every_five_seconds_and_none_for_short_work(clock, capsys):
    work(clock, 12)
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "evaluate: 5 of 12 tokens in 00:05, 00:07 left",
        "evaluate: 10 of 12 tokens in 00:10, 00:02 left",
    ]
    assert err == ""
    work(clock, 4)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    work(clock, 12)
    assert capsys.readouterr().out == ""
    assert terminal.getvalue().count("\r") > 1
    assert "12/12" in terminal.getvalue()
