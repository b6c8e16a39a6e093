"""Continue a prompt with a registered version; without a prompt, read prompts from the terminal."""

import argparse

from pipeline.commands.arguments import Add, open_project_registry


def add_arguments(add: Add) -> None:
    from pipeline.model.sampling import Sampling

    add("prompt", nargs="?", help="the text to continue; default: read prompts from the terminal")
    add("--version", default="champion", help="a number or an alias; champion by default")
    for name, field in Sampling.model_fields.items():
        flag, many = f"--{name.replace('_', '-')}", "append" if name == "stop" else "store"
        add(flag, action=many, default=argparse.SUPPRESS, help=field.description)


def run(arguments: argparse.Namespace) -> None:
    from pipeline.model.generator import load_generator
    from pipeline.model.sampling import Sampling
    from pipeline.ops.chat import converse, show
    from pipeline.registry import artifacts, catalog

    values = {name: getattr(arguments, name) for name in Sampling.model_fields if hasattr(arguments, name)}
    sampling, (store, name) = Sampling.of(**values), open_project_registry()
    generator = load_generator(artifacts.open_version(store, catalog.find_version(store, name, arguments.version)))
    if arguments.prompt is None:
        converse(generator, sampling)
    else:
        show(generator, arguments.prompt, sampling)
