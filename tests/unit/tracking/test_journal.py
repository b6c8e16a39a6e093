"""The journal: records are appended, incomplete lines removed, and repeated steps compared."""

import errno
import io
import json
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.system.errors import InputError, IntegrityError, OutOfSpaceError
from pipeline.tracking.journal import STEPS, TIMES, Journal, StepRecord, read_steps, varying, write_lines
from pipeline.tracking.mlflow_runs import JournalTail


def record(step, loss=2.5, train_s=1.0):
    times = {"step_s": 1.0, "train_s": train_s, "wall_s": 2.0, "memory_bytes": 5, "logged_ms": 7}
    return StepRecord(step, 10 * step, loss, grad_norm=1.0, lr=0.1, **times)


def append(folder, *records):
    journal = Journal(folder)
    for each in records:
        journal.append(each)
    journal.close()


@pytest.fixture
def folder(tmp_path):
    append(tmp_path, *(record(step, train_s=float(step)) for step in (1, 2, 3)))
    return tmp_path


def test_records_are_appended_with_all_their_bits_and_read_as_a_data_frame(folder):
    append(folder, record(4, loss=0.1 + 0.2))
    assert [(r.step, r.loss) for r in Journal(folder).records] == [(1, 2.5), (2, 2.5), (3, 2.5), (4, 0.1 + 0.2)]
    frame = read_steps(folder / STEPS)
    assert frame["tokens"].tolist() == [10, 20, 30, 40]
    assert frame.loc[2, "loss"] == 2.5


@pytest.mark.parametrize("name", [STEPS, TIMES])
def test_a_line_without_its_line_break_is_removed_from_both_files(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    before = [(folder / each).read_bytes() for each in (STEPS, TIMES)]
    assert len(Journal(folder).records) == 2
    assert [(folder / each).read_bytes() for each in (STEPS, TIMES)] == before  # reading changes nothing
    append(folder, record(3))
    assert [r.step for r in Journal(folder).records] == [1, 2, 3]


NESTED = b"[" * 100_000 + b"\n"
NOISE = [b"\xff\n", b"\0\0\0\n", NESTED, b"null\n", b"[4]\n", b'{"step": 4}\n', b"\n", b"\xe2\x80\xa8"]


@settings(max_examples=20, deadline=None)
@example(noise=NESTED, at=1, name=STEPS)
@example(noise=b'{"step": 2}\n', at=1, name=STEPS)
@given(
    noise=st.binary(max_size=40) | st.sampled_from(NOISE),
    at=st.integers(0, 3),
    name=st.sampled_from([STEPS, TIMES]),
)
def test_records_before_any_other_bytes_are_kept_and_more_can_be_appended(tmp_path_factory, noise, at, name):
    folder = tmp_path_factory.getbasetemp() / "noise"
    folder.mkdir(exist_ok=True)
    for file in (STEPS, TIMES):
        lines = [json.dumps(record(i).line(file)).encode() + b"\n" for i in (1, 2, 3)]
        lines[at:at] = [noise] if file == name else []
        (folder / file).write_bytes(b"".join(lines))
    kept = [each.step for each in Journal(folder).records]
    assert kept == [1, 2, 3][: len(kept)]
    assert len(kept) >= at if noise else len(kept) == 3
    append(folder, *map(record, range(len(kept) + 1, 5)))
    assert [each.step for each in Journal(folder).records] == [1, 2, 3, 4]
    assert len((folder / STEPS).read_bytes().splitlines()) == len((folder / TIMES).read_bytes().splitlines()) == 4


@pytest.mark.parametrize("value", ["x", None, True, [1.0], float("nan"), float("inf"), 10**400])
@pytest.mark.parametrize("key", ["loss", "corpus_loss"])
def test_a_line_with_a_value_that_is_not_a_finite_number_ends_the_journal(folder, key, value):
    first, _, third = (folder / STEPS).read_text().splitlines(keepends=True)
    (folder / STEPS).write_text(first + json.dumps({**record(2).line(STEPS), key: value}) + "\n" + third)
    assert len(Journal(folder).records) == 1


class FullDisk(io.RawIOBase):
    """A file on a disk without room, as /dev/full is on Linux."""

    def writable(self):
        return True

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_reported_once(folder):  # A6
    journal = Journal(folder)
    journal._files[STEPS].close()
    journal._files[STEPS] = io.TextIOWrapper(io.BufferedWriter(FullDisk()))
    with pytest.raises(OutOfSpaceError, match=r"disk full in .* bytes free"):
        journal.append(record(4))
    journal.close()  # does not raise the same error again


def test_a_repeated_step_must_be_equal_and_keeps_its_first_times(folder):
    append(folder, again := record(3, train_s=99.0))
    assert again.train_s == Journal(folder).records[2].train_s == 3.0
    with pytest.raises(IntegrityError, match=r"step 3 gave .* after the resume, but"):
        append(folder, record(3, loss=2.5000000001))
    assert len((folder / STEPS).read_text().splitlines()) == 3


@dataclass
class WithToy(StepRecord):
    """A record with two more metrics, one of them only at some steps."""

    toy: float | None = None
    toy_s: float | None = varying(None)


def test_a_new_field_of_the_record_is_written_under_its_own_name(tmp_path):
    append(tmp_path, WithToy(**vars(record(1)), toy=0.5, toy_s=2.0), WithToy(**vars(record(2))))
    steps, times = read_steps(tmp_path / STEPS), read_steps(tmp_path / TIMES)
    assert steps["toy"].dropna().to_dict() == {1: 0.5}
    assert times["toy_s"].dropna().to_dict() == {1: 2.0}
    assert not {"toy", "train_s"} & set(times) & set(steps)
    assert [r.step for r in Journal(tmp_path).records] == [1, 2]


def test_the_journal_of_earlier_code_is_read(tmp_path):
    lines = {
        STEPS: '"tokens": 2048, "loss": 11.1, "grad_norm": 73.7, "lr": 0.0016, "validation_loss": 9.5}\n',
        TIMES: '"step_s": 0.9, "train_s": 0.9, "wall_s": 1.0, "memory_bytes": 784, "logged_ms": 1795864324290}\n',
    }
    for name, line in lines.items():
        (tmp_path / name).write_text('{"step": 1, ' + line)
    (read,) = Journal(tmp_path).records
    assert (read.loss, read.validation_loss, read.corpus_loss, read.wall_s) == (11.1, 9.5, None, 1.0)
    for name, line in lines.items():
        write_lines(tmp_path / name, [read.line(name)])
        assert (tmp_path / name).read_text() == '{"step": 1, ' + line


def test_a_missing_journal_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match="contains no steps: run `dvc repro train`"):
        read_steps(tmp_path / STEPS)


def test_the_tail_returns_records_once_both_their_lines_are_complete(folder):
    tail = JournalTail(folder)
    with (folder / STEPS).open("a") as file:
        file.write('{"step": 4, "tokens": 45, "loss": 1.0}\n{"step": 5, "tok')
    assert [values["step"] for values in tail.read()] == [1, 2, 3]
    assert tail.read() == []
    with (folder / TIMES).open("a") as file:
        file.write('{"step": 4, "step_s": 0.5, "logged_ms": 1}\n')
    assert [values["tokens_per_s"] for values in tail.read()] == [30.0]  # 15 in half a second
