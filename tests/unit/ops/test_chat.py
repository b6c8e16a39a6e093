"""The chat in the terminal: it prints the text, and no control characters of the model."""

import io
import signal

import pytest

from pipeline.model.generator import Piece
from pipeline.model.sampling import Sampling
from pipeline.ops import chat
from pipeline.system.errors import InputError
from pipeline.system.signals import Signalled


class Scripted:
    """A generator with the same pieces for every prompt; `stop` and `end` interrupt it, `bad` is refused."""

    def __init__(self, *texts, notice=None):
        self.pieces = [Piece(0, [1], text, None, notice) for text in texts]

    def stream(self, prompts, sampling):
        if prompts == ["bad"]:
            raise InputError("a bad prompt")
        yield from self.pieces
        if prompts == ["stop"]:
            raise KeyboardInterrupt
        if prompts == ["end"]:
            raise Signalled(signal.SIGTERM)


def test_text_goes_to_stdout_without_control_characters_and_notices_to_stderr(capsys):
    chat.show(Scripted(" I am", " here", notice="the window slides"), "ROMEO:", Sampling())
    shown = capsys.readouterr()
    assert shown.out == "ROMEO: I am here\n"
    assert "the window slides" in shown.err
    chat.show(Scripted("\x1b[2J\x07", "a\tb\n\u202ec"), "x", Sampling())
    assert capsys.readouterr().out == "x�[2J�a\tb\n�c\n"
    chat.show(Scripted("!"), "caf\udce9", Sampling())  # an argument that is not UTF-8
    assert capsys.readouterr().out == "caf�!\n"


def test_prompts_are_read_until_the_end_of_input(capsys, monkeypatch):
    prompts = io.BytesIO(b"one\\ntwo\nstop\nbad\ncaf\xe9\nlast\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(prompts, encoding="utf-8"))
    chat.converse(Scripted("!"), Sampling())
    shown = capsys.readouterr()
    assert shown.out == "one\ntwo!\nstop!\ncaf�!\nlast!\n\n"
    assert "error: a bad prompt" in shown.err


def test_ctrl_c_ends_a_text_and_sigterm_the_chat(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"end\nmore\n"), encoding="utf-8"))
    with pytest.raises(Signalled, match="SIGTERM"):
        chat.converse(Scripted("!"), Sampling())
