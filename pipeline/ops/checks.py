"""environment: this machine, what is installed and params.yaml -> findings about what training will meet here."""

import contextlib
import io
import os
import platform
import shutil
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipeline.config.params import Params, Section, load_params
from pipeline.config.sections import CorpusConfig, EvaluateConfig, RegistryConfig, SweepConfig, TrainConfig
from pipeline.data.vocab import Vocabulary
from pipeline.ops.finding import Finding
from pipeline.sweep.search_space import check_space
from pipeline.system.device import Machine, cores, prepare_machine
from pipeline.system.errors import InputError
from pipeline.system.host import SOURCE_ROOT, git_info
from pipeline.training.config import RUN_SECTIONS, RunConfig
from pipeline.training.preflight import CHECKPOINTS, nearest_existing, saved_bytes

SECTIONS: tuple[type[Section], ...] = (CorpusConfig, *RUN_SECTIONS, EvaluateConfig, RegistryConfig, SweepConfig)
INSTALL = "`python -m pip install --constraint constraints.txt --editable .` brings what is needed"
NAMED = ("torch", "mlflow", "dvc", "optuna", "gradio")  # what a question about a fault will ask for
AUTO = TrainConfig(
    seed=0, device="auto", precision="auto", threads="auto", deterministic=False, compile=True,
    gradient_checkpointing=False, shard=False, processes=1,
)  # fmt: skip
FLOOR_BYTES = 1_000_000_000  # free where no recipe says how much is needed
CGROUPS = Path("/sys/fs/cgroup")


def examine_environment(root: Path) -> Iterator[Finding]:
    yield from examine_packages(SOURCE_ROOT / "pyproject.toml")
    yield from examine_machine()
    yield from examine_tools(root)
    yield from examine_params(root)
    yield examine_disk(root)


def params_faults(params: Params) -> list[str]:
    """Everything that is wrong in params.yaml."""
    faults = params.unknown_sections(*SECTIONS)
    try:
        params.check(*SECTIONS)
        if (need := RunConfig.of(params).needs_held_out) and not params.section(CorpusConfig).val_fraction:
            faults.append(f"{need}, but nothing is held out: set corpus.val_fraction above 0")
        check_space(params.section(SweepConfig), params)
    except InputError as error:
        faults.append(str(error).removeprefix(f"{params.path}: "))
    return faults


def examine_packages(pyproject: Path) -> Iterator[Finding]:
    """Python and the installed packages against what pyproject.toml asks for, which is newer than any installation."""
    if not pyproject.is_file():
        yield Finding("note", "packages", f"{pyproject} is missing, so that no minimum is known")
        return
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    python, needed = platform.python_version(), project["requires-python"]
    if not SpecifierSet(needed).contains(python, prereleases=True):
        yield Finding("mend", "packages", f"Python {python}, needed is {needed}", "make .venv with another Python")
    wanted = [Requirement(text) for text in project["dependencies"]]
    wanted = [requirement for requirement in wanted if requirement.marker is None or requirement.marker.evaluate()]
    unmet = [found for requirement in wanted if (found := _unmet(requirement))]
    yield from (Finding("mend", "packages", found, INSTALL) for found in unmet)
    if not unmet:
        named = ", ".join(f"{name} {metadata.version(name)}" for name in NAMED)
        yield Finding("ok", "packages", f"Python {python}, {named}; all {len(wanted)} packages fit pyproject.toml")


def examine_machine() -> Iterator[Finding]:
    """What `auto` in the section `train` comes to here."""
    with contextlib.redirect_stdout(said := io.StringIO()):  # it tells of a missing compiler
        machine = prepare_machine(AUTO)
    n, limit = cores(), cpu_quota(CGROUPS)
    yield Finding(
        "ok", "threads", f"{n} of {os.cpu_count()} cores may be used; train.threads: auto is {machine.threads}"
    )
    if limit is not None and limit < n:
        fitting = max(1, int(limit))
        yield Finding(
            "note",
            "threads",
            f"a quota of {limit:g} cores is set, which auto does not see",
            f"train.threads: {fitting}",
        )
    omp = os.environ.get("OMP_NUM_THREADS", "")
    if omp.isdecimal() and int(omp) < n:
        yield Finding(
            "note", "threads", f"OMP_NUM_THREADS={omp} binds what else computes; training sets its own number"
        )
    name = machine.device.type
    why = "which is fast here" if machine.precision == "bf16" else f"since this {name} has no fast bf16"
    yield Finding("ok", "precision", f"train.precision: auto is {machine.precision}, {why}")
    if machine.compiled:
        yield Finding("ok", "compiler", f"there is one for train.compile on this {name}")
    else:
        yield Finding("note", "compiler", f"{said.getvalue().strip()}; nothing else needs one")
    if name == "cuda":
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            yield Finding("ok", "GPU", f"{gpu.name}, {gpu.total_memory / 1e9:,.0f} GB")
    else:
        yield Finding("ok", "GPU", f"none that torch can use: training is done on the {name}")


def cpu_quota(cgroups: Path, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """How many cores' time the system grants this process, by its own and all groups above; None: no limit."""
    groups = own.read_text(encoding="utf-8").splitlines() if own.is_file() else []
    granted: list[float] = []
    for _, controllers, name in (group.split(":", 2) for group in groups if group.count(":") > 1):
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = cgroups / controllers if controllers else cgroups
        for place in {base, *((base / name.strip("/")).parents), base / name.strip("/")}:
            granted += _granted(place) if place.is_relative_to(base) else []
    return min(granted, default=None)


def examine_tools(root: Path) -> Iterator[Finding]:
    if shutil.which("git") is None:
        yield Finding("mend", "git", "not on the PATH", "install it: DVC, and what a run notes of its code, need it")
    elif (commit := git_info()["git_commit"]) == "unknown":
        yield Finding("note", "git", f"{root} is no repository with a commit, so that runs cannot name their code")
    else:
        yield Finding("ok", "git", f"at commit {commit[:8]}")
    dvc = shutil.which("dvc")
    if dvc is None:
        yield Finding("mend", "dvc", "not on the PATH", "`. .venv/bin/activate`, after `make repro` has made .venv")
    elif (python := _interpreter(Path(dvc))) and not Path(python).exists():
        hint = "`make clean-venv repro` makes .venv where it is now"
        yield Finding("mend", "dvc", f"{dvc} looks for {python}, which is gone, as after moving the folder", hint)
    else:
        yield Finding("ok", "dvc", dvc)


def examine_params(root: Path) -> Iterator[Finding]:
    """params.yaml, and whether this machine has what it asks for."""
    try:
        params = load_params(root / "params.yaml")
        if faults := params_faults(params):
            raise InputError(f"{params.path}: {'; '.join(faults)}")
        machine = _machine_of(params)
    except InputError as error:
        what, hint = str(error), "mend it, `git diff params.yaml` shows what was changed"
        yield Finding("mend", "params", what, None if "not found" in what else hint)
    else:
        yield Finding("ok", "params", f"{params.path} is sound")
        if machine.threads > (n := cores()):
            what = f"train.threads is {machine.threads}, and {n} cores may be used"
            yield Finding("note", "params", what, "train.threads: auto")
        at_best = prepare_machine(AUTO.updated(device=machine.device.type, compile=False)).precision
        if (machine.precision, at_best) == ("bf16", "fp32"):
            what = "train.precision is bf16, in which a product takes longer on this cpu than in fp32"
            yield Finding("note", "params", what, "train.precision: auto")


def examine_disk(root: Path) -> Finding:
    """Free bytes, wherever a run writes, against what the present recipe may take there."""
    needs = _needs(root)
    claim = "the recipe may take" if needs else "there should be at least"
    needs = needs or {"checkpoints": FLOOR_BYTES}
    disks: dict[int, int] = {}
    for name, needed in needs.items():
        disk = nearest_existing(root / name).stat().st_dev
        disks[disk] = disks.get(disk, 0) + needed
    said = []
    for disk, needed in disks.items():
        names = [name for name in needs if nearest_existing(root / name).stat().st_dev == disk]
        free = shutil.disk_usage(nearest_existing(root / names[0])).free
        words = f"{free / 1e9:,.1f} GB free for {', '.join(names)}; {claim} {needed / 1e9:,.1f} GB"
        if free < needed:
            return Finding("mend", "disk", words, "make room; `python -m pipeline clean` removes working checkpoints")
        said.append(words)
    return Finding("ok", "disk", "; ".join(said))


def _needs(root: Path) -> dict[str, int]:
    """Bytes that a run may take in each folder; nothing where the params are not sound."""
    try:
        params = load_params(root / "params.yaml")
        config = RunConfig.of(params)
    except InputError:
        return {}
    checkpoint, model = saved_bytes(config, Vocabulary.full(config.model.vocab_size))
    return {"checkpoints": CHECKPOINTS * checkpoint, "models": model, ".dvc": model, "mlruns": model}


def _machine_of(params: Params) -> Machine:
    """What the section `train` comes to here. Raises InputError for what it asks for and is not there."""
    return prepare_machine(params.section(TrainConfig).updated(compile=False))


def _unmet(requirement: Requirement) -> str | None:
    """What is wrong with the installed package, None where it is as required."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed, needed is {requirement.specifier}"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} {version} is installed, needed is {requirement.specifier}"


def _granted(group: Path) -> list[float]:
    """Cores' time of one group, in the files of either version of cgroups."""
    try:
        if (path := group / "cpu.max").is_file():
            quota, period = path.read_text(encoding="utf-8").split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period"))
        return [int(quota) / int(period)] if quota != "max" and int(quota) > 0 else []
    except (OSError, ValueError):
        return []


def _interpreter(script: Path) -> str | None:
    """What the first line of a script says it is run by."""
    with script.open("rb") as file:
        first = file.readline(1000)
    return os.fsdecode(first[2:].split()[0]) if first.startswith(b"#!/") else None
