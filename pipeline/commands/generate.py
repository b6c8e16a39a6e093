"""Continue a prompt with a registered model.

Without a prompt, it asks for prompts in the terminal.
"""

import argparse

from pipeline.commands.arguments import Add, add_model, open_project_registry


def add_arguments(add: Add) -> None:
    from pipeline.model.sampling import Sampling

    add("prompt", metavar="PROMPT", nargs="?", help="text to continue; default: asked for in the terminal")
    add_model(add)
    add("--version", metavar="VERSION", default="champion", help="number or alias of the version; default: champion")
    for name, field in Sampling.model_fields.items():
        flag, many = f"--{name.replace('_', '-')}", "append" if name == "stop" else "store"
        metavar, default = "TEXT" if name == "stop" else "N", "none" if name == "stop" else field.default
        text = f"{field.description}; default: {default}"
        add(flag, action=many, metavar=metavar, default=argparse.SUPPRESS, help=text)


def run(arguments: argparse.Namespace) -> None:
    from pipeline.model.generator import load_generator
    from pipeline.model.sampling import Sampling
    from pipeline.ops.chat import converse, show
    from pipeline.registry import artifacts, catalog

    values = {name: getattr(arguments, name) for name in Sampling.model_fields if hasattr(arguments, name)}
    sampling, (store, name) = Sampling.of(**values), open_project_registry(arguments.model)
    generator = load_generator(artifacts.open_version(store, catalog.find_version(store, name, arguments.version)))
    if arguments.prompt is None:
        converse(generator, sampling)
    else:
        show(generator, arguments.prompt, sampling)
