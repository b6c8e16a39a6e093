"""The command line, in process: exit codes, one-line errors, and what `clean` removes."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import __version__
from pipeline.__main__ import main, parse
from pipeline.system.errors import ModelMissing
from pipeline.system.files import locked
from pipeline.tracking.fingerprint import IDENTITY
from pipeline.tracking.recorder import RECORDER_LOCK
from tests.commands import check

ROOT = Path(__file__).parents[2]
RUNS = ["aaaa", "aaaa.1", "bbbb", "search"]  # two runs with one fingerprint, another run, and a study


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project's folder, in which commands run."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.setattr("pipeline.ops.on_slurm.require_slurm", lambda *asked: None)
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(folder, capsys):
    """Runs a command; returns its exit code, its output and its messages on stderr."""

    def call(*arguments):
        try:
            code = main(arguments)
        except SystemExit as stopped:  # raised by argparse for --help
            code = stopped.code
        return code, *capsys.readouterr()

    return call


def test_the_flags_of_slurm_apply_to_a_file_without_its_section(command, folder):
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text[: text.index("slurm: #")])
    assert command("check")[0] == 0
    assert "4 GPUs on each node" in command("train", "--on", "slurm", "--gpus", "4")[2]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "COMMAND"),
        (["--version"], 0, f"gpt2-to-target {__version__}\n"),
        (["check"], 0, "params.yaml is valid; "),
        (["recipe", "smoke", "--as-set"], 0, "-S optim.max_epochs="),
        (["models", "promote"], 2, "error: models promote: name a version"),
        (["models", "frobnicate"], 2, "invalid choice"),
        (["sweep", "--trials", "[1"], 2, "is not YAML"),
        (["sweep", "--workers", "0"], 2, "sweep.workers: input should be 'auto' or greater than or equal to 1, got 0"),
        (
            ["replicate", "--seeds", "x\ny"],
            2,
            "error: --seeds: invalid int value: 'x\\ny': `python -m pipeline replicate",
        ),
        (["replicate", "a\nb"], 2, "error: unrecognized arguments: a b: `python -m pipeline --help` shows"),
        ([], 2, "error: the following arguments are required: COMMAND: `python -m pipeline --help` shows"),
        (["sweep", "--top", "2"], 2, "error: --top and --seeds need `confirm`"),
        (["replicate", "--seeds", "0"], 2, "error: --seeds 0: a number of seeds from 1 to 1000"),
        (["replicate", "--seed", "3"], 2, "unrecognized arguments: --seed"),
        (["recipe", "lapto"], 2, "error: "),
        (["recipe", "--as-set"], 2, "error: recipe --as-set: name a recipe"),
        (["recipe", "smoke"], 0, "tinyshakespeare/input.txt, registry.model shakespeare-gpt2\n"),
        (["train", "--nodes", "2", "--time", "24h"], 2, "error: --nodes, --time: only with --on slurm"),
        (["train", "--on", "slurm", "--time", "90"], 2, "error: --time: 90: give a time above 0, such as 90m"),
        (["train", "--on", "slurm", "--time", "0m"], 2, "error: --time: 0m: give a time above 0"),
        (["tokenize", "--on", "slurm", "--workers", "0"], 2, "error: --workers: 0: a number of at least 1"),
        (["train", "--on", "kubernetes"], 2, "error: --on: invalid choice: 'kubernetes'"),
        (
            ["train", "--on", "slurm", "--nodes", "0"],
            2,
            "slurm.nodes: input should be greater than or equal to 1",
        ),
        (["train", "--on", "slurm", "--gpus", "4"], 2, "4 GPUs on each node, but train.processes 1"),
        (
            ["train", "--on", "slurm", "--nodes", "3"],
            2,
            "32 is not divisible by 3 nodes x 1 processes",
        ),
        (["train", "--elastic"], 2, "error: --elastic without --on slurm"),
        (["train", "--commit", "0000"], 2, "error: params.yaml has changed since this job was submitted"),
        (["tokenize", "--shard", "0"], 2, "error: --shard and --of belong together"),
        (["tokenize", "--on", "slurm", "--nodes", "9"], 2, "unrecognized arguments: --nodes 9"),
        (["tokenize", "--workers", "3"], 2, "error: --workers: only with --on slurm"),
        (["jobs"], 0, "no jobs in"),
        (["jobs", "--cancel", "7"], 2, "error: no job 7 in"),
        (["jobs", "--cancel", ""], 2, "error: no job  in"),
        (["run"], 2, "error: "),
    ],
)
def test_a_command_has_its_exit_code_and_an_error_is_one_line(command, arguments, code, words):
    found, out, err = command(*arguments)
    assert found == code
    assert words in out + err
    assert err.count("\n") == (1 if code else 0)


def test_a_folder_without_params_yaml_is_refused_and_gets_no_lock_file(command, folder, monkeypatch):
    (elsewhere := folder / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    for arguments in (["repro"], ["recipe", f"{ROOT}/recipes/smoke.yaml"]):
        assert command(*arguments) == (2, "", "error: params.yaml not found: run from the project folder\n")
        assert [*elsewhere.iterdir()] == []


def test_names_may_look_like_numbers_and_dates(folder):
    given = parse(
        ["sweep", "--study", "2026-11-29", "--storage", "journal:///2024", "--partition", "12", "--seed", "3"]
    )
    values = (given.study, given.storage, given.slurm_partition, given.seed)
    assert values == ("2026-11-29", "journal:///2024", "12", 3)
    assert parse(["sweep", "--partition", "null"]).slurm_partition is None


def test_help_shows_each_command_in_80_columns(command):
    lines = command("--help")[1].splitlines()
    modules = {path.stem for path in (ROOT / "pipeline/commands").glob("*.py")} - {"__init__", "arguments"}
    assert {line.split()[0] for line in lines if re.match("  [a-z]", line)} == modules
    assert max(map(len, lines)) <= 80


def test_a_study_and_the_jobs_have_no_common_folder(command, folder):
    for name in ("aaaa", "jobs"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    assert command("sweep", "--study", "jobs")[0] == 2
    code, said, _ = command("clean")
    assert code == 0
    assert said.endswith("kept aaaa, a study: it is removed only by name, `python -m pipeline clean aaaa`\n")
    assert command("clean", "jobs")[0] == 2


def test_check_judges_params_yaml_and_not_this_machine(command, folder):
    """No machine has both cuda and mps, a thousand cores and fp16 on mps; the doctor judges these."""
    text = (ROOT / "params.yaml").read_text().replace("precision: auto", "precision: fp16")
    text = text.replace("threads: auto", "threads: 1024").replace("processes: 1 ", "processes: 8 ")
    for device in ("cuda", "mps"):
        (folder / "params.yaml").write_text(text.replace("device: auto", f"device: {device}"))
        assert command("check")[0] == 0


@pytest.mark.parametrize("arguments", [["models"], ["generate", "x"], ["export", "hf", "out"]])
def test_the_model_is_that_of_params_yaml_or_of_the_command_line(command, monkeypatch, arguments):
    asked = []

    def ask(store, name, *which):
        asked.append(name)
        raise ModelMissing("none here")

    monkeypatch.setattr("pipeline.registry.catalog.open_registry", lambda root: None)
    for function in ("print_versions", "find_version"):
        monkeypatch.setattr(f"pipeline.registry.catalog.{function}", ask)
    for more in ([], ["--model", "other"]):
        assert command(*arguments, *more)[0] == 7
    assert asked == ["shakespeare-gpt2", "other"]
    assert "registry.model: should be a name of letters" in command(*arguments, "--model", "it's")[2]


def test_every_command_of_the_notebook_exists():
    cells = json.loads((ROOT / "notebooks" / "colab.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    shown = re.findall(r"python -m pipeline (.+?)(?:`|['\"]\))", text)  # in the table, or in run("...")
    assert {line.split()[0] for line in shown} == {"export", "generate", "models", "recipe", "run", "sweep"}
    for line in shown:
        assert check(f"totarget {line}")


def test_a_command_refuses_to_run_the_code_of_another_checkout_and_the_doctor_says_so(command, folder, monkeypatch):
    """As `.venv/bin/totarget` does in a copy of a project, whose .venv was copied with it."""
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "__main__.py").write_text("")
    code, out, err = command("check")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: this is the code of {ROOT}, not that of {folder}: ")
    monkeypatch.setattr("pipeline.ops.doctor.examine", lambda root, fix: print("examined"))
    assert command("doctor") == (0, "examined\n", "")


@pytest.fixture
def checkpoints(folder):
    for name in ("aaaa", "aaaa.1", "bbbb", "search/cccc"):
        (folder / "checkpoints" / name).mkdir(parents=True)
        (folder / "checkpoints" / name / IDENTITY).write_text("x")
    return folder / "checkpoints"


@pytest.mark.parametrize(
    ("arguments", "code", "said", "kept"),
    [
        (["aaaa"], 0, "removed 2 files, 2 bytes\n", ["bbbb", "search"]),
        (["aaaa", "--dry-run"], 0, "would remove 2 files, 2 bytes\n", RUNS),
        ([], 0, "removed 3 files, 3 bytes\nkept search, a study: it is removed only by name", ["search"]),
        (["search"], 0, "the study keeps its trials' values", ["aaaa", "aaaa.1", "bbbb"]),
        *(([name], 2, f"no run or study {name!r}", RUNS) for name in ("", "bb", "..", ".", "bbbb/../../models", "/")),
    ],
)
def test_clean_removes_the_named_run_or_study_or_all_runs(command, checkpoints, arguments, code, said, kept):
    found, out, err = command("clean", *arguments)
    assert found == code
    assert said in out + err
    assert sorted(path.name for path in checkpoints.iterdir() if path.is_dir()) == kept
    assert not list(checkpoints.glob("*.lock"))
    assert Path("models").is_dir()


def test_clean_prints_the_files_and_bytes_of_each_kind(command, checkpoints):
    folder = checkpoints / "aaaa"
    for name, size in {"step-00000003/state.json": 7, "step-00000003/m.safetensors": 1000, "samples/step-03.txt": 20,
                       "steps.jsonl": 30, "times.jsonl": 40, "mlflow_run_id": 5}.items():  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * size)
    lines = "checkpoints 2 files 1,007 bytes samples 1 files 20 bytes journals 2 files 70 bytes other files 2 files"
    assert lines in " ".join(command("clean", "aaaa", "--dry-run")[1].split())


@pytest.mark.parametrize(
    ("identity", "run_id", "why"),
    [
        ({"inexact": ["threads 2 -> 1 after step 9"]}, "1", "a run that was resumed inexactly (threads 2 -> 1 after"),
        ({"inexact": []}, None, "a run whose steps and times are not in MLflow"),
    ],
)
def test_clean_removes_what_no_training_gives_again_only_by_name_and_says_so(
    command, checkpoints, identity, run_id, why
):
    for name, known, of_mlflow in (("aaaa", {"inexact": []}, "1"), ("bbbb", identity, run_id)):
        (checkpoints / name / IDENTITY).write_text(json.dumps(known))
        (checkpoints / name / "steps.jsonl").write_text("{}")
        if of_mlflow:
            (checkpoints / name / "mlflow_run_id").write_text(of_mlflow)
    said = command("clean")[1]
    assert f"kept bbbb, {why}" in said
    assert "kept aaaa" not in said
    assert f"cannot be made again: {why}" in command("clean", "bbbb")[1]
    assert not (checkpoints / "bbbb").exists()


def test_clean_names_a_run_of_other_code(command, checkpoints):
    (checkpoints / "aaaa" / IDENTITY).write_text(json.dumps({"sources": {"pipeline/model/gpt.py": "0" * 64}}))
    assert "trained by other code than the present" in command("clean", "aaaa")[1]
    assert "other code" not in command("clean", "bbbb")[1]


def test_clean_keeps_a_run_that_another_process_trains(command, checkpoints):
    with locked(checkpoints / "aaaa.lock"):
        code, _, said = command("clean")
    assert code == 6
    assert "aaaa" in said
    assert sorted(path.name for path in checkpoints.iterdir() if path.is_dir()) == RUNS


def test_clean_keeps_a_study_of_which_a_trial_is_trained_and_waits_for_its_recorders(command, checkpoints):
    trial = checkpoints / "search" / "cccc"
    (trial / RECORDER_LOCK).touch()
    with locked(trial / RECORDER_LOCK), locked(trial.with_suffix(".lock")):  # as a worker that saves after a signal
        code, _, said = command("clean", "search")
    assert (code, "search/cccc is held by process" in said) == (6, True)
    assert (trial / IDENTITY).exists()
    with ThreadPoolExecutor() as pool:
        with locked(trial / RECORDER_LOCK):  # as a recorder that still sends after Ctrl-C
            cleaning = pool.submit(command, "clean", "search")
            assert not wait([cleaning], timeout=1).done
            assert (trial / IDENTITY).exists()
        assert cleaning.result(60)[0] == 0
    assert not (checkpoints / "search").exists()


def test_clean_keeps_a_study_that_a_job_on_slurm_trains_and_the_records_of_jobs(command, checkpoints, monkeypatch):
    (checkpoints / "jobs").mkdir()
    monkeypatch.setattr(
        "pipeline.cluster.jobs.find_live", lambda name: SimpleNamespace(id="7") if name == "study-search" else None
    )
    assert command("clean", "search")[::2] == (
        2, "error: job 7 trains study search: `python -m pipeline jobs --cancel 7` ends it\n"
    )  # fmt: skip
    assert command("clean", "jobs")[0] == 2
    assert command("clean", "aaaa")[0] == 0
    assert sorted(path.name for path in checkpoints.iterdir() if path.is_dir()) == ["bbbb", "jobs", "search"]


def test_clean_keeps_all_runs_while_a_training_waits_in_slurms_queue(command, checkpoints, monkeypatch):
    (checkpoints / "jobs").mkdir()
    monkeypatch.setattr(
        "pipeline.cluster.jobs.find_live", lambda name: SimpleNamespace(id="7") if name == "train" else None
    )
    for arguments in (["clean"], ["clean", "aaaa"]):
        code, _, said = command(*arguments)
        assert (code, said) == (2, "error: job 7 trains a run: `python -m pipeline jobs --cancel 7` ends it\n")
    assert command("clean", "search")[0] == 0
    assert sorted(path.name for path in checkpoints.iterdir() if path.is_dir()) == ["aaaa", "aaaa.1", "bbbb", "jobs"]
