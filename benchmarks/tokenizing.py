"""Compare tokenizing by this project and by Hugging Face datasets' `map` on the same cores: tokens/s and memory.

    pip install datasets
    python -m benchmarks.tokenizing [--gigabytes 2] [--files 8] [--rounds 1] [--only NAME ...]

The text consists of Tiny Shakespeare's lines, shuffled, with numbers inserted so that it does not repeat
(`dvc repro download tokenizer` fetches the lines and the tokenizer). The files differ. Each contestant runs
in its own process, in turn, and reads the files and writes tokens to the disk, in two steps that are timed separately:

- `prepare` makes the input of the tokenizer: one normalised text in this project, Arrow tables of lines in `datasets`;
- `tokenize` makes the tokens: token files in this project, Arrow tables in `datasets`.

`map` runs batched, with one process for each core, with GPT-2's encoding by tiktoken and by Hugging Face's own
tokenizer. Memory is measured five times a second: of all processes of a contestant, with shared pages counted once
(Linux's PSS), and of its largest process. `cpu_s` is the processor time of all of them in both steps.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from pipeline.data.corpus import write_documents
from pipeline.data.documents import find_files
from pipeline.data.encode import write_tokens
from pipeline.data.token_files import TokenFolder
from pipeline.data.tokenizer import load_tokenizer
from pipeline.system.files import write_json

BPE = Path("data/tokenizer").absolute()
RESULTS = Path("benchmarks/results/tokenizing.json")
POLL_S = 0.2


def make_texts(folder: Path, size_bytes: int, n_files: int) -> None:
    """Write `n_files` files with a total of `size_bytes`."""
    lines = Path("data/corpus.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    for number in range(n_files):
        rng, written = random.Random(number), 0  # noqa: S311 (no secret)
        with (folder / f"{number:02}.txt").open("w", encoding="utf-8") as file:
            while written < size_bytes // n_files:
                chosen = rng.choices(lines, k=10_000)
                for i in range(0, len(chosen), 5):
                    chosen[i] = f"{rng.randrange(10**9)} {chosen[i]}"
                written += file.write("".join(chosen))


def ours(texts: Path, place: Path) -> tuple[float, int]:
    """Tokenize with this project; return the seconds of `prepare`, and the number of tokens."""
    started = time.perf_counter()
    write_documents({path.name: path for path in find_files(str(texts))}, place / "corpus.txt", str(texts))
    prepared = time.perf_counter()
    write_tokens(place / "corpus.txt", load_tokenizer(BPE), place / "tokens")
    return prepared - started, len(TokenFolder(place / "tokens").train)


def mapped(texts: Path, place: Path, encode: Callable[[list[str]], list[list[int]]]) -> tuple[float, int]:
    """The same with `datasets.map` and the tokenizer `encode`."""
    os.environ |= {"HF_HOME": str(place), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import datasets

    datasets.disable_progress_bars()

    started = time.perf_counter()
    files = [str(path) for path in find_files(str(texts))]
    cores = len(os.sched_getaffinity(0))
    table = datasets.load_dataset("text", data_files=files, split="train", keep_linebreaks=True, num_proc=cores)
    prepared = time.perf_counter()

    def encoded(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = encode(batch["text"])
        return {"ids": ids, "length": [len(each) for each in ids]}

    table = table.map(encoded, batched=True, num_proc=cores, remove_columns=["text"])
    return prepared - started, sum(table.data.column("length").to_numpy())


def with_tiktoken(texts: Path, place: Path) -> tuple[float, int]:
    encoding = load_tokenizer(BPE)._encoding
    return mapped(texts, place, lambda batch: [encoding.encode_ordinary(text) for text in batch])


def with_tokenizers(texts: Path, place: Path) -> tuple[float, int]:
    from tokenizers import ByteLevelBPETokenizer

    encoding = ByteLevelBPETokenizer(str(BPE / "encoder.json"), str(BPE / "vocab.bpe"))
    return mapped(texts, place, lambda batch: [each.ids for each in encoding.encode_batch(batch)])


CONTESTANTS: dict[str, Callable[[Path, Path], tuple[float, int]]] = {
    "this project": ours,
    "datasets.map, tiktoken": with_tiktoken,
    "datasets.map, tokenizers": with_tokenizers,
}


def measure(name: str, texts: Path, place: Path) -> dict[str, float]:
    """Run one contestant in its own process, and measure its memory meanwhile."""
    command = [sys.executable, "-m", "benchmarks.tokenizing", "--contestant", name, str(texts), str(place)]
    peak_bytes = largest_bytes = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            family = [psutil.Process(process.pid)]
            sizes = []
            try:
                family += family[0].children(recursive=True)
                sizes = [each.memory_full_info().pss for each in family]
            except psutil.Error:  # one of them has ended
                pass
            peak_bytes, largest_bytes = max(peak_bytes, sum(sizes)), max([largest_bytes, *sizes])
            time.sleep(POLL_S)
        assert process.stdout is not None
        output = process.stdout.read().splitlines()
    if process.returncode:
        sys.exit(f"error: {name} ended with {process.returncode}")
    return {**json.loads(output[-1]), "peak_bytes": peak_bytes, "largest_process_bytes": largest_bytes}


def run_contestant(name: str, texts: Path, place: Path) -> None:
    """Run a contestant in this process, and print its figures as JSON."""
    started = time.perf_counter()
    prepare_s, tokens = CONTESTANTS[name](texts, place)
    tokenize_s = time.perf_counter() - started - prepare_s
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(each.ru_utime + each.ru_stime for each in used)
    figures = {"tokens": int(tokens), "prepare_s": prepare_s, "tokenize_s": tokenize_s, "cpu_s": cpu_s}
    print(
        json.dumps(
            {**figures, "tokens_per_s": tokens / tokenize_s, "all_tokens_per_s": tokens / (prepare_s + tokenize_s)}
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--contestant", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        name, texts, place = arguments.contestant
        return run_contestant(name, Path(texts), Path(place))
    try:
        import datasets
    except ImportError:
        sys.exit("error: this benchmark needs Hugging Face datasets: pip install datasets")

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tokenizing-") as folder:
        (texts := Path(folder, "texts")).mkdir()
        make_texts(texts, int(arguments.gigabytes * 1e9), arguments.files)
        text_bytes = sum(path.stat().st_size for path in texts.iterdir())
        for number in range(arguments.rounds):
            for name in arguments.only:
                (place := Path(folder, "place")).mkdir()
                rows.append({"contestant": name, "round": number, **measure(name, texts, place)})
                shutil.rmtree(place)
                print(json.dumps(rows[-1]), flush=True)
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    write_json(RESULTS, {"machine": machine, "datasets": datasets.__version__, "text_bytes": text_bytes, "rows": rows})


if __name__ == "__main__":
    main()
