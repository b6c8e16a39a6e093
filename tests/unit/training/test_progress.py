"""The progress of a run without a terminal: lines of text."""

from contextlib import closing

from pipeline.tracking.journal import StepRecord
from pipeline.training import progress as module
from pipeline.training.progress import Progress


def record(step, **losses):
    return StepRecord(step=step, tokens=100 * step, loss=1.0, grad_norm=1.0, lr=0.1, step_s=0.5, **losses)


def test_a_line_is_printed_at_the_first_step_and_at_evaluations(capsys):
    with closing(Progress(0, 0, 10, 0.1)) as progress:
        for step in range(1, 11):
            progress.show(record(step, corpus_loss=0.5 if step % 5 == 0 else None))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 1/10: loss 1.0000, target 0.1, 200 tokens/s, at most 4 s left",
        "step 5/10: loss 1.0000, corpus loss 0.5000, target 0.1, 200 tokens/s, at most 2 s left",
        "step 10/10: loss 1.0000, corpus loss 0.5000, target 0.1, 200 tokens/s, at most 0 s left",
    ]


def test_a_resumed_run_counts_only_its_new_tokens(capsys):
    with closing(Progress(8, 800, 10, 0.1)) as progress:
        progress.show(record(9))
    assert "200 tokens/s" in capsys.readouterr().out


def test_a_trial_has_a_line_a_minute_with_its_name_and_what_it_spent(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    progress = Progress(0, 0, 300, 0.1, "trial 7")
    for step in range(1, 151):  # of a second each
        now[0] += 1.0
        progress.show(record(step, corpus_loss=0.5 if step % 40 == 0 else None))
    assert capsys.readouterr().out.splitlines() == [
        f"trial 7: {100 * step:,} tokens, step {step}/300: loss 1.0000{evaluated}, target 0.1, 200 tokens/s, "
        f"at most {left} s left"
        for step, evaluated, left in ((60, "", 120), (120, ", corpus loss 0.5000", 90))
    ]
