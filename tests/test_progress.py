"""Progress: plain lines, now and then, where there is no terminal."""

from pipeline.progress import Progress


def test_lines_come_first_at_looks_and_last_but_not_at_every_step(capsys):
    progress = Progress(0, 10, 0.1)
    for step in range(1, 11):
        row = {"step": step, "loss": 1.0} | ({"corpus_loss": 0.5} if step == 5 else {})
        progress.show(row, 100, 0.5, last=step == 10)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 1/10: loss 1.0000, target 0.1, 200 tokens/s, at most 4 s left",
        "step 5/10: loss 1.0000, corpus loss 0.5000, target 0.1, 200 tokens/s, at most 2 s left",
        "step 10/10: loss 1.0000, target 0.1, 200 tokens/s, at most 0 s left",
    ]
