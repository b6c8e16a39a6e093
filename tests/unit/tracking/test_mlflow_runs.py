"""The journal's tail, which MLflow's records are read from."""

from fixtures_mlflow import append_steps

from pipeline.tracking.journal import STEPS, TIMES, Journal
from pipeline.tracking.mlflow_runs import JournalTail


def test_the_tail_returns_records_once_both_their_lines_are_complete(tmp_path):
    append_steps(Journal(tmp_path), 0, 3)
    tail = JournalTail(tmp_path)
    with (tmp_path / STEPS).open("a") as file:
        file.write('{"step": 4, "tokens": 32, "loss": 1.0}\n{"step": 5, "tok')
    assert [record["step"] for record in tail.read()] == [1, 2, 3]
    assert tail.read() == []
    with (tmp_path / TIMES).open("a") as file:
        file.write('{"step": 4, "step_s": 0.5, "logged_ms": 1}\n')
    assert [record["tokens_per_s"] for record in tail.read()] == [16.0]  # 8 in half a second
