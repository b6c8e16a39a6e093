"""Corpus to token files: the same bytes for any shards, workers and tasks, and after any kill."""

import tracemalloc
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from fixtures_tokenizer import NAMES, POEM, Utf8Tokenizer, _made, _project  # noqa: F401 (fixtures)
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.__main__ import parse
from pipeline.commands import tokenize
from pipeline.data import encode as module
from pipeline.data.encode import Task, training_blocks, training_text, write_tokens
from pipeline.data.token_files import TokenFolder, data_sha256
from pipeline.data.tokenizer import Tokenizer, make_tokenizer
from pipeline.system.errors import InputError, RunLocked
from pipeline.system.files import UNFINISHED, locked
from stages import tokenize as stage

LINES = "".join(f"Line {number} of the play, as it's spoken.\n" for number in range(100))
hard_text = st.text("  \n\r\t\u00a0\u3000\x1c'srveLl1.-\u00e9\u6f22\U0001f600\0", max_size=80)
runs = st.text("\u00a0\nx", max_size=40)  # of whitespace that GPT-2 merges, so that a wrong cut changes the ids


def encode(folder: Path, tokenizer, text: str, *arguments, **options) -> TokenFolder:
    """Write `text` as the corpus, and its token files."""
    folder.mkdir(exist_ok=True)
    (folder / "corpus.txt").write_bytes(text.encode())
    write_tokens(folder / "corpus.txt", tokenizer, folder / "tokens", *arguments, **options)
    return TokenFolder(folder / "tokens")


def ids_of(tokens) -> list[int]:
    return tokens.read(0, len(tokens)).tolist()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(LINES)
    return path


# What is written


def test_the_whole_corpus_has_its_known_tokens(shakespeare, tokenizer, tmp_path):
    expected = tokenizer.encode(shakespeare.read_text())
    assert (len(expected), len(set(expected))) == (338_025, 11_706)
    write_tokens(shakespeare, tokenizer, tmp_path / "tokens")
    assert ids_of(TokenFolder(tmp_path / "tokens").train) == expected
    with patch.object(module, "BLOCK_BYTES", 1 << 14):
        write_tokens(shakespeare, tokenizer, tmp_path / "four", 1.0, 0.1, shard_bytes=200_000, workers=4)
    assert names(tmp_path / "four") == [
        "manifest.json",
        "tokenizer.json",
        *(f"train-{i:05}.bin" for i in range(6)),
        "val-00000.bin",
    ]
    four = TokenFolder(tmp_path / "four")
    assert ids_of(four.train) + ids_of(four.val) == expected


@given(fraction=st.floats(0.05, 1), val_fraction=st.floats(0, 0.8), block_bytes=st.integers(1, 5000))
def test_both_parts_are_whole_lines_or_words_where_a_line_is_long_for_them(
    tmp_path_factory, tokenizer, fraction, val_fraction, block_bytes
):
    longest_line, longest_word = 45, 8
    assume(len(LINES) * fraction * (1 - val_fraction) > 2 * longest_line)  # less may have no whole line
    with patch.object(module, "BLOCK_BYTES", block_bytes):
        tokens = encode(tmp_path_factory.getbasetemp() / "shares", tokenizer, LINES, fraction, val_fraction)
    train, val = (tokenizer.decode(ids_of(part)) for part in (tokens.train, tokens.val))
    assert LINES.startswith(train + val)
    assert train.endswith("\n") or (len(train) < 10 * longest_line and LINES[len(train)] == " ")
    assert len(train) > 0.9 * int(len(train + val) * (1 - val_fraction)) - longest_word
    assert int(len(LINES) * fraction) - longest_line < len(train + val) <= len(LINES) * fraction
    assert len(val) == 0 if val_fraction == 0 else len(val) >= len(train + val) * val_fraction - 1e-6


def test_a_text_without_line_ends_is_divided_between_documents_or_not_at_all(tmp_path, tokenizer):
    for text, fraction, val_fraction, expected in (
        ("one\ntwo", 1.0, 0.0, ("one\ntwo", "")),
        ("one\0two\0three\0four", 0.7, 0.5, ("one<|endoftext|>", "two<|endoftext|>")),
        ("short\n" + "word " * 100, 1.0, 0.1, ("short\n" + "word " * 88 + "word", " word" * 11 + " ")),
        ("short\n" + "word " * 100, 0.1, 0.0, ("short\n" + "word " * 7 + "word", "")),
        ("short\n" + "x" * 100, 1.0, 0.1, ("short\n" + "x" * 89, "x" * 11)),
        ("a word " + "\u7532" * 100, 1.0, 0.1, ("a word " + "\u7532" * 89, "\u7532" * 11)),
        ("a word", 0.7, 0.0, ("a", "")),
        ("\u7532" * 10, 0.65, 0.5, ("\u7532" * 3, "\u7532" * 3)),
    ):
        tokens = encode(tmp_path, tokenizer, text, fraction, val_fraction)
        assert tuple(tokenizer.decode(ids_of(part)) for part in (tokens.train, tokens.val)) == expected
    for text, fraction, val_fraction in (("\u7532" * 3, 0.3, 0), ("a\nb", 1, 0.9)):  # B3
        with pytest.raises(InputError, match=r"/corpus.txt has no text for training: raise corpus.fraction"):
            encode(tmp_path / "short", tokenizer, text, fraction, val_fraction)
        assert not (tmp_path / "short" / "tokens").exists()


# For any shards, workers and tasks


def test_the_text_of_another_tokenizer_is_cut_where_that_one_allows_it(tmp_path):
    text = "Wind?\0" + "\u00e4" * 100  # no space: GPT-2's split would not cut it
    with patch.object(module, "BLOCK_BYTES", 7):
        tokens = encode(tmp_path, tokenizer := Utf8Tokenizer(), text, shard_bytes=21).train
    assert len(list((tmp_path / "tokens").glob("train-*.bin"))) == 10
    assert tokenizer.decode(ids_of(tokens)) == text.replace("\0", "<end>")


@pytest.mark.parametrize("name", NAMES)
@given(
    text=(hard_text | runs | st.text(POEM + "\0", max_size=60)).filter(lambda text: text.strip("\0")),
    shard_bytes=st.integers(1, 60),
    block_bytes=st.integers(1, 30),
    workers=st.integers(1, 4),
    tasks=st.integers(1, 3),
)
def test_the_ids_are_the_same_for_any_shards_workers_and_tasks(
    tmp_path_factory, made, name, text, shard_bytes, block_bytes, workers, tasks
):
    tokenizer = made(name)
    folder = tmp_path_factory.getbasetemp() / "cut"
    folder.mkdir(exist_ok=True)
    (folder / "corpus.txt").write_bytes(text.encode())
    with patch.object(module, "BLOCK_BYTES", block_bytes):
        for number in reversed(range(tasks)):
            task = Task(number, tasks)
            write_tokens(folder / "corpus.txt", tokenizer, folder / "tokens", 1.0, 0.0, task, shard_bytes, workers)
        with patch.object(module, "write_shard", side_effect=AssertionError("no task wrote this shard")):
            tokens = encode(folder, tokenizer, text, shard_bytes=shard_bytes)
    assert ids_of(tokens.train) == Tokenizer.encode_documents(tokenizer, text.encode()).tolist()  # each text alone
    assert not list(folder.glob(f"{UNFINISHED}*"))


def test_the_tokenizer_is_part_of_the_hash_and_another_one_is_refused(tmp_path):
    tokens, tokenizers = [], []
    for text in ("\u00e4\u00f6 \u00e4\n", "\u00e9\u00fc \u00e9\n"):  # the same ids, of other characters
        tokenizers.append(make_tokenizer("chars", tmp_path / "tokenizer", [text.encode()]))
        tokens.append(encode(tmp_path / text[0], tokenizers[-1], text))
    assert [ids_of(each.train) for each in tokens] == [[256, 257, 32, 256, 10]] * 2
    assert tokens[0].sha256 != tokens[1].sha256
    tokens[0].require_tokenizer(tokenizers[0])
    with pytest.raises(InputError, match=r"tokens was made by the tokenizer chars .*: run `dvc repro tokenize`"):
        tokens[0].require_tokenizer(tokenizers[1])


def test_a_tokenizer_is_trained_on_the_training_part_in_blocks_that_no_token_crosses(tmp_path, made):
    (corpus := tmp_path / "corpus.txt").write_text(POEM * 3)
    with patch.object(module, "TRAINING_BYTES", 20):
        blocks = [*training_text(corpus, 0.9, 0.3)]
    assert len(blocks) > 10
    tokens = encode(tmp_path, tokenizer := made("gpt2"), POEM * 3, 0.9, 0.3)
    assert [i for block in blocks for i in tokenizer.encode(block.decode())] == ids_of(tokens.train)


def test_a_tokenizer_is_trained_on_short_blocks_of_whole_characters_also_without_spaces():
    text = ("\u7532" * 100_000).encode()
    blocks = [*training_blocks(text, len(text))]
    assert "".join(block.decode() for block in blocks).encode() == text
    assert max(map(len, blocks)) <= module.MAX_TRAINING_BYTES + 3


def test_a_text_is_never_in_memory_as_a_whole(tmp_path, tokenizer):
    encode(tmp_path, tokenizer, LINES)  # objects that are made only once
    (tmp_path / "corpus.txt").write_text(LINES * 200)  # 870 kB, 2 MB as a list of ids
    with patch.object(module, "BLOCK_BYTES", 1 << 12):
        tracemalloc.start()
        write_tokens(tmp_path / "corpus.txt", tokenizer, tmp_path / "tokens", workers=2)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < 700_000  # a few blocks of 4 KiB, the threads, and buffers of files: 128 KiB from Python 3.14 on


# Killed and resumed


def test_b7_after_a_kill_only_intact_finished_shards_are_kept(corpus, tokenizer, tmp_path):
    arguments = (corpus, tokenizer, tmp_path / "tokens", 1.0, 0.0)
    original, written, killed_in = module.write_shard, [], ["train-00005.bin"]

    def write_shard(path, batches, vocab_size):
        written.append(path.name.removeprefix(UNFINISHED))
        if written[-1] in killed_in:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        original(path, batches, vocab_size)

    with patch.object(module, "write_shard", write_shard):
        with pytest.raises(KeyboardInterrupt):
            write_tokens(*arguments, shard_bytes=500)
        assert not (tmp_path / "tokens").exists()
        (working,) = tmp_path.glob(f"{UNFINISHED}*")
        altered, truncated, without_hash = (working / "tokens" / f"train-0000{i}.bin" for i in (1, 2, 3))
        altered.write_bytes(altered.read_bytes()[:-1] + b"\1")
        truncated.write_bytes(truncated.read_bytes()[:-2])
        (working / f"{without_hash.name}.json").unlink()
        written.clear(), killed_in.clear()
        write_tokens(*arguments, shard_bytes=500)
    kept = {"train-00000.bin", "train-00004.bin"}
    assert {*written} == {*names(tmp_path / "tokens")} - kept - {"manifest.json", "tokenizer.json"}
    write_tokens(corpus, tokenizer, tmp_path / "clean", shard_bytes=500)
    assert data_sha256(tmp_path / "tokens") == data_sha256(tmp_path / "clean")
    assert names(tmp_path) == ["clean", "corpus.txt", "tokens"]


CHANGES = [{}, {"fraction": 0.9}, {"val_fraction": 0.5}, {"shard_bytes": 2000}, {"tokenizer": Utf8Tokenizer()}]


@pytest.mark.parametrize("changes", CHANGES)
def test_shards_of_other_inputs_are_not_used(corpus, tokenizer, tmp_path, changes):
    arguments = {"corpus": corpus, "tokenizer": tokenizer, "folder": tmp_path / "tokens", "shard_bytes": 1000}
    write_tokens(**arguments, task=Task())
    if not changes:
        corpus.write_text(LINES.replace("Line 1 ", "Line 2 "))
    with patch.object(module, "write_shard", wraps=module.write_shard) as write_shard:
        write_tokens(**arguments | changes)
    assert write_shard.call_count == len(names(tmp_path / "tokens")) - 2  # without the manifest and the tokenizer's key
    assert names(tmp_path) == ["corpus.txt", "tokens"]  # the other working folder is removed


def test_the_shards_of_a_task_that_runs_for_other_inputs_are_kept(corpus, tokenizer, tmp_path):
    working = write_tokens(corpus, tokenizer, tmp_path / "tokens", task=Task())
    with locked(working / "val-00000.bin.lock"):
        write_tokens(corpus, tokenizer, tmp_path / "tokens", 0.9)
    assert names(tmp_path) == [working.name, "corpus.txt", "tokens"]
    assert names(working / "tokens") == ["train-00000.bin", "val-00000.bin"]


def test_a_shard_is_locked_while_it_is_written_and_not_written_twice(corpus, tokenizer, tmp_path):
    arguments = (corpus, tokenizer, tmp_path / "tokens", 1.0, 0.0, Task())
    original, written = module.write_shard, []

    def write_shard(path, batches, vocab_size):
        with pytest.raises(RunLocked), locked(path.parents[1] / f"{path.name.removeprefix(UNFINISHED)}.lock"):
            pass
        written.append(path.name)
        original(path, batches, vocab_size)

    @contextmanager
    def locked_after_another_task(path, wait):
        with patch.object(module, "locked", locked):
            write_tokens(*arguments)
        with locked(path, wait):
            yield

    with patch.object(module, "write_shard", write_shard), patch.object(module, "locked", locked_after_another_task):
        write_tokens(*arguments)
    assert written == [f"{UNFINISHED}train-00000.bin", f"{UNFINISHED}val-00000.bin"]


def test_tasks_write_the_shards_and_the_stage_only_joins_them(project, monkeypatch, tokenizer):
    monkeypatch.chdir(project)
    for shard, of in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(InputError, match=f"--shard {shard} --of {of}: --of must be at least 1"):
            tokenize.run(parse(["tokenize", f"--shard={shard}", f"--of={of}"]))
    with patch.object(module, "write_shard", wraps=module.write_shard) as write_shard:
        for shard, n_written in ((1, 1), (0, 2), (2, 2)):  # there are two shards: train and val
            tokenize.run(parse(["tokenize", "--shard", str(shard), "--of", "3"]))
            assert write_shard.call_count == n_written
    (working,) = Path("data").glob(f"{UNFINISHED}tokens-*")
    assert names(working / "tokens") == ["train-00000.bin", "val-00000.bin"]  # tasks share only what a lock protects
    with patch.object(module, "write_shard", side_effect=AssertionError("no task wrote this shard")):
        stage.main()
    tokens, text = TokenFolder(Path("data/tokens")), Path("data/corpus.txt").read_text()
    assert tokenizer.decode(ids_of(tokens.train) + ids_of(tokens.val)) == text.replace("\0", "<|endoftext|>")
    assert len(tokens.val) > 0
