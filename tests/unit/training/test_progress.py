"""Progress: plain lines, now and then, where there is no terminal."""

from pipeline.training.progress import Progress


def test_lines_come_first_and_at_looks_but_not_at_every_step(capsys):
    with Progress(0, 0, 10, 0.1) as progress:
        for step in range(1, 11):
            row = {"step": step, "tokens": 100 * step, "loss": 1.0} | ({"corpus_loss": 0.5} if step % 5 == 0 else {})
            progress.show(row, {"step_s": 0.5})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 1/10: loss 1.0000, target 0.1, 200 tokens/s, at most 4 s left",
        "step 5/10: loss 1.0000, corpus loss 0.5000, target 0.1, 200 tokens/s, at most 2 s left",
        "step 10/10: loss 1.0000, corpus loss 0.5000, target 0.1, 200 tokens/s, at most 0 s left",
    ]


def test_a_run_that_goes_on_counts_only_its_new_tokens(capsys):
    with Progress(8, 800, 10, 0.1) as progress:
        progress.show({"step": 9, "tokens": 900, "loss": 1.0}, {"step_s": 0.5})
    assert "200 tokens/s" in capsys.readouterr().out
