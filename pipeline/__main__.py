"""The command line: `python -m pipeline`, or `totarget` when the project is installed."""

# Each command imports only what it needs, so that short commands start without importing torch and MLflow.

import argparse
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.system.entrypoint import exit_code_of
from pipeline.system.errors import InputError, IntegrityError

if TYPE_CHECKING:
    from pipeline.config.params import Params
    from pipeline.config.sections import SlurmConfig
    from pipeline.ops.plan import Plan


def learn(arguments: argparse.Namespace) -> None:
    """Learn a text of your own: plan, write params.yaml, run `dvc repro`, and show what was reached."""
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        made = _plan(arguments, Path(folder))
        print(made, flush=True)
        if not arguments.dry_run:
            from pipeline.ops.learn import learn

            learn(made, arguments.in_place, arguments.yes)


def plan(arguments: argparse.Namespace) -> None:
    """Print how `learn` would train on a text, and why; nothing is written."""
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        print(_plan(arguments, Path(folder)))


def recipe(arguments: argparse.Namespace) -> None:
    """Write a recipe into params.yaml, or print it."""
    from pipeline.config.recipes import apply_recipe, as_set, list_recipes

    if arguments.name is None:
        if not (recipes := list_recipes()):
            raise InputError("no recipes/ here: run from the project's folder")
        for name, comment in recipes.items():
            print(f"{name:12} {comment}")
    else:
        print((as_set if arguments.as_set else apply_recipe)(arguments.name))


def run(arguments: argparse.Namespace) -> None:
    """Print the MLflow run of the current model."""
    from pipeline.system.host import project_root
    from pipeline.tracking.mlflow_runs import describe_run
    from pipeline.tracking.run_record import read_run

    for name, value in describe_run(project_root(), read_run(Path("models"))["fingerprint"]).items():
        print(f"{name:12} {value}")


def check(arguments: argparse.Namespace) -> None:
    """Validate params.yaml, and list all of its errors; the answer does not depend on the machine."""
    from pipeline.config.params import load_params
    from pipeline.ops.params_check import check_params

    check_params(params := load_params())
    print(f"{params.path} is valid; `python -m pipeline doctor` says whether this machine can train with it")


def tokenize(arguments: argparse.Namespace) -> None:
    """Encode the text as `dvc repro tokenize` does, here or in jobs on Slurm; or encode every N-th shard only."""
    from pipeline.config.params import load_params

    slurm, share = _slurm(given := load_params(), arguments), (arguments.shard, arguments.of)
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
        _become_dvc("repro", "tokenize")


def train(arguments: argparse.Namespace) -> None:
    """Train as `dvc repro train` does, here or in a job on Slurm, on one node or several."""
    from pipeline.config.params import load_params

    slurm = _slurm(given := load_params(), arguments)
    if arguments.commit:
        from pipeline.ops.on_slurm import commit_training

        commit_training(given, arguments.commit)
    elif slurm:
        from pipeline.ops.on_slurm import train_on_slurm

        train_on_slurm(given, slurm, arguments.elastic)
    elif arguments.elastic:
        raise InputError("--elastic without --on slurm: `python -m stages.train --elastic && dvc commit -f train`")
    else:
        _become_dvc("repro", "train")


def jobs(arguments: argparse.Namespace) -> None:
    """List this project's jobs on Slurm: what runs where, what waits and why; or cancel one."""
    from pipeline.cluster.jobs import cancel, print_jobs

    if arguments.cancel:
        cancel(arguments.cancel)
    else:
        print_jobs()


def replicate(arguments: argparse.Namespace) -> None:
    """Train the parameters with several seeds, and show mean and spread of what they spend until the target."""
    from pipeline.config import params, sections
    from pipeline.sweep import replicate, search_space, study

    given = params.load_params()
    config = search_space.overridden(given, vars(arguments)).section(sections.SweepConfig)
    with study.naming_dead_storage(config):
        replicate.run_replicate(given, config, arguments.seeds, _slurm(given, arguments))


def sweep(arguments: argparse.Namespace) -> None:
    """Search for the parameters that reach the target at the lowest cost; show, confirm, apply or plot the results."""
    from pipeline.config import params, sections
    from pipeline.sweep import controller, replicate, search_space, study

    counts = {"top": arguments.top, "n_seeds": arguments.seeds}
    counts = {name: count for name, count in counts.items() if count is not None}
    if counts and arguments.action != "confirm":
        raise InputError("--top and --seeds need `confirm`: `python -m pipeline sweep confirm --top 3 --seeds 3`")
    slurm = _slurm(given := params.load_params(), arguments)
    if slurm and arguments.action not in ("run", "confirm"):
        raise InputError(f"sweep {arguments.action} --on slurm: only `sweep` and `sweep confirm` train")
    config = search_space.overridden(given, vars(arguments)).section(sections.SweepConfig)
    actions = {
        "run": lambda config: controller.run_sweep(given, config, slurm),
        "status": controller.print_status,
        "best": controller.print_best,
        "confirm": lambda config: replicate.run_confirm(
            given, config, **{"top": 3, "n_seeds": 3} | counts, slurm=slurm
        ),
        "apply": controller.apply_best,
        "dashboard": controller.open_dashboard,
    }
    with study.naming_dead_storage(config):
        actions[arguments.action](config)


def models(arguments: argparse.Namespace) -> None:
    """List the registered versions; promote one, roll back to the previous champion, or verify the stored files."""
    from pipeline.registry import catalog, promotion

    action, which = arguments.action, arguments.version
    if action != "verify" and (which is None) == (action == "promote"):
        raise InputError(f"models {action}: {'name a version' if which is None else f'takes no version, got {which}'}")
    if arguments.retrain and (action != "verify" or which is None):
        raise InputError("--retrain needs one version: `python -m pipeline models verify N --retrain`")
    store, name = _open_registry()
    match action:
        case "list":
            catalog.print_versions(store, name)
        case "promote":
            print(promotion.promote(store, name, which))
        case "rollback":
            print(promotion.rollback(store, name))
        case "verify" if arguments.retrain:
            from pipeline.registry.reproduce import retrain
            from pipeline.system.host import project_root

            print(retrain(store, catalog.find_version(store, name, which), project_root()))
        case "verify" if which is None:
            catalog.verify_versions(store, name)
        case "verify":
            print(catalog.verify(store, catalog.find_version(store, name, which)))


def generate(arguments: argparse.Namespace) -> None:
    """Continue a prompt with a registered version; without a prompt, read prompts from the terminal."""
    from pipeline.model.generator import load_generator
    from pipeline.model.sampling import Sampling
    from pipeline.ops.chat import converse, show
    from pipeline.registry import artifacts, catalog

    values = {name: getattr(arguments, name) for name in Sampling.model_fields if hasattr(arguments, name)}
    sampling, (store, name) = Sampling.of(**values), _open_registry()
    generator = load_generator(artifacts.open_version(store, catalog.find_version(store, name, arguments.version)))
    if arguments.prompt is None:
        converse(generator, sampling)
    else:
        show(generator, arguments.prompt, sampling)


def export(arguments: argparse.Namespace) -> None:
    """Write a registered version as a folder for Transformers (hf), or as a Hugging Face Space with the app (space)."""
    from pipeline.registry import artifacts, catalog
    from pipeline.registry import export as exports

    if arguments.kind not in exports.EXPORTS:
        raise InputError(f"export {arguments.kind}: unknown, choose one of {', '.join(exports.EXPORTS)}")
    exports.require_empty(arguments.folder)
    store, name = _open_registry()
    version = catalog.find_version(store, name, arguments.version)
    files, info = artifacts.open_version(store, version), catalog.describe_version(store, version)
    size_mb = exports.export_version(arguments.kind, files, info, arguments.folder) / 1e6
    print(f"{arguments.folder}: {name} version {version.version}, {size_mb:,.0f} MB; see its README.md")


def doctor(arguments: argparse.Namespace) -> None:
    """Check the environment, params.yaml, MLflow's store and the registered versions, and print how to fix faults."""
    from pipeline.ops.doctor import examine
    from pipeline.system.host import project_root

    examine(project_root(), arguments.fix)


def clean(arguments: argparse.Namespace) -> None:
    """Remove checkpoints, so that `dvc repro -f train` trains from step 0; models, studies and MLflow runs stay."""
    from pipeline.system.files import locked
    from pipeline.system.host import project_root
    from pipeline.tracking.fingerprint import IDENTITY
    from pipeline.tracking.recorder import RECORDER_LOCK

    home, name = project_root() / "checkpoints", arguments.name
    folders = [path for path in sorted(home.glob("*")) if path.is_dir() and path.name != "jobs"]
    to_remove = [path for path in folders if (name in (path.name, path.stem) if name else (path / IDENTITY).is_file())]
    if name and not to_remove:
        raise InputError(f"no run or study {name} in {home}: `ls {home}` shows them")
    if name and (home / "jobs").is_dir():
        from pipeline.cluster.jobs import find_live

        if job := find_live(f"study-{name}"):
            raise InputError(f"job {job.id} trains study {name}: `python -m pipeline jobs --cancel {job.id}` ends it")
    for folder in to_remove:
        with locked(folder.with_suffix(".lock")), locked(folder / RECORDER_LOCK, wait=True):
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            shutil.rmtree(folder)
        folder.with_suffix(".lock").unlink()
        print(f"removed {folder.name}, {size / 1e6:,.0f} MB")
    if kept := [path.name for path in folders if path not in to_remove and not name]:
        print(f"kept {', '.join(kept)}: a study is removed only by name, `python -m pipeline clean {kept[0]}`")


# Keys of the section `sweep` that a list of trials does not read.
SEARCH_ONLY = ("study", "objective", "space", "micro_batch_tokens", "trials", "patience", "sampler", "pruner",
               "pruner_tolerance", "seed", "applied")  # fmt: skip
COMMANDS = {command.__name__: command for command in (
    learn, plan, recipe, run, check, tokenize, train, replicate, sweep, jobs, models, generate, export, doctor, clean,
)}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """A parser, also of each command, that raises InputError instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        fault = " ".join(message.removeprefix("argument ").split())
        raise InputError(f"{fault}: `{self.prog} --help` shows what is possible")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Only the named command gets its options, since some are slow to import.

    Raises InputError if there is no such command or option, or if a value has the wrong form.
    """
    argv = sys.argv[1:] if argv is None else argv
    prog = "totarget" if Path(sys.argv[0]).stem == "totarget" else "python -m pipeline"
    about = "Validate parameters, search for better ones, and use registered models."
    parser = _Parser(prog=prog, description=about)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        says = command.__doc__
        subparser = subparsers.add_parser(name, help=says, description=says, allow_abbrev=False)
        subparser.set_defaults(command=command)
        if name in argv[:1]:
            _add_arguments(name, subparser.add_argument)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:

    def command() -> None:
        arguments = parse(argv)
        arguments.command(arguments)

    return exit_code_of(command)


def _add_arguments(command: str, add: Callable[..., argparse.Action]) -> None:
    match command:
        case "learn" | "plan":
            add("source", metavar="SOURCE", nargs="+", help="a file, a folder, a glob in quotes, or a URL")
            add("--target", metavar="LOSS", type=float, help="nats per token; default: chosen from the text")
            add("--goal", choices=("memorise", "generalise"), default="memorise",
                help="recite the text (default), or predict a held-out tenth of it")  # fmt: skip
            add("--tokenizer", help="as corpus.tokenizer; default: chosen from the text")
            add("--size", metavar="RECIPE", default="auto", help="a recipe with the model to use; default: auto")
            add("--time", help="train only on the part of the text that is learnt in this time, such as 10m or 2h")
            add("--column", help="column with the texts of a table; default: `text`, or the only column of texts")
            add("--name", help="name of the model; default: that of the text")
            add("--in-place", action="store_true", help="make links to a text outside of the project, not a copy")
            if command == "learn":
                add("--dry-run", action="store_true", help="only print the plan")
                add("--yes", action="store_true", help="do not ask before training")
        case "recipe":
            add("name", nargs="?", help="a file of recipes/, without .yaml; default: list the recipes")
            add("--as-set", action="store_true", help="only print the recipe, as -S arguments of `dvc exp run`")
        case "tokenize":
            add("--shard", metavar="I", type=int, help="encode only the shards of this task, 0 to N - 1")
            add("--of", metavar="N", type=int, help="number of tasks")
            _add_slurm(add, without=("nodes",))
            add("--workers", metavar="N", type=_count, help="with --on slurm: number of tasks; default: 16 at most")
        case "train":
            _add_slurm(add)
            add("--elastic", action="store_true", help="with --on slurm: resume in another environment, inexactly")
            add("--commit", metavar="DIGEST", help="only record the training with these parameters in dvc.lock")
        case "jobs":
            add("--cancel", metavar="ID", help="end a job, and those that wait for it; what is saved stays")
        case "replicate":
            add("--seeds", metavar="N", type=int, default=5, help="number of seeds, from train.seed on; default: 5")
            _add_sweep(add, without=SEARCH_ONLY)
            _add_slurm(add)
        case "sweep":
            add("action", nargs="?", default="run", choices=("run", "status", "best", "confirm", "apply", "dashboard"))
            add("--top", metavar="K", type=int, help="for confirm: number of best trials to repeat; default: 3")
            add("--seeds", metavar="N", type=int, help="for confirm: seeds of each, after train.seed; default: 3")
            _add_sweep(add, without=("applied",))
            _add_slurm(add)
        case "models":
            add("action", nargs="?", default="list", choices=("list", "promote", "rollback", "verify"))
            add("version", nargs="?", help="a number or an alias; default for verify: all versions")
            add("--retrain", action="store_true", help="for verify: train the version again, and compare the weights")
        case "generate":
            from pipeline.model.sampling import Sampling

            add("prompt", nargs="?", help="the text to continue; default: read prompts from the terminal")
            add("--version", default="champion", help="a number or an alias; champion by default")
            for name, field in Sampling.model_fields.items():
                flag, many = f"--{name.replace('_', '-')}", "append" if name == "stop" else "store"
                add(flag, action=many, default=argparse.SUPPRESS, help=field.description)
        case "export":
            add("kind", help="hf, space, or another of EXPORTS in pipeline/registry/export.py")
            add("folder", metavar="DIR", type=Path, help="a new folder, or an empty one")
            add("--version", default="champion", help="a number or an alias; champion by default")
        case "doctor":
            add("--fix", action="store_true", help="fix what can be fixed safely")
        case "clean":
            add("name", nargs="?", help="a run's fingerprint, or a study's name; default: all runs, but no study")


def _add_slurm(add: Callable[..., argparse.Action], without: Sequence[str] = ()) -> None:
    """Add `--on slurm` and a flag for each key of the section `slurm`, which `_slurm` reads."""
    from pipeline.config.sections import SlurmConfig

    add("--on", choices=("slurm",), help="run as jobs of this Slurm cluster; default: on this machine")
    for name, field in SlurmConfig.model_fields.items():
        if name not in ("options", *without):
            of, text = _minutes if name == "time_min" else _yaml, f"{field.description}; instead of slurm.{name}"
            add(
                _flag(name),
                metavar=_flag(name)[2:].upper(),
                dest=f"slurm_{name}",
                type=of,
                default=argparse.SUPPRESS,
                help=text,
            )


def _slurm(given: "Params", arguments: argparse.Namespace) -> "SlurmConfig | None":
    """The section `slurm` with the flags of the command line; None without `--on slurm`. Raises InputError."""
    from pipeline.config.params import Params
    from pipeline.config.sections import SlurmConfig

    flags = {key.removeprefix("slurm_"): value for key, value in vars(arguments).items() if key.startswith("slurm_")}
    if arguments.on is None:
        if flags:
            raise InputError(f"{', '.join(map(_flag, flags))}: only with --on slurm")
        return None
    own = given.values.get(SlurmConfig.section_name) or {}
    values = given.values | ({SlurmConfig.section_name: own | flags} if isinstance(own, dict) else {})
    return Params(values, Path(f"{given.path} with the command line") if flags else given.path).section(SlurmConfig)


def _flag(key: str) -> str:
    """The flag of a key of the section `slurm`."""
    return f"--{key.removesuffix('_min').removesuffix('_gb')}"


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


def _become_dvc(*arguments: str) -> None:
    """Replace this process by DVC."""
    from pipeline.system.host import dvc_command

    command, environment = dvc_command(*arguments)
    sys.stdout.flush()
    os.execve(command[0], command, environment)  # noqa: S606 (there is no shell)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: a number of at least 1")
    return int(text)


def _minutes(text: str) -> int:
    """Minutes, rounded up, of 90m, 24h or 7d; a plain number could be minutes or seconds."""
    from pipeline.ops.policy import parse_duration

    try:
        return math.ceil(parse_duration(text if text[-1:].isalpha() else "?") / 60)
    except InputError:
        raise argparse.ArgumentTypeError(f"{text}: give a time above 0, such as 90m or 24h") from None


def _add_sweep(add: Callable[..., argparse.Action], without: Sequence[str]) -> None:
    """A flag for each key of the section `sweep`."""
    from pipeline.config.sections import SweepConfig

    for name, field in SweepConfig.model_fields.items():
        if name not in without:
            flag, text = f"--{name.replace('_', '-')}", f"{field.description}; instead of sweep.{name}"
            add(flag, type=_yaml, default=argparse.SUPPRESS, help=text)


def _plan(arguments: argparse.Namespace, folder: Path) -> "Plan":
    """The plan for the arguments of `learn` and `plan`, with temporary files in `folder`."""
    from pipeline.ops.plan import Options, make_plan
    from pipeline.ops.policy import parse_duration
    from pipeline.ops.sources import find_source

    if len(given := arguments.source) > 1:
        raise InputError(f"{len(given)} sources: name one, a folder or a glob in quotes, such as 'notes/*.txt'")
    options = Options(
        target=arguments.target,
        goal=arguments.goal,
        tokenizer=arguments.tokenizer,
        size=None if arguments.size == "auto" else arguments.size,
        column=arguments.column,
        time_s=None if arguments.time is None else parse_duration(arguments.time),
    )
    try:
        return make_plan(find_source(given[0], arguments.name), options, folder)
    except (InputError, IntegrityError) as error:  # the user has typed an argument, not a key of params.yaml
        words = {
            "SOURCE: corpus.source": "SOURCE",
            "corpus.source": "SOURCE",
            "corpus.column": "--column",
            "corpus.tokenizer": "--tokenizer",
        }
        message = re.sub("|".join(map(re.escape, words)), lambda key: words[key[0]], str(error))
        raise (InputError if isinstance(error, InputError) else IntegrityError)(message) from None


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not YAML: {' '.join(str(error).split())}") from None


def _open_registry() -> tuple[Any, str]:
    from pipeline.config import params, sections
    from pipeline.registry.catalog import open_registry
    from pipeline.system.host import project_root

    name = params.load_params().section(sections.RegistryConfig).model
    return open_registry(project_root()), name


if __name__ == "__main__":
    sys.exit(main())
