"""Check the installed packages, git, DVC, params.yaml, this machine and its disk."""

import contextlib
import fcntl
import io
import math
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipeline.config.params import load_params
from pipeline.config.sections import CorpusConfig
from pipeline.data.token_files import count_tokens
from pipeline.data.tokenizer import MAX_VOCAB, load_tokenizer, parse_tokenizer
from pipeline.data.vocab import Vocabulary
from pipeline.ops.params_check import check_params
from pipeline.system.device import prepare_machine
from pipeline.system.errors import InputError, IntegrityError
from pipeline.system.files import flock
from pipeline.system.host import ADD_PIP, git_info, has_pip
from pipeline.system.limits import cores
from pipeline.training.config import RunConfig
from pipeline.training.preflight import n_checkpoints, saved_bytes

INSTALL = f"`python requirements/install.py {sys.prefix} base` installs the locked versions"
MAIN = ("torch", "mlflow", "dvc")  # packages whose versions are shown
TOOLS = {  # name of a program that is started -> hint if it does not start
    "git": "install it: DVC and the record of a run's code need it",
    "dvc": "`. .venv/bin/activate`, or `make clean-venv install` if the folder was moved",
}


class Finding(NamedTuple):
    """One result of a check: `ok`, a `note`, an error `to fix`, or an error that was `fixed`."""

    mark: Literal["ok", "note", "to fix", "fixed"]
    topic: str
    what: str
    hint: str | None = None  # what the user can do
    fix: Callable[[], str] | None = None  # fixes the error, and returns one line that says what it did

    def __str__(self) -> str:
        text = self.what if self.hint is None else f"{self.what}: {self.hint}"
        return f"{self.mark:<6}  {self.topic:<9}  {' '.join(text.split())}"


def examine_packages(root: Path) -> Iterator[Finding]:
    """Check that Python and the installed packages have the versions that pyproject.toml requires."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed, installed = {"Python": SpecifierSet(project["requires-python"])}, {"Python": platform.python_version()}
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.marker is None or requirement.marker.evaluate():
            needed[requirement.name] = requirement.specifier
            with contextlib.suppress(metadata.PackageNotFoundError):
                installed[requirement.name] = metadata.version(requirement.name)
    unmet = [
        f"{name} {version or 'is not installed'}, but pyproject.toml requires {specifier or 'it'}"
        for name, specifier in needed.items()
        if not (version := installed.get(name)) or not specifier.contains(version, prereleases=True)
    ]
    if not has_pip():
        what = f"{sys.executable} has no pip, which downloads sources such as wheel:NAME==VERSION/MEMBER"
        yield Finding("note", "packages", what, ADD_PIP)
    yield from (Finding("to fix", "packages", what, INSTALL) for what in unmet)
    if not unmet:
        named = ", ".join(f"{name} {installed[name]}" for name in ("Python", *MAIN) if name in installed)
        yield Finding("ok", "packages", f"{named}; all {len(needed) - 1} packages fit pyproject.toml")


def examine_tools(root: Path) -> Iterator[Finding]:
    for name, hint in TOOLS.items():
        try:
            done = subprocess.run([name, "--version"], capture_output=True, text=True, check=True, timeout=60)
            yield Finding("ok", name, done.stdout)
        except (OSError, subprocess.SubprocessError) as error:  # missing, or its interpreter was moved
            yield Finding("to fix", name, f"does not start ({error})", hint)
    if git_info()["git_commit"] == "unknown":
        hint = "`git status` says more; for DVC without git: dvc config --local core.no_scm true"
        yield Finding("note", "git", f"git does not track {root}: runs record no commit", hint)


def examine_params(root: Path) -> Iterator[Finding]:
    """Check params.yaml and the disk space for a run, and show what the section `train` selects on this machine."""
    params = load_params(root / "params.yaml")
    check_params(params)
    yield Finding("ok", "params", f"{params.path} is valid")
    config = RunConfig.of(params).sized_for(_n_vocab(root, params.section(CorpusConfig).tokenizer))
    tokens = root / "data" / "tokens"
    n_tokens = count_tokens(tokens) if tokens.is_dir() else 0  # before `dvc repro`, the length of the run is unknown
    with contextlib.redirect_stdout(output := io.StringIO()):  # about the GPU and the compiler
        machine = prepare_machine(config.train, config.flops(n_tokens))
    name, n = machine.device.type, cores()
    if name == "cuda":
        name = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    yield Finding("ok", "device", f"{name}, train.precision {machine.precision}")
    yield Finding("ok", "threads", f"train.threads {machine.threads}; {n} of {os.cpu_count()} cores are usable")
    if machine.threads > n:
        yield Finding("note", "threads", "more threads than usable cores", f"train.threads: {n}")
    for line in output.getvalue().splitlines():
        yield Finding("note", line.removeprefix("train.").partition(":")[0], line)
    try:
        with params.path.open() as file:
            flock(file, fcntl.LOCK_SH)  # changes nothing
    except InputError as error:
        yield Finding("to fix", "disk", str(error))
    checkpoint, model = saved_bytes(config, Vocabulary.full(config.model.n_ids))
    needed = n_checkpoints(config.optim) * checkpoint + 3 * model  # in models/, DVC's cache and MLflow's artifacts
    free = shutil.disk_usage(root).free
    needed_gb, free_gb = math.ceil(needed / 1e8) / 10, math.floor(free / 1e8) / 10  # never equal if free < needed
    what = f"{free_gb:,.1f} GB free in {root}, a run may need {needed_gb:,.1f} GB"
    if free < needed:
        yield Finding("to fix", "disk", what, "free disk space; `python -m pipeline clean` removes checkpoints")
    else:
        yield Finding("ok", "disk", what)


def _n_vocab(root: Path, name: str) -> int:
    """The number of ids of the tokenizer `name`; an upper bound if it depends on a text that no stage has read."""
    _, size = parse_tokenizer(name)
    if size:
        return size
    try:
        return load_tokenizer(root / "data" / "tokenizer", name).n_vocab
    except (InputError, IntegrityError):
        return MAX_VOCAB
