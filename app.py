"""app: the registry's champion, or a version's folder -> a page on this machine; `python app.py --help`."""

import argparse
import os
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

from pipeline.errors import InputError
from pipeline.stage import run_stage

BESIDE = Path(__file__).parent / "version"  # where an exported Space has its model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="app.py", description="Serve a registered model on a page of this machine.")
    parser.add_argument("--model", default="shakespeare-gpt2", help="name in the registry")
    parser.add_argument("--version", default="champion", help="alias or number")
    parser.add_argument(
        "--folder", type=Path, help="a folder with model/, tokens/ and facts.json: no registry is asked"
    )
    parser.add_argument("--port", type=port, default=7860, help="1 to 65535, 7860 by default")
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
                        help="another address opens the page to others: there is no login")  # fmt: skip
    return parser.parse_args()


def port(text: str) -> int:
    """Raises argparse's own error for what is no port."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: choose one from 1 to 65535")
    return int(text)


def main() -> None:
    arguments = parse()
    from webapp.page import serve
    from webapp.source import Folder, Source

    folder = arguments.folder or (BESIDE if BESIDE.is_dir() else None)
    if folder:
        source: Source = Folder(folder)
    else:
        from pipeline.store import project_root
        from webapp.registry_source import Registry

        source = Registry(project_root(), arguments.model, arguments.version)
    try:
        print(f"{source.current().label}: http://{arguments.host}:{arguments.port}", flush=True)
        serve(source, arguments.host, arguments.port)
    except OSError as error:  # taken, or not for this user
        raise InputError(
            f"port {arguments.port} of {arguments.host} cannot be used: choose another with --port"
        ) from error


if __name__ == "__main__":
    run_stage(main)
