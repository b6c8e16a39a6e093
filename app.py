"""Serve a registered model, or a version in a folder, on a local web page; see `python app.py --help`."""

if __name__ == "__main__":
    import pipeline

    pipeline.end_quietly()  # Ctrl-C during the imports below

import argparse
import errno
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.system.entrypoint import Parser, run_stage
from pipeline.system.errors import InputError

if TYPE_CHECKING:
    from webapp.model_source import Source

SPACE_VERSION = Path(__file__).parent / "version"  # the model of an exported Space
IN_SPACE = SPACE_VERSION.is_dir() and "SPACE_ID" in os.environ  # a Space is public
KEY_VARIABLE = "TOTARGET_API_KEY"
ALL_ADDRESSES = "0.0.0.0"  # noqa: S104 (only in a Space)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python app.py", description="Serve a registered model as a page and as an API, on this machine."
    )
    add = parser.add_argument
    add("--model", metavar="NAME", help="name of the registered model; default: registry.model of params.yaml")
    add("--version", metavar="VERSION", default="champion", help="number or alias of the version; default: champion")
    add("--folder", metavar="DIR", type=Path, default=SPACE_VERSION if SPACE_VERSION.is_dir() else None,
        help="serve the version in this folder (model/, tokens/, version.json), without a registry")  # fmt: skip
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="auto: the fastest; fp32: a text never depends on other requests; default: auto")  # fmt: skip
    add("--port", metavar="PORT", type=int, default=7860, help="port of the server; default: 7860")
    add("--host", metavar="ADDRESS", default=ALL_ADDRESSES if IN_SPACE else "127.0.0.1",
        help="address of the server; any other than the default needs an API key; default: 127.0.0.1")  # fmt: skip
    add("--api-key", default=os.environ.get(KEY_VARIABLE), metavar="KEY",
        help="key that every request must have; other users of this machine can see an argument, and cannot see the "
        f"variable; default: the environment variable {KEY_VARIABLE}")  # fmt: skip
    add("--allow-host", metavar="NAME", action="append", default=["*"] if IN_SPACE else [],
        help="further host name of the page, such as a proxy's, once for each; *: any")  # fmt: skip
    return parser


def clean_environment() -> None:
    """Remove all GRADIO_* variables, which could share the page or open files. Call it before Gradio is imported.

    Also turn analytics off, and limit Gradio's list of requests to one entry instead of 10,000.
    """
    for variable in [variable for variable in os.environ if variable.startswith("GRADIO_")]:
        del os.environ[variable]
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_ANALYTICS_MAX_EVENTS": "1"}


def open_source(arguments: argparse.Namespace) -> "Source":
    """Open the folder or the registry from which versions are served."""
    if arguments.folder:
        from webapp.model_source import Folder

        return Folder(arguments.folder, arguments.precision)
    from pipeline.config.params import Params, load_params
    from pipeline.config.sections import RegistryConfig
    from pipeline.system.host import project_root
    from webapp.registry_source import Registry

    root = project_root()
    if arguments.model is None:
        params = load_params(root / "params.yaml")
    else:  # which works without params.yaml
        params = Params({"registry": {"model": arguments.model, "max_target_loss": 1}}, Path("--model"))
    return Registry(root, params.section(RegistryConfig).model, arguments.version, arguments.precision)


def main() -> None:
    arguments = build_parser().parse_args()
    clean_environment()
    from webapp.request_filter import LOOPBACK
    from webapp.server import make_app, serve

    host, key = arguments.host.strip("[]"), (arguments.api_key or "").strip()
    address = f"[{host}]" if ":" in host else host
    public = not IN_SPACE and host not in LOOPBACK
    if public and not key:
        raise InputError(f"others can reach {host}: set {KEY_VARIABLE} to a long random word, which the page and the "
                         "API then ask for, or keep 127.0.0.1 and put a proxy with a login in front")  # fmt: skip
    if not key.isascii():
        raise InputError("the API key has other characters than ASCII: a header cannot carry them, choose another")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, arguments.port), family=family) as listener:
            port = listener.getsockname()[1]  # of port 0, a free one
    except (OSError, OverflowError) as error:
        if isinstance(error, OverflowError):
            why = "a port is a number from 0 to 65535"
        elif error.errno == errno.EADDRINUSE:
            why = "another program uses this port"
        else:  # such as another machine's address; socket adds the address in brackets
            why = (error.strerror or str(error)).partition(" (while")[0].lower()
        raise InputError(f"cannot use {address}:{arguments.port} ({why}): choose --port or --host") from error
    source = open_source(arguments)
    app = make_app(source, address, arguments.allow_host, key or None)
    print(f"{source.current().label}: http://{address}:{port} (API: /v1, /docs)", flush=True)
    if public:
        print(f"warning: {host} has no encryption, so the network sees the API key and all texts, see SECURITY.md",
              file=sys.stderr)  # fmt: skip
    serve(app, host, port)


if __name__ == "__main__":
    run_stage(main)
