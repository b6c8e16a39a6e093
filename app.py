"""app: the registry's champion, or a version's folder -> a page on this machine; `python app.py --help`."""

import argparse
import os
import re
import socket
import sys
from pathlib import Path

from pipeline.system.entrypoint import run_stage
from pipeline.system.errors import InputError

BESIDE = Path(__file__).parent / "version"  # where an exported Space has its model
IN_SPACE = BESIDE.is_dir() and "SPACE_ID" in os.environ  # to publish one is to open it


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="app.py", description="Serve a registered model on a page of this machine.")
    parser.add_argument("--model", default="shakespeare-gpt2", help="name in the registry")
    parser.add_argument("--version", default="champion", help="alias or number")
    parser.add_argument(
        "--folder", type=Path, help="a folder with model/, tokens/ and facts.json: no registry is asked"
    )
    parser.add_argument("--port", type=port, default=7860, help="1 to 65535, 7860 by default")
    everywhere = "0.0.0.0"  # noqa: S104 (of a Space alone, which opens the page)
    parser.add_argument("--host", default=everywhere if IN_SPACE else "127.0.0.1",
                        help="another address opens the page to others: there is no login")  # fmt: skip
    parser.add_argument("--allow-host", type=name, metavar="NAME", action="append", default=["*"] if IN_SPACE else [],
                        help="a name the page is reached by, such as a reverse proxy's; may be repeated")  # fmt: skip
    return parser.parse_args()


def port(text: str) -> int:
    """Raises argparse's own error for what is no port."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: choose one from 1 to 65535")
    return int(text)


def name(text: str) -> str:
    """Raises argparse's own error for what is no name of a host."""
    if not re.fullmatch(r"[\w.:-]+|\*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no name: give it without https:// and port, or * for any")
    return text.lower()


def settle_gradio() -> None:
    """Before it is imported, take away what the environment tells Gradio: to share, to open files, to watch code.

    It would also keep ten thousand records of who asked for what, and tell its makers that it was started.
    """
    for variable in [variable for variable in os.environ if variable.startswith("GRADIO_")]:
        del os.environ[variable]
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_ANALYTICS_MAX_EVENTS": "1"}


def main() -> None:
    arguments = parse()
    settle_gradio()
    from webapp.http.guard import LOOPBACK
    from webapp.model_source import Folder, Source
    from webapp.page import serve

    folder = arguments.folder or (BESIDE if BESIDE.is_dir() else None)
    if folder:
        source: Source = Folder(folder)
    else:
        from pipeline.tracking.mlflow_store import project_root
        from webapp.registry_source import Registry

        source = Registry(project_root(), arguments.model, arguments.version)
    host = arguments.host.strip("[]")
    address = f"[{host}]" if ":" in host else host
    try:
        socket.create_server((host, arguments.port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
        print(f"{source.current().label}: http://{address}:{arguments.port}", flush=True)
        if not IN_SPACE and host not in LOOPBACK:
            print(f"warning: whoever reaches {host} can use the page: it has no login and no encryption, "
                  "see SECURITY.md", file=sys.stderr)  # fmt: skip
        serve(source, address, arguments.port, arguments.allow_host)
    except OSError as error:  # the port is taken, or not for this user, or the address is not of this machine
        why = (error.strerror or str(error)).lower()
        raise InputError(
            f"{address}:{arguments.port} cannot be used ({why}): choose another with --port or --host"
        ) from error


if __name__ == "__main__":
    run_stage(main)
