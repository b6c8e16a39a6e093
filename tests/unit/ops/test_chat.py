"""The terminal: what is shown is the text, and nothing that a terminal would obey."""

import pytest

from pipeline.model.generator import Piece
from pipeline.model.sampling import Sampling
from pipeline.ops import chat as terminal
from pipeline.system.errors import InputError


class Scripted:
    """Writes the same pieces after every prompt; a prompt `stop` is interrupted, a prompt `bad` refused."""

    def __init__(self, *texts, notice=None):
        self.pieces = [Piece(0, [1], text, None, notice) for text in texts]

    def stream(self, prompts, sampling):
        if prompts == ["bad"]:
            raise InputError("a bad prompt")
        yield from self.pieces
        if prompts == ["stop"]:
            raise KeyboardInterrupt


def answers(monkeypatch, *lines):
    left = list(lines)

    def asked(_):
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr("builtins.input", asked)


def test_the_prompt_and_its_continuation_are_shown_and_notices_stand_apart(capsys):
    terminal.show(Scripted(" I am", " here", notice="it slides"), "ROMEO:", Sampling())
    shown = capsys.readouterr()
    assert shown.out == "ROMEO: I am here\n"
    assert "it slides" in shown.err


@pytest.mark.security
def test_what_a_model_writes_cannot_command_the_terminal(capsys):
    terminal.show(Scripted("\x1b[2J\x07", "a\tb\n\u202ec"), "x", Sampling())
    assert capsys.readouterr().out == "x�[2J�a\tb\n�c\n"


def test_prompts_are_asked_for_until_the_end_of_input(capsys, monkeypatch):
    answers(monkeypatch, r"one\ntwo", "stop", "bad", "last")
    terminal.converse(Scripted("!"), Sampling())
    shown = capsys.readouterr()
    assert shown.out == "one\ntwo!\nstop!\nlast!\n\n"
    assert "error: a bad prompt" in shown.err
