"""Read the texts of JSON Lines, CSV, TSV and Parquet files: one column of each row."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from typing import BinaryIO

from pipeline.system.errors import InputError, IntegrityError, one_line

MAX_ROW_BYTES = 1 << 26  # a row is held in memory as a whole
SAMPLE_ROWS = 100  # of CSV: a column of numbers in these is not a column of texts
BATCH_ROWS = 64  # of Parquet
BUFFER_BYTES = 1 << 20  # of Parquet
DELIMITERS = ",;\t|"  # of CSV: the most frequent one in the first line
RECORD = 'a record is {"text": "..."}'
QUOTES = 'write a field with a delimiter, a quote or a line break in quotes, and " in it as ""'

Rows = Iterator[tuple[str, str, str]]  # the place of a row, for messages, the column that is read, and its text


def read_jsonl(file: BinaryIO, name: str, column: str | None) -> Rows:
    """Yield the text of each line that is not blank. Raises InputError."""
    key = None
    for number, line in _lines(file, name):
        if not (line := line.removeprefix("\ufeff")).strip():
            continue
        where = f"{name} line {number}"
        if number == 1 and line.lstrip().startswith("["):
            raise InputError(f"{where} begins a JSON array: write one record per line, {RECORD}")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{where} is not JSON: write one record per line") from None
        if not isinstance(record, dict):
            raise InputError(f"{where} has no text: {RECORD}")
        if key is None:
            key = _choose({field: isinstance(value, str | None) for field, value in record.items()}, column, where)
        if column is None and key != "text" and isinstance(record.get("text"), str):
            raise InputError(f"{where} has the column 'text', but {key!r} was read before: set corpus.column")
        if not isinstance(text := record.get(key, 0), str | None):
            raise InputError(f'{where} has no text: a record is {{{json.dumps(key)}: "..."}}')
        yield where, key, text or ""


def read_csv(file: BinaryIO, name: str, column: str | None, delimiters: str = DELIMITERS) -> Rows:
    """Yield the text of each row below the header. Raises InputError."""
    lines = (line for _, line in _lines(file, name))
    header = next(lines, "").removeprefix("\ufeff")
    csv.field_size_limit(MAX_ROW_BYTES)
    rows = _csv_rows(chain([header], lines), name, delimiter=max(delimiters, key=header.count))
    _, names = next(rows, ("", []))
    sample = list(islice(rows, SAMPLE_ROWS))
    if not sample:
        return
    are_numbers = (all(_is_number(row[i]) for _, row in sample) for i in range(len(names)))
    holds_texts = {key: key in (column, "text") or not numbers for key, numbers in zip(names, are_numbers, strict=True)}
    index = names.index(chosen := _choose(holds_texts, column, name))
    for where, row in chain(sample, rows):
        yield where, chosen, row[index]


def read_tsv(file: BinaryIO, name: str, column: str | None) -> Rows:
    """Yield the text of each row below the header. Raises InputError."""
    return read_csv(file, name, column, "\t")


def _csv_rows(lines: Iterable[str], name: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the rows that are not blank, the header first, each with its place."""
    reader, n_fields = csv.reader(lines, delimiter=delimiter, strict=True), 0
    try:
        for row in reader:
            where = f"{name} line {reader.line_num}"
            if row and len(row) != (n_fields := n_fields or len(row)):
                raise InputError(f"{where} has {len(row)} fields, the header has {n_fields}: {QUOTES}")
            if row:
                yield where, row
    except csv.Error as error:
        raise InputError(f"{name} line {reader.line_num} is not CSV ({error}): {QUOTES}") from None


def read_parquet(file: BinaryIO, name: str, column: str | None) -> Rows:
    """Yield the text of each row; nulls are empty. Raises InputError, or IntegrityError if the file is corrupt."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def is_text(kind: pa.DataType) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return kind in (pa.string(), pa.large_string(), pa.string_view())

    number = 0
    try:
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES) as table:
            chosen = _choose({field.name: is_text(field.type) for field in table.schema_arrow}, column, name)
            for batch in table.iter_batches(BATCH_ROWS, columns=[chosen], use_threads=False):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield f"{name} row {number}", chosen, text or ""
    except UnicodeDecodeError:
        raise InputError(f"{name} is not UTF-8 after row {number}: write the table again, in UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(
            f"{name} is truncated or corrupt ({one_line(error)}): download or write it again"
        ) from None


def _choose(holds_texts: Mapping[str, bool], column: str | None, where: str) -> str:
    """The column to read: `column`, or, if that is None, `text`, or the only column of texts.

    `holds_texts`: column -> whether its values are strings. Raises InputError if there is no such column, or no
    column of texts at all.
    """
    texts = [name for name, holds in holds_texts.items() if holds]
    choice = column or ("text" if "text" in texts or len(texts) != 1 else texts[0])
    if choice in texts:
        return choice
    what = "holds no text in the column" if choice in holds_texts else "has no column"
    if not texts:
        raise InputError(f"{where} {what} {choice!r}, and no other column of texts: {RECORD}")
    names = ", ".join(map(repr, texts[:20])) + ", ..." * (len(texts) > 20)
    raise InputError(f"{where} {what} {choice!r}: set corpus.column to one of {names}")


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line. Raises InputError if a line is too long or is not UTF-8."""
    offset = 0
    for number, raw in enumerate(iter(partial(file.readline, MAX_ROW_BYTES + 1), b""), start=1):
        if len(raw) > MAX_ROW_BYTES:
            raise InputError(
                f"{name} line {number} has more than {MAX_ROW_BYTES:,} bytes: save this text in its own file"
            )
        try:
            yield number, raw.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 at byte {offset + error.start}: save it as UTF-8 text") from None
        offset += len(raw)


def _is_number(field: str) -> bool:
    try:
        float(field or 0)
    except ValueError:
        return False
    return True
