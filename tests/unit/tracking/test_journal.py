"""The journal: append-only, torn rows cut off, replayed rows compared."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.system.errors import InputError, IntegrityError, OutOfSpaceError
from pipeline.tracking.journal import STEPS, TIMES, Journal, read_steps


def row(step, loss=2.5):
    return {"step": step, "tokens": 10 * step, "loss": loss, "grad_norm": 1.0, "lr": 0.1}


def times(step, train_s=1.0):
    return {"step": step, "step_s": 1.0, "train_s": train_s, "wall_s": 2.0, "memory_bytes": 5, "logged_ms": 7}


@pytest.fixture
def folder(tmp_path):
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.append(row(step), times(step, train_s=float(step)))
    journal.close()
    return tmp_path


def test_rows_are_read_back_as_a_data_frame(folder):
    frame = read_steps(folder / STEPS)
    assert frame["tokens"].tolist() == [10, 20, 30]
    assert frame.loc[2, "loss"] == 2.5


def test_a_journal_goes_on_where_it_ended(folder):
    journal = Journal(folder)
    journal.append(row(4), times(4))
    journal.close()
    assert [r["step"] for r in Journal(folder).steps] == [1, 2, 3, 4]


@pytest.mark.fault
@pytest.mark.parametrize("name", [STEPS, TIMES])
@pytest.mark.parametrize("cut", [1, 20])  # the line break alone; much of the row
def test_a_row_torn_by_a_kill_is_cut_off_in_both_files(folder, name, cut):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-cut])
    journal = Journal(folder)
    assert len(journal.steps) == len(journal.times) == 2
    journal.append(row(3), times(3))
    journal.close()
    assert [r["step"] for r in Journal(folder).steps] == [1, 2, 3]


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
    for file, rows in ((STEPS, [row(i) for i in (1, 2, 3)]), (TIMES, [times(i) for i in (1, 2, 3)])):
        lines = [json.dumps(each).encode() + b"\n" for each in rows]
        lines[at:at] = [noise] if file == name else []
        (folder / file).write_bytes(b"".join(lines))
    journal = Journal(folder)
    kept = [each["step"] for each in journal.steps]
    assert kept == [each["step"] for each in journal.times] == [1, 2, 3][: len(kept)]
    assert len(kept) >= at if noise else len(kept) == 3
    for step in range(len(kept) + 1, 5):
        journal.append(row(step), times(step))
    journal.close()
    assert [each["step"] for each in Journal(folder).steps] == [1, 2, 3, 4]
    assert len((folder / STEPS).read_bytes().splitlines()) == len((folder / TIMES).read_bytes().splitlines()) == 4


@pytest.mark.fault
@pytest.mark.parametrize("value", ["x", None, True, [1.0], float("nan"), float("inf"), 10**400])
@pytest.mark.parametrize("key", ["loss", "tokens", "corpus_loss"])
def test_a_row_with_something_else_than_numbers_is_none(folder, key, value):
    whole = (folder / STEPS).read_text().splitlines(keepends=True)
    (folder / STEPS).write_text(whole[0] + json.dumps({**row(2), key: value}) + "\n" + whole[2])
    assert len(Journal(folder).steps) == 1


@pytest.mark.fault
def test_a_row_that_the_disk_has_no_room_for_is_told_once(folder):  # A6
    journal = Journal(folder)
    journal._files[0].close()
    with open("/dev/full", "w") as journal._files[0]:
        with pytest.raises(OutOfSpaceError, match=r"disk full in .* bytes free"):
            journal.append(row(4), times(4))
        journal.close()  # and not once more, with a traceback


@pytest.mark.fault
def test_a_replayed_step_must_be_equal_and_keeps_its_first_time(folder):
    journal = Journal(folder)
    journal.append(row(3), times(3, train_s=99.0))
    assert journal.times[2]["train_s"] == 3.0
    with pytest.raises(IntegrityError, match="step 3 came out as"):
        journal.append(row(3, loss=2.5000000001), times(3))
    journal.close()
    assert len((folder / STEPS).read_text().splitlines()) == 3


def test_losses_keep_their_every_bit(folder):
    journal = Journal(folder)
    journal.append(row(4, loss=(exact := 0.1 + 0.2)), times(4))
    journal.close()
    assert Journal(folder).steps[3]["loss"] == exact


def test_no_journal_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match="holds no steps: run `dvc repro train`"):
        read_steps(tmp_path / STEPS)
