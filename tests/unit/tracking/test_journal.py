"""The journal: append-only, torn lines cut off, replayed steps compared."""

import json
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.system.errors import InputError, IntegrityError, OutOfSpaceError
from pipeline.tracking.journal import STEPS, TIMES, Journal, StepRecord, read_steps, varying, write_rows


def record(step, loss=2.5, train_s=1.0):
    times = {"step_s": 1.0, "train_s": train_s, "wall_s": 2.0, "memory_bytes": 5, "logged_ms": 7}
    return StepRecord(step, 10 * step, loss, grad_norm=1.0, lr=0.1, **times)


@pytest.fixture
def folder(tmp_path):
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.append(record(step, train_s=float(step)))
    journal.close()
    return tmp_path


def test_rows_are_read_back_as_a_data_frame(folder):
    frame = read_steps(folder / STEPS)
    assert frame["tokens"].tolist() == [10, 20, 30]
    assert frame.loc[2, "loss"] == 2.5


def test_a_journal_goes_on_where_it_ended(folder):
    journal = Journal(folder)
    journal.append(record(4))
    journal.close()
    assert [r.step for r in Journal(folder).records] == [1, 2, 3, 4]


@pytest.mark.fault
@pytest.mark.parametrize("name", [STEPS, TIMES])
@pytest.mark.parametrize("cut", [1, 20])  # the line break alone; much of the row
def test_a_row_torn_by_a_kill_is_cut_off_in_both_files(folder, name, cut):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-cut])
    journal = Journal(folder)
    assert len(journal.records) == 2
    journal.append(record(3))
    journal.close()
    assert [r.step for r in Journal(folder).records] == [1, 2, 3]


NOISE = [b"\xff\n", b"\0\0\0\n", b"[" * 100_000 + b"\n", b"null\n", b"[4]\n", b'{"step": 4}\n', b"\n", b"\xe2\x80\xa8"]


@pytest.mark.fault
@settings(max_examples=100, deadline=None)
@given(
    noise=st.binary(max_size=40) | st.sampled_from(NOISE),
    at=st.integers(0, 3),
    name=st.sampled_from([STEPS, TIMES]),
)
def test_rows_before_any_bytes_in_a_journal_are_kept_and_it_goes_on_after_them(tmp_path_factory, noise, at, name):
    folder = tmp_path_factory.getbasetemp() / "noise"
    folder.mkdir(exist_ok=True)
    for file in (STEPS, TIMES):
        lines = [json.dumps(record(i).row(file)).encode() + b"\n" for i in (1, 2, 3)]
        lines[at:at] = [noise] if file == name else []
        (folder / file).write_bytes(b"".join(lines))
    journal = Journal(folder)
    kept = [each.step for each in journal.records]
    assert kept == [1, 2, 3][: len(kept)]
    assert len(kept) >= at if noise else len(kept) == 3
    for step in range(len(kept) + 1, 5):
        journal.append(record(step))
    journal.close()
    assert [each.step for each in Journal(folder).records] == [1, 2, 3, 4]
    assert len((folder / STEPS).read_bytes().splitlines()) == len((folder / TIMES).read_bytes().splitlines()) == 4


@pytest.mark.fault
@pytest.mark.parametrize("value", ["x", None, True, [1.0], float("nan"), float("inf"), 10**400])
@pytest.mark.parametrize("key", ["loss", "tokens", "corpus_loss"])
def test_a_row_with_something_else_than_numbers_is_none(folder, key, value):
    whole = (folder / STEPS).read_text().splitlines(keepends=True)
    (folder / STEPS).write_text(whole[0] + json.dumps({**record(2).row(STEPS), key: value}) + "\n" + whole[2])
    assert len(Journal(folder).records) == 1


@pytest.mark.fault
def test_a_row_that_the_disk_has_no_room_for_is_told_once(folder):  # A6
    journal = Journal(folder)
    journal._files[STEPS].close()
    with open("/dev/full", "w") as journal._files[STEPS]:
        with pytest.raises(OutOfSpaceError, match=r"disk full in .* bytes free"):
            journal.append(record(4))
        journal.close()  # and not once more, with a traceback


@pytest.mark.fault
def test_a_replayed_step_must_be_equal_and_keeps_its_first_time(folder):
    journal = Journal(folder)
    journal.append(again := record(3, train_s=99.0))
    assert again.train_s == journal.records[2].train_s == 3.0
    with pytest.raises(IntegrityError, match="step 3 came out as"):
        journal.append(record(3, loss=2.5000000001))
    journal.close()
    assert len((folder / STEPS).read_text().splitlines()) == 3


def test_losses_keep_their_every_bit(folder):
    journal = Journal(folder)
    journal.append(record(4, loss=(exact := 0.1 + 0.2)))
    journal.close()
    assert Journal(folder).records[3].loss == exact


@dataclass
class WithToy(StepRecord):
    """A record with two more metrics, one of them only at some steps."""

    toy: float | None = None
    toy_s: float | None = varying(None)


def test_a_field_that_is_added_to_the_record_goes_into_the_journal_under_its_own_name(tmp_path):
    journal = Journal(tmp_path)
    plain = vars(record(1))
    journal.append(WithToy(**plain, toy=0.5, toy_s=2.0))
    journal.append(WithToy(**{**plain, "step": 2}))
    journal.close()
    steps, times = read_steps(tmp_path / STEPS), read_steps(tmp_path / TIMES)
    assert steps["toy"].dropna().to_dict() == {1: 0.5}
    assert times["toy_s"].dropna().to_dict() == {1: 2.0}
    assert not {"toy", "train_s"} & set(times) & set(steps)
    assert [r.step for r in Journal(tmp_path).records] == [1, 2]


def test_the_journal_of_earlier_code_is_read(tmp_path):
    (tmp_path / STEPS).write_text(
        '{"step": 1, "tokens": 2048, "loss": 11.1, "grad_norm": 73.7, "lr": 0.0016, "validation_loss": 9.5}\n'
    )
    (tmp_path / TIMES).write_text(
        '{"step": 1, "step_s": 0.9, "train_s": 0.9, "wall_s": 1.0, "memory_bytes": 784, "logged_ms": 1795864324290}\n'
    )
    before = [(tmp_path / name).read_text() for name in (STEPS, TIMES)]
    (read,) = Journal(tmp_path).records
    assert (read.loss, read.validation_loss, read.corpus_loss, read.wall_s) == (11.1, 9.5, None, 1.0)
    write_rows(tmp_path / STEPS, [read.row(STEPS)])
    write_rows(tmp_path / TIMES, [read.row(TIMES)])
    assert before == [(tmp_path / name).read_text() for name in (STEPS, TIMES)]


def test_no_journal_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match="holds no steps: run `dvc repro train`"):
        read_steps(tmp_path / STEPS)
