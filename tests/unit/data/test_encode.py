"""The corpus -> token files: the same bytes however it is cut, by however many, however often it was killed."""

import fcntl
import threading
import tracemalloc
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from fixtures_tokenizer import _byte_tokenizer, _project  # noqa: F401 (fixtures)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.__main__ import tokenize
from pipeline.data import encode as module
from pipeline.data.corpus import write_documents
from pipeline.data.encode import Task, spans, write_tokens
from pipeline.data.token_files import TokenFolder, data_sha256
from pipeline.system import files
from pipeline.system.errors import InputError
from pipeline.system.files import UNFINISHED

LINES = "".join(f"Line {number} of the play, as it's spoken.\n" for number in range(100))
quickly = settings(max_examples=20, deadline=None)
hard_text = st.text("  \n\r\t\u00a0\u3000\x1c'srveLl1.-\u00e9\u6f22\U0001f600\0", max_size=80)


def text_of(tokenizer, folder: Path, part: str) -> str:
    tokens = getattr(TokenFolder(folder), part)
    return tokenizer.decode(tokens.read(0, len(tokens)).tolist())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(LINES)
    return path


# What is written


def test_the_whole_corpus_has_its_known_tokens(shakespeare, tokenizer, tmp_path):
    write_tokens(shakespeare, tokenizer, tmp_path / "tokens")
    tokens = TokenFolder(tmp_path / "tokens").train
    assert len(tokens) == 338_025
    assert np.count_nonzero(tokens.counts()) == 11_706
    assert tokens.read(0, len(tokens)).tolist() == tokenizer.encode(shakespeare.read_text())


@quickly
@given(fraction=st.floats(0.05, 1), val_fraction=st.floats(0, 0.8), chunk_bytes=st.integers(1, 5000))
def test_shares_end_with_a_line_and_lose_none_between_them(
    tmp_path_factory, tokenizer, fraction, val_fraction, chunk_bytes
):
    longest_line = 45
    assume(len(LINES) * fraction * (1 - val_fraction) > 2 * longest_line)  # less may hold no whole line: refused, below
    folder = tmp_path_factory.getbasetemp() / "shares"
    folder.mkdir(exist_ok=True)
    (folder / "corpus.txt").write_text(LINES)
    with patch.object(module, "BLOCK_BYTES", chunk_bytes):
        write_tokens(folder / "corpus.txt", tokenizer, folder / "tokens", fraction, val_fraction)
    train, val = (text_of(tokenizer, folder / "tokens", part) for part in ("train", "val"))
    assert LINES.startswith(train + val)
    assert train.endswith("\n")
    assert int(len(LINES) * fraction) - longest_line < len(train + val) <= len(LINES) * fraction
    assert len(val) == 0 if val_fraction == 0 else len(val) >= len(train + val) * val_fraction - 1e-6


def test_a_text_without_a_last_line_end_is_taken_whole(tmp_path, tokenizer):
    (tmp_path / "corpus.txt").write_text("one\ntwo")
    write_tokens(tmp_path / "corpus.txt", tokenizer, tmp_path / "tokens")
    assert text_of(tokenizer, tmp_path / "tokens", "train") == "one\ntwo"


def test_the_same_text_gives_the_same_bytes(corpus, tokenizer, tmp_path):
    for name in ("one", "two"):
        write_tokens(corpus, tokenizer, tmp_path / name, fraction=0.5, val_fraction=0.1)
    assert data_sha256(tmp_path / "one") == data_sha256(tmp_path / "two")
    write_tokens(corpus, tokenizer, tmp_path / "other", fraction=0.5, val_fraction=0.2)
    assert data_sha256(tmp_path / "one") != data_sha256(tmp_path / "other")


@pytest.mark.parametrize(("text", "fraction", "val_fraction"), [("one line", 0.5, 0), ("a\nb", 1, 0.9)])
def test_b3_a_share_without_a_whole_line_is_refused(tmp_path, tokenizer, text, fraction, val_fraction):
    (tmp_path / "corpus.txt").write_text(text)
    with pytest.raises(InputError, match=r"no whole line of .*corpus.txt is left to train on"):
        write_tokens(tmp_path / "corpus.txt", tokenizer, tmp_path / "tokens", fraction, val_fraction)
    assert not (tmp_path / "tokens").exists()


def test_a_text_of_documents_ends_with_a_whole_one_where_it_has_no_lines(tmp_path, tokenizer):
    (tmp_path / "corpus.txt").write_bytes(b"one\0two\0three\0four")
    write_tokens(tmp_path / "corpus.txt", tokenizer, tmp_path / "tokens", 0.7, 0.5)
    assert text_of(tokenizer, tmp_path / "tokens", "train") == "one<|endoftext|>"
    assert text_of(tokenizer, tmp_path / "tokens", "val") == "two<|endoftext|>"


@quickly
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30), min_size=1, max_size=5)
)
def test_b5_documents_come_back_from_the_tokens(tmp_path_factory, tokenizer, texts):
    texts = [text for text in (t.lstrip("\ufeff").replace("\r\n", "\n") for t in texts) if text] or ["a"]
    folder = tmp_path_factory.getbasetemp() / "documents"
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, newline="")
    members = {f"{number}.txt": folder / f"{number}.txt" for number in range(len(texts))}
    write_documents(members, folder / "corpus.txt", "texts")
    with patch.object(files, "fsync"):
        write_tokens(folder / "corpus.txt", tokenizer, folder / "tokens", shard_bytes=20)
    tokens = TokenFolder(folder / "tokens").train
    ids = tokens.read(0, len(tokens))
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.eot))
    assert [tokenizer.decode(part[part != tokenizer.eot].tolist()) for part in parts] == texts


# However it is cut, by however many


@settings(max_examples=60, deadline=None)
@given(text=hard_text | st.text("\u00a0\nx", max_size=20), size=st.integers(1, 12))
def test_spans_are_cut_where_nothing_changes_and_lose_nothing(tokenizer, text, size):
    data = text.encode()
    cut = list(spans(data, 0, len(data), size, tokenizer.cut))
    assert b"".join(data[start:stop] for start, stop in cut) == data
    assert all(stop - start >= size for start, stop in cut[:-1])
    ids = [i for start, stop in cut for i in tokenizer.encode_documents(data[start:stop]).tolist()]
    assert ids == tokenizer.encode_documents(data).tolist()


def test_another_tokenizers_text_is_cut_where_that_one_allows_it(tmp_path, byte_tokenizer):
    text = "Wind?\0" + "\u00e4" * 100  # no space: GPT-2's split would not cut it
    (tmp_path / "corpus.txt").write_bytes(text.encode())
    with patch.object(module, "BLOCK_BYTES", 7):
        write_tokens(tmp_path / "corpus.txt", byte_tokenizer, tmp_path / "tokens", shard_bytes=21)
    assert len(list((tmp_path / "tokens").glob("train-*.bin"))) == 10
    assert text_of(byte_tokenizer, tmp_path / "tokens", "train") == text.replace("\0", "<end>")


def test_shards_of_another_tokenizer_are_not_taken(corpus, tokenizer, byte_tokenizer, tmp_path):
    write_tokens(corpus, byte_tokenizer, tmp_path / "tokens", 1.0, 0.0, Task())
    write_tokens(corpus, tokenizer, tmp_path / "tokens")
    assert TokenFolder(tmp_path / "tokens").train.vocab_size == 50257


@quickly
@given(
    text=hard_text.filter(lambda text: text.strip("\0")),
    shard_bytes=st.integers(1, 60),
    block_bytes=st.integers(1, 30),
    workers=st.integers(1, 4),
    tasks=st.integers(1, 3),
)
def test_the_ids_are_the_same_however_the_text_is_cut_and_by_however_many(
    tmp_path_factory, tokenizer, text, shard_bytes, block_bytes, workers, tasks
):
    folder = tmp_path_factory.getbasetemp() / "cut"
    folder.mkdir(exist_ok=True)
    (folder / "corpus.txt").write_bytes(text.encode())
    with patch.object(module, "BLOCK_BYTES", block_bytes), patch.object(files, "fsync"):
        for number in reversed(range(tasks)):
            task = Task(number, tasks)
            write_tokens(folder / "corpus.txt", tokenizer, folder / "tokens", 1.0, 0.0, task, shard_bytes, workers)
        with patch.object(module, "write_shard", side_effect=AssertionError("a task has left one out")):
            write_tokens(folder / "corpus.txt", tokenizer, folder / "tokens", shard_bytes=shard_bytes)
    tokens = TokenFolder(folder / "tokens").train
    assert tokens.read(0, len(tokens)).tolist() == tokenizer.encode_documents(text.encode()).tolist()
    assert not list(folder.glob(f"{UNFINISHED}*"))


def test_the_bytes_are_the_same_by_one_and_by_four_at_once(shakespeare, tokenizer, tmp_path):
    for workers in (1, 4):
        folder = tmp_path / str(workers)
        write_tokens(shakespeare, tokenizer, folder, 1.0, 0.1, shard_bytes=200_000, workers=workers)
    assert data_sha256(tmp_path / "1") == data_sha256(tmp_path / "4")
    assert names(tmp_path / "1") == ["manifest.json", *(f"train-{i:05}.bin" for i in range(6)), "val-00000.bin"]


def test_a_text_is_never_in_memory_as_a_whole(tmp_path, tokenizer):
    (tmp_path / "corpus.txt").write_text(LINES * 1000)  # 4.3 MB, which as a list of ids would take 10 MB
    write_tokens(tmp_path / "corpus.txt", tokenizer, tmp_path / "tokens", fraction=0.01)  # what is made once
    with patch.object(module, "BLOCK_BYTES", 1 << 14):
        tracemalloc.start()
        write_tokens(tmp_path / "corpus.txt", tokenizer, tmp_path / "tokens", workers=2)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < 1_500_000  # a few blocks of 16 KiB


# Killed and resumed


def die_in_shard(number):
    """Stands for `write_shard`: the `number`-th call dies when half is written."""
    original, calls = module.write_shard, iter(range(100))

    def deadly(path, batches, vocab_size):
        if next(calls) == number:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        original(path, batches, vocab_size)

    return patch.object(module, "write_shard", deadly)


@pytest.mark.fault
@pytest.mark.parametrize("number", [0, 1, 3])
def test_b7_shards_that_were_finished_before_a_kill_are_not_made_again(corpus, tokenizer, tmp_path, number):
    write_tokens(corpus, tokenizer, tmp_path / "clean", shard_bytes=1000)
    with die_in_shard(number), pytest.raises(KeyboardInterrupt):
        write_tokens(corpus, tokenizer, tmp_path / "tokens", shard_bytes=1000)
    assert not (tmp_path / "tokens").exists()
    with patch.object(module, "write_shard", wraps=module.write_shard) as made:
        write_tokens(corpus, tokenizer, tmp_path / "tokens", shard_bytes=1000)
    assert made.call_count == len(names(tmp_path / "clean")) - 1 - number
    assert data_sha256(tmp_path / "tokens") == data_sha256(tmp_path / "clean")
    assert names(tmp_path) == ["clean", "corpus.txt", "tokens"]


@pytest.mark.fault
@pytest.mark.parametrize("fault", ["altered", "truncated", "without a note"])
def test_b7_a_finished_shard_that_is_not_as_it_was_written_is_made_again(corpus, tokenizer, tmp_path, fault):
    place = write_tokens(corpus, tokenizer, tmp_path / "tokens", 1.0, 0.0, Task(), 1000)
    shard = place / "tokens" / "train-00001.bin"
    data = shard.read_bytes()
    if fault == "without a note":
        (place / "train-00001.bin.json").unlink()
    else:
        shard.write_bytes(data[:-2] if fault == "truncated" else data[:-1] + b"\1")
    with patch.object(module, "write_shard", wraps=module.write_shard) as made:
        write_tokens(corpus, tokenizer, tmp_path / "tokens", shard_bytes=1000)
    assert made.call_count == 1
    assert (tmp_path / "tokens" / "train-00001.bin").read_bytes() == data


@pytest.mark.parametrize("changed", ["text", "fraction", "val_fraction", "shard_bytes"])
def test_shards_of_another_text_or_other_shares_are_not_taken(corpus, tokenizer, tmp_path, changed):
    write_tokens(corpus, tokenizer, tmp_path / "tokens", 1.0, 0.0, Task(), 1000)
    if changed == "text":
        corpus.write_text(LINES.replace("Line 1 ", "Line 2 "))
    others = {"fraction": 0.9, "val_fraction": 0.5, "shard_bytes": 2000}
    settings = {"shard_bytes": 1000} | {key: value for key, value in others.items() if key == changed}
    with patch.object(module, "write_shard", wraps=module.write_shard) as made:
        write_tokens(corpus, tokenizer, tmp_path / "tokens", **settings)
    assert made.call_count == len(names(tmp_path / "tokens")) - 1
    assert names(tmp_path) == ["corpus.txt", "tokens"]  # and what is left of the other is swept


@pytest.mark.fault
def test_a_shard_that_another_task_is_making_is_waited_for_and_not_made_twice(corpus, tokenizer, tmp_path):
    begun, waited_for = threading.Event(), threading.Event()
    write, lock = module.write_shard, fcntl.flock

    def slow(*arguments):
        begun.set()
        assert waited_for.wait(10), "nobody waits"
        write(*arguments)

    def telling(file, how):
        try:
            lock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            waited_for.set()
            lock(file, how)

    def encode():
        write_tokens(corpus, tokenizer, tmp_path / "tokens", 1.0, 0.0, Task())

    with (
        patch.object(module, "write_shard", side_effect=slow) as made,
        patch.object(fcntl, "flock", telling),
        ThreadPoolExecutor() as pool,
    ):
        first = pool.submit(encode)
        assert begun.wait(10)
        second = pool.submit(encode)
        first.result(), second.result()
    assert made.call_count == 2  # train and val, once each


@pytest.mark.parametrize(("shard", "of"), [(2, 2), (-1, 2), (0, 0)])
def test_a_task_with_a_wrong_number_is_refused(project, monkeypatch, shard, of):
    monkeypatch.chdir(project)
    with pytest.raises(InputError, match=f"--shard {shard} --of {of}: N tasks, at least one, are numbered from 0"):
        tokenize(Namespace(shard=shard, of=of))


def test_tasks_make_the_shards_and_the_stage_only_joins_them(project, monkeypatch, tokenizer):
    monkeypatch.chdir(project)
    with patch.object(module.write_tokens, "__defaults__", (1.0, 0.0, None, 1 << 18, None)):
        for shard in (1, 0, 2):
            tokenize(Namespace(shard=shard, of=3))
    with patch.object(module, "write_shard", side_effect=AssertionError("a task has left one out")):
        write_tokens(Path("data/corpus.txt"), tokenizer, Path("data/tokens"), 1.0, 0.1, shard_bytes=1 << 18)
    write_tokens(Path("data/corpus.txt"), tokenizer, Path("clean"), 1.0, 0.1, shard_bytes=1 << 18)
    assert data_sha256(Path("data/tokens")) == data_sha256(Path("clean"))
