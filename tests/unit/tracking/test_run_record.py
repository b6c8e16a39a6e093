"""The records of a run and of its model's evaluation belong together, or are refused."""

import json

import pytest

from pipeline.system.errors import InputError, IntegrityError
from pipeline.tracking.run_record import RUN_KEYS, read_metrics, read_run

RUN = dict.fromkeys(RUN_KEYS, "x")


def test_records_of_one_run_are_read(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "metrics.json").write_text('{"fingerprint": "x", "corpus_loss": 1}')
    assert read_metrics(tmp_path, read_run(tmp_path))["corpus_loss"] == 1


@pytest.mark.parametrize("value", [[], "run", dict.fromkeys(RUN_KEYS - {"params"}, "x")])
def test_a_file_that_is_not_a_runs_record_is_refused(tmp_path, value):
    (tmp_path / "run.json").write_text(json.dumps(value))
    with pytest.raises(IntegrityError, match=r"run\.json is not the record of a run: `dvc repro`"):
        read_run(tmp_path)


def test_a_missing_record_says_what_makes_it(tmp_path):
    with pytest.raises(InputError, match=r"run\.json not found: run `dvc repro`"):
        read_run(tmp_path)


@pytest.mark.parametrize("value", [{}, [], {"fingerprint": "another"}])
def test_metrics_of_another_run_are_refused(tmp_path, value):
    (tmp_path / "metrics.json").write_text(json.dumps(value))
    with pytest.raises(IntegrityError, match=r"metrics\.json is not about the run x"):
        read_metrics(tmp_path, RUN)
