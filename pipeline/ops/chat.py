"""Generate text for prompts in the terminal, and print it token by token."""

import sys
import time

from pipeline.model.generator import Generator
from pipeline.model.sampling import Sampling
from pipeline.registry.catalog import printable
from pipeline.system.errors import InputError
from pipeline.system.signals import Signalled
from pipeline.system.words import encodable


def show(generator: Generator, prompt: str, sampling: Sampling) -> None:
    """Print the prompt and its continuation as it is generated; notices and the speed go to stderr.

    Bytes of the prompt that are not UTF-8 become U+FFFD.
    """
    prompt = encodable(prompt)
    started, n_tokens, shown = time.perf_counter(), 0, prompt
    for piece in generator.stream([prompt], sampling):
        print(shown + printable(piece.text, also="\n\t"), end="", flush=True)
        n_tokens, shown = n_tokens + len(piece.ids), ""
        if piece.notice:
            print(f"\n[{piece.notice}]", file=sys.stderr)
    print(flush=True)
    if sys.stderr.isatty():
        print(f"[{n_tokens} tokens, {n_tokens / (time.perf_counter() - started):,.0f} a second]", file=sys.stderr)


def converse(generator: Generator, sampling: Sampling) -> None:
    """Read prompts until Ctrl-D, and print a continuation of each; Ctrl-C ends a continuation."""
    print("Type a prompt and press Enter; \\n is a line break, Ctrl-C stops a text, Ctrl-D ends.", file=sys.stderr)
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # as in arguments
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "").replace("\\n", "\n")
        except EOFError:
            print()
            return
        try:
            show(generator, prompt, sampling)
        except Signalled:
            raise
        except KeyboardInterrupt:
            print()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
