"""The command line: `python -m pipeline --help`."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.params import load_params
from pipeline.config.recipes import apply_recipe, as_set, list_recipes
from pipeline.config.sections import CorpusConfig, RegistryConfig, SweepConfig
from pipeline.data.corpus import verify_corpus
from pipeline.data.encode import Task, encode_shards
from pipeline.data.tokenizer import load_tokenizer
from pipeline.model.generator import load_generator
from pipeline.model.sampling import Sampling
from pipeline.ops.chat import converse, show
from pipeline.ops.checks import params_faults
from pipeline.ops.doctor import examine
from pipeline.registry import catalog, promotion
from pipeline.registry.catalog import CHAMPION
from pipeline.registry.reproduce import retrain
from pipeline.sweep.search_space import overridden
from pipeline.system.entrypoint import run_stage
from pipeline.system.errors import InputError
from pipeline.system.files import locked
from pipeline.tracking.fingerprint import IDENTITY
from pipeline.tracking.mlflow_runs import describe_run
from pipeline.tracking.mlflow_store import project_root
from pipeline.tracking.recorder import RECORDER_LOCK
from pipeline.tracking.run_record import read_run

MODELS_ACTIONS = ("list", "promote", "rollback", "verify")
SWEEP_ACTIONS = ("run", "status", "best", "apply", "dashboard")


def recipe(arguments: argparse.Namespace) -> None:
    """Write a recipe into params.yaml, or print it."""
    if arguments.name is None:
        if not (recipes := list_recipes()):
            raise InputError("no recipes/ here: run from the project's folder")
        for name, comment in recipes.items():
            print(f"{name:12} {comment}")
    elif arguments.as_set:
        print(as_set(arguments.name))
    else:
        print(apply_recipe(arguments.name))


def run(arguments: argparse.Namespace) -> None:
    """Print the MLflow run behind the present model."""
    facts = describe_run(project_root(), read_run(Path("models"))["fingerprint"])
    for name, value in facts.items():
        print(f"{name:12} {value}")


def check(arguments: argparse.Namespace) -> None:
    """Check the whole of params.yaml and list every fault."""
    params = load_params()
    if faults := params_faults(params):
        raise InputError(f"{params.path}: " + "; ".join(faults))
    print(f"{params.path} is sound")


def tokenize(arguments: argparse.Namespace) -> None:
    """Encode a share of the text, as one of many tasks on one disk; then `python -m stages.tokenize` joins them."""
    config, task = load_params().section(CorpusConfig), Task(arguments.shard, arguments.of)
    if not 0 <= task.first < task.of:
        raise InputError(f"--shard {task.first} --of {task.of}: N tasks, at least one, are numbered from 0 to N - 1")
    verify_corpus(corpus := Path("data/corpus.txt"))
    tokenizer, folder = load_tokenizer(Path("data/bpe")), Path("data/tokens")
    place = encode_shards(corpus, tokenizer, folder, config.fraction, config.val_fraction, task)
    print(f"{place}: all shards of task {task.first} of {task.of} are there")


def sweep(arguments: argparse.Namespace) -> None:
    """Search for the settings that reach the target for the least; status, best and apply look at what was found."""
    from pipeline.sweep import controller as sweeps  # Optuna takes a second to import
    from pipeline.sweep.study import naming_dead_storage

    params = load_params()
    config = overridden(params, vars(arguments)).section(SweepConfig)
    with naming_dead_storage(config):
        match arguments.action:
            case "run":
                sweeps.run_sweep(params, config)
            case "status":
                sweeps.print_status(config)
            case "best":
                sweeps.print_best(config)
            case "apply":
                sweeps.apply_best(config)
            case "dashboard":
                sweeps.open_dashboard(config)


def models(arguments: argparse.Namespace) -> None:
    """List the registered versions; promote one, roll back to the one before, or verify what is stored."""
    action, which = arguments.action, arguments.version
    if action != "verify" and (which is None) == (action == "promote"):
        raise InputError(f"models {action}: {'name a version' if which is None else f'takes no version, got {which}'}")
    if arguments.retrain and (action != "verify" or which is None):
        raise InputError("--retrain is about one version: `python -m pipeline models verify N --retrain`")
    name, store = load_params().section(RegistryConfig).model, catalog.open_registry(project_root())
    match action:
        case "list":
            catalog.print_versions(store, name)
        case "promote":
            print(promotion.promote(store, name, which))
        case "rollback":
            print(promotion.rollback(store, name))
        case "verify" if arguments.retrain:
            print(retrain(store, catalog.find_version(store, name, which), project_root()))
        case "verify" if which is None:
            catalog.verify_versions(store, name)
        case "verify":
            print(catalog.verify(store, catalog.find_version(store, name, which)))


def generate(arguments: argparse.Namespace) -> None:
    """Continue a prompt with a registered version, shown as it is written; without a prompt, ask for them."""
    values = {name: getattr(arguments, name) for name in Sampling.model_fields if hasattr(arguments, name)}
    sampling, store = Sampling.of(**values), catalog.open_registry(project_root())
    version = catalog.find_version(store, load_params().section(RegistryConfig).model, arguments.version)
    generator = load_generator(catalog.open_version(store, version))
    if arguments.prompt is None:
        converse(generator, sampling)
    else:
        show(generator, arguments.prompt, sampling)


def export(arguments: argparse.Namespace) -> None:
    """Write a registered version as a folder for Transformers (hf), or as a Hugging Face Space with the app (space)."""
    from pipeline.registry import export as exports  # matplotlib takes a second to import

    if arguments.kind not in exports.EXPORTS:
        raise InputError(f"export {arguments.kind}: unknown, choose one of {', '.join(exports.EXPORTS)}")
    exports.refuse_filled(arguments.folder)
    name, store = load_params().section(RegistryConfig).model, catalog.open_registry(project_root())
    version = catalog.find_version(store, name, arguments.version)
    artifacts, info = catalog.open_version(store, version), catalog.describe_version(store, version)
    size_mb = exports.export_version(arguments.kind, artifacts, info, arguments.folder) / 1e6
    print(f"{arguments.folder}: {name} version {version.version}, {size_mb:,.0f} MB; its README.md says how to use it")


def doctor(arguments: argparse.Namespace) -> None:
    """Check the environment, what killed processes left, DVC's cache and MLflow's store, and say what to do."""
    examine(project_root(), arguments.fix)


def clean(arguments: argparse.Namespace) -> None:
    """Remove working checkpoints, so that `dvc repro -f train` trains anew; models, studies and MLflow runs stay."""
    home, name = project_root() / "checkpoints", arguments.name
    folders = [path for path in sorted(home.glob("*")) if path.is_dir()]
    to_remove = [path for path in folders if (name in (path.name, path.stem) if name else (path / IDENTITY).is_file())]
    if name and not to_remove:
        raise InputError(f"no run or study {name} in {home}: `ls {home}` shows them")
    for folder in to_remove:
        with locked(folder.with_suffix(".lock")), locked(folder / RECORDER_LOCK, wait=True):
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            shutil.rmtree(folder)
        folder.with_suffix(".lock").unlink()
        print(f"removed {folder.name}, {size / 1e6:,.0f} MB")
    if kept := [path.name for path in folders if path not in to_remove and not name]:
        print(f"kept {', '.join(kept)}: a study goes only by its name, `python -m pipeline clean {kept[0]}`")


def as_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not YAML: {' '.join(str(error).split())}") from None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (recipe, run, check, tokenize, sweep, models, generate, export, doctor, clean):
        subparser = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
        subparser.set_defaults(command=command)
        if command is recipe:
            subparser.add_argument("name", nargs="?", help="a file of recipes/ without .yaml; none: list them")
            subparser.add_argument("--as-set", action="store_true", help="print -S arguments for `dvc exp run`")
        if command is tokenize:
            subparser.add_argument("--shard", metavar="I", type=int, required=True, help="this task's number, from 0")
            subparser.add_argument("--of", metavar="N", type=int, required=True, help="how many tasks there are")
        if command is sweep:
            subparser.add_argument("action", nargs="?", default="run", choices=SWEEP_ACTIONS)
            for name, field in SweepConfig.model_fields.items():
                if name != "applied":
                    flag, text = f"--{name.replace('_', '-')}", f"{field.description}; instead of sweep.{name}"
                    subparser.add_argument(flag, type=as_yaml, default=argparse.SUPPRESS, help=text)
        if command is models:
            subparser.add_argument("action", nargs="?", default="list", choices=MODELS_ACTIONS)
            subparser.add_argument("version", nargs="?", help="a number or an alias; verify without: all versions")
            subparser.add_argument("--retrain", action="store_true", help="verify: train again, compare the weights")
        if command is generate:
            subparser.add_argument("prompt", nargs="?", help="what to continue; none: ask, again and again")
            subparser.add_argument("--version", default=CHAMPION, help="a number or an alias; champion by default")
            for name, field in Sampling.model_fields.items():
                flag, many = f"--{name.replace('_', '-')}", "append" if name == "stop" else "store"
                subparser.add_argument(flag, action=many, default=argparse.SUPPRESS, help=field.description)
        if command is export:
            subparser.add_argument("kind", help="hf, space, or another of EXPORTS in pipeline/registry/export.py")
            subparser.add_argument("folder", metavar="DIR", type=Path, help="a new folder, or an empty one")
            subparser.add_argument("--version", default=CHAMPION, help="a number or an alias; champion by default")
        if command is doctor:
            subparser.add_argument("--fix", action="store_true", help="mend what can be mended without doubt")
        if command is clean:
            subparser.add_argument("name", nargs="?", help="a run's fingerprint, or a study; none: every run, no study")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    run_stage(lambda: arguments.command(arguments))
