"""Encode the text, on this machine or as jobs on Slurm.

Without options it is `dvc repro tokenize`. With --shard and --of, several machines share the text: each encodes
every N-th shard, and `dvc repro tokenize` then joins them.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.arguments import Add, add_slurm, become_dvc, count, slurm_of
from pipeline.system.errors import InputError

if TYPE_CHECKING:
    from pipeline.config.params import Params


def add_arguments(add: Add) -> None:
    add("--shard", metavar="I", type=int, help="with --of: number of this machine, 0 to N - 1")
    add("--of", metavar="N", type=int, help="with --shard: number of machines that share the text")
    add_slurm(add, without=("nodes",))
    add(
        "--workers",
        metavar="N",
        type=count,
        help="with --on slurm: number of tasks that share the text; default: one for each shard, up to 16",
    )


def run(arguments: argparse.Namespace) -> None:
    from pipeline.config.params import load_params

    slurm, share = slurm_of(given := load_params(), arguments), (arguments.shard, arguments.of)
    if share != (None, None):
        if slurm or None in share:
            raise InputError("--shard and --of belong together, and not to --on slurm, which divides the text itself")
        _tokenize_share(given, *share)
    elif slurm:
        from pipeline.ops.on_slurm import tokenize_on_slurm

        tokenize_on_slurm(given, slurm, arguments.workers)
    elif arguments.workers:
        raise InputError("--workers: only with --on slurm; here, all cores encode the text")
    else:
        become_dvc("repro", "tokenize")


def _tokenize_share(given: "Params", shard: int, of: int) -> None:
    """Encode every `of`-th shard, from number `shard` on; `dvc repro tokenize` then joins all shards."""
    from pipeline.config.sections import CorpusConfig
    from pipeline.data.corpus import verify_corpus
    from pipeline.data.encode import Task, write_tokens
    from pipeline.data.tokenizer import load_tokenizer

    config = given.section(CorpusConfig)
    if not 0 <= shard < of:
        raise InputError(
            f"--shard {shard} --of {of}: --of must be at least 1, and --shard from 0 to one less than --of"
        )
    verify_corpus(corpus := Path("data/corpus.txt"))
    tokenizer, folder = load_tokenizer(Path("data/tokenizer"), config.tokenizer), Path("data/tokens")
    place = write_tokens(corpus, tokenizer, folder, config.fraction, config.val_fraction, Task(shard, of))
    print(f"{place}: all shards of task {shard} of {of} are written")
