"""The question before a training."""

import io

from pipeline.ops.learn import learn


def test_the_end_of_the_input_is_a_no(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", terminal := io.StringIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    learn(None, in_place=False, assume_yes=False)
    assert capsys.readouterr().out.splitlines() == ["Train it? [Y/n] ", "nothing was changed"]
