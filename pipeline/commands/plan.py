"""Show how `learn` would train on a text, and why.

The plan has the seconds and the memory that the training needs on this machine. Nothing is written.
"""

import argparse
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.arguments import Add
from pipeline.system.errors import InputError, IntegrityError

if TYPE_CHECKING:
    from pipeline.ops.plan import Plan

# Keys of params.yaml in errors, and the arguments that the user has typed instead.
TYPED = {
    "SOURCE: corpus.source": "SOURCE",
    "corpus.source": "SOURCE",
    "corpus.column": "--column",
    "corpus.tokenizer": "--tokenizer",
}


def add_arguments(add: Add) -> None:
    from pipeline.ops.policy import GOALS, MEMORISE

    add(
        "source",
        metavar="SOURCE",
        nargs="+",
        help="a file, a folder, a glob in quotes such as 'notes/*.txt', a URL, hf://datasets/OWNER/NAME/PATH, or "
        "s3://BUCKET/KEY",
    )
    add(
        "--target",
        metavar="LOSS",
        type=float,
        help="loss at which the training stops, in nats per token; default: chosen from the text",
    )
    add("--goal", choices=GOALS, default=MEMORISE,
        help="memorise: recite the text; generalise: predict a held-out tenth of it; default: memorise")  # fmt: skip
    add("--tokenizer", metavar="NAME", help="gpt2, bytes, chars or bpe:N; default: chosen from the text")
    add(
        "--size",
        metavar="RECIPE",
        default="auto",
        help="recipe whose model, windows and optimiser are used; default: auto, chosen from the text",
    )
    add(
        "--init",
        metavar="WEIGHTS",
        help="published weights of a GPT-2 to start from, not with --size: a folder, or hf://OWNER/NAME; "
        "default: random weights",
    )
    add(
        "--time",
        metavar="TIME",
        help="use only as much of the text as can be learnt in this time, such as 10m or 2h; default: the whole text",
    )
    add(
        "--column",
        metavar="NAME",
        help="column of a table that holds the texts; default: `text`, or the only text column",
    )
    add("--name", metavar="NAME", help="name of the registered model; default: name of the text")
    add("--in-place", action="store_true", help="link to files outside of texts/ instead of copying them there")


def run(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        print(planned(arguments, Path(folder)))


def planned(arguments: argparse.Namespace, folder: Path) -> "Plan":
    """The plan for the arguments of `learn` and `plan`, with temporary files in `folder`."""
    from pipeline.ops.plan import Options, make_plan
    from pipeline.ops.sources import find_source, find_weights
    from pipeline.system.words import parse_duration

    if len(given := arguments.source) > 1:
        raise InputError(f"{len(given)} sources: name one, a folder or a glob in quotes, such as 'notes/*.txt'")
    if arguments.init is not None and arguments.size != "auto":
        raise InputError("--init and --size: give one of them, the weights have their own size")
    weights = None if arguments.init is None else find_weights(arguments.init)
    options = Options(
        target=arguments.target,
        goal=arguments.goal,
        tokenizer=arguments.tokenizer,
        size=None if arguments.size == "auto" else arguments.size,
        column=arguments.column,
        init=weights.init if weights else None,
        time_s=None if arguments.time is None else parse_duration(arguments.time),
    )
    try:
        return make_plan(find_source(given[0], arguments.name), options, folder, weights)
    except (InputError, IntegrityError) as error:
        message = re.sub("|".join(map(re.escape, TYPED)), lambda key: TYPED[key[0]], str(error))
        raise (InputError if isinstance(error, InputError) else IntegrityError)(message) from None
