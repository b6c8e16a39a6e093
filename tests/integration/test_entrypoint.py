"""Commands: one line and the right exit code for whatever the user can cause, before anything is opened."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.params import Params, load_params
from pipeline.ops.checks import SECTIONS
from pipeline.system.entrypoint import exit_code_of
from pipeline.system.errors import (
    DivergedError,
    InputError,
    IntegrityError,
    Interrupted,
    ModelMissing,
    OutOfSpaceError,
    RunLocked,
)
from pipeline.system.files import locked
from pipeline.system.signals import StopSignals
from pipeline.tracking.fingerprint import IDENTITY
from pipeline.training.config import RUN_SECTIONS, RunConfig

ROOT = Path(__file__).parents[2]


def command(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    return tmp_path


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("x"), 2),
        (IntegrityError("x"), 3),
        (DivergedError("x"), 4),
        (OutOfSpaceError("x"), 5),
        (MemoryError(), 5),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), 5),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), 5),
        (RunLocked("x"), 6),
        (ModelMissing("x"), 7),
        (Interrupted("x", signal.SIGTERM), 143),
        (Interrupted("x", signal.SIGINT), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_event_has_its_exit_code_and_one_line(error, code, capsys):
    def fail():
        raise error

    assert exit_code_of(fail) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_success_is_zero_and_a_bug_is_not_swallowed():
    assert exit_code_of(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        exit_code_of(lambda: 1 / 0)


@pytest.mark.fault
@pytest.mark.parametrize("stage", ["download", "tokenize", "train", "evaluate", "register"])
def test_a_stage_refuses_bad_parameters_before_it_opens_anything(folder, stage):  # B9
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for section in params.values():
        section["nonsense"] = 1
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    before = sorted(folder.rglob("*"))
    code, _, said = command(f"stages.{stage}", cwd=folder)
    assert code == 2
    assert said.startswith("error: params.yaml: ")
    assert said.count("\n") == 1
    assert "nonsense: unknown key" in said
    assert sorted(folder.rglob("*")) == before


def test_check_names_the_faults_of_the_whole_file_at_once(folder):
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["optim"]["lrr"] = 1
    params["corpus"]["fraction"] = 2
    params["evaluate"]["seed"] = "x"
    del params["registry"]["max_target_loss"]
    params["modle"] = {}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    code, _, said = command("pipeline", "check", cwd=folder)
    assert code == 2
    assert said.count("\n") == 1
    for fault in ("optim.lrr: unknown key (did you mean lr?)", "corpus.fraction", "evaluate.seed",
                  "registry.max_target_loss: missing", "modle: unknown section (did you mean model?)"):  # fmt: skip
        assert fault in said


def test_check_names_a_rule_that_has_nothing_to_go_by(folder):
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["target"]["rule"] = "validation"
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    code, _, said = command("pipeline", "check", cwd=folder)
    assert (code, said.count("\n")) == (2, 1)
    assert "set corpus.val_fraction above 0" in said


def test_the_committed_params_are_sound():
    code, said, _ = command("pipeline", "check", cwd=ROOT)
    assert (code, said) == (0, "params.yaml is sound\n")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_single_change_to_a_value_is_accepted_or_refused_in_words(data):  # B9
    values = load_params(ROOT / "params.yaml").values
    section = data.draw(st.sampled_from(sorted(values)))
    key = data.draw(st.sampled_from(sorted(values[section])))
    junk = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3)
    )
    changed = Params({**values, section: {**values[section], key: data.draw(junk)}})
    try:
        changed.check(*SECTIONS)
        RunConfig.of(changed)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017 (either outcome is right)


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.dates(), st.binary(max_size=5),
    st.sampled_from([10**400, -(10**400), 2**63, 1e308, 5e-324]),
)  # fmt: skip
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | LEAVES, inner, max_size=3),
    max_leaves=6,
)


def require_a_line(check, *arguments):
    """Return the faults that `check` names in one line; nothing where it finds none. Fail on any other error."""
    try:
        check(*arguments)
    except InputError as error:
        assert error.exit_code == 2  # noqa: PT017 (either outcome is right)
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return str(error)
    return ""


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_values_of_any_type_are_accepted_or_refused_in_a_line(tmp_path_factory, data):  # B9
    values = {name: dict(section) for name, section in load_params(ROOT / "params.yaml").values.items()}
    for section in data.draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=4, unique=True)):
        key = data.draw(
            st.sampled_from(sorted(values[section])) | ANYTHING.filter(lambda key: hash_of(key) is not None)
        )
        values[section][key] = data.draw(ANYTHING)
    if data.draw(st.booleans()):
        values[data.draw(st.sampled_from(sorted(values)) | st.text(max_size=5))] = data.draw(ANYTHING)
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(values))
    params = load_params(path)
    for check, kinds in ((params.check, SECTIONS), (lambda: RunConfig.of(params), ())):
        require_a_line(check, *kinds)
    assert all(len(fault.splitlines()) == 1 for fault in params.unknown_sections(*SECTIONS))


def hash_of(key):
    try:
        return hash(key)
    except TypeError:
        return None


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_each_of_several_wrong_values_is_named_by_section_and_key(data):  # B9
    values = {name: dict(section) for name, section in load_params(ROOT / "params.yaml").values.items()}
    stage = data.draw(st.sampled_from([RUN_SECTIONS, *((kind,) for kind in set(SECTIONS) - set(RUN_SECTIONS))]))
    keys = [(kind.section_name, key) for kind in stage for key in kind.model_fields]
    wrong = data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=5, unique=True))
    for section, key in wrong:
        values[section][key] = {"no": {"such": "thing"}}  # of no section's types
    said = require_a_line(Params(values).check, *stage)
    assert all(f"{section}.{key}" in said for section, key in wrong)


SCRAPS = st.text("&*!{}[]:,-?<|>'\"%@`#a1 \n.~=e", max_size=40).map(str.encode)


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=60) | SCRAPS)
def test_any_bytes_as_params_are_read_or_refused_in_a_line(tmp_path_factory, content):  # B9
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(content)
    if not require_a_line(load_params, path):
        require_a_line(load_params(path).check, *SECTIONS)


@pytest.mark.parametrize(
    "content",
    ["[" * 5000, "a: 2001-99-99", "a: !!int ''", "a: !!bool x", "a: !!timestamp x", "a: !!float z", "a: 1" + "0" * 5000,
     "a: !!python/object:os.system {}", "? [1]\n: 2\n", "a: \0"],
)  # fmt: skip
def test_what_only_yaml_itself_stumbles_over_is_refused_in_a_line(tmp_path, content):  # B9
    (tmp_path / "params.yaml").write_text(content)
    assert "is not YAML" in require_a_line(load_params, tmp_path / "params.yaml")


def test_a_key_with_a_line_break_is_named_in_one_line():
    params = Params({"corpus": {"a\nb": 1}, "c\nd": {}})
    assert "corpus.a b: unknown key" in require_a_line(params.check, *SECTIONS)
    assert params.unknown_sections(*SECTIONS)[0].startswith("c d: unknown section")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.n_embd": 385}, "n_embd 385 is not divisible by n_head 6"),
        ({"windows.seq_len": 512}, "windows.seq_len 512 is longer than model.block_size 128"),
        ({"optim.warmup": 1000}, "take 1000 steps, the run has 149"),
        ({"windows.gradient_accumulation_steps": 10**9}, "is less than one step of"),
        ({"train.threads": 100_000}, "less than or equal to 1024"),
        ({"train.threads": 0}, "greater than or equal to 1"),
        ({"train.seed": 10**22}, "train.seed"),
        ({"model.n_layer": 10**8}, "less than or equal to 1000"),
        ({"optim.lr": 0}, "optim.lr: input should be greater than 0, got 0"),
        (
            {"windows.order": "sorted"},
            "windows.order: input should be 'shuffled', 'sequential' or 'random', got 'sorted'",
        ),
    ],
)
def test_contradictions_are_named(changes, words):
    values = {name: dict(section) for name, section in load_params(ROOT / "params.yaml").values.items()}
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    with pytest.raises(InputError) as error:
        RunConfig.of(Params(values))
    assert words in str(error.value)


def test_every_section_of_a_run_is_among_the_checked():
    assert set(RUN_SECTIONS) < set(SECTIONS)


def test_signals_that_come_together_count_as_one():  # a dying DVC sends one for each of its threads
    with StopSignals() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    with pytest.raises(Interrupted, match="SIGTERM at step 3: run the same command again"):
        stop.raise_if_received("at step 3")


def test_a_signal_that_comes_again_acts_at_once(monkeypatch, interruptible):
    monkeypatch.setattr(StopSignals, "SAME_S", 0.0)
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def runs(folder):
    """Two runs of one fingerprint, another's, and a study, in checkpoints/."""
    for name in ("aaaa", "aaaa.1", "bbbb", "search/cccc"):
        (folder / "checkpoints" / name).mkdir(parents=True)
        (folder / "checkpoints" / name / IDENTITY).write_text("x")
    return folder / "checkpoints"


def kept(checkpoints):
    return sorted(path.name for path in checkpoints.iterdir() if path.is_dir())


def test_clean_removes_the_checkpoints_of_a_run_and_nothing_else(runs, folder):
    (folder / "models").mkdir()
    code, said, _ = command("pipeline", "clean", "aaaa", cwd=folder)
    assert (code, said) == (0, "removed aaaa, 0 MB\nremoved aaaa.1, 0 MB\n")
    assert kept(runs) == ["bbbb", "search"]
    assert (folder / "models").is_dir()


@pytest.mark.parametrize("name", ["bb", "..", ".", "bbbb/../../models", "/"])
def test_clean_refuses_what_is_no_run_and_no_study(runs, folder, name):
    (folder / "models").mkdir()
    code, _, said = command("pipeline", "clean", name, cwd=folder)
    assert (code, said.count("\n")) == (2, 1)
    assert kept(runs) == ["aaaa", "aaaa.1", "bbbb", "search"]
    assert (folder / "models").is_dir()


def test_clean_of_all_leaves_studies(runs, folder):
    code, said, _ = command("pipeline", "clean", cwd=folder)
    assert code == 0
    assert "kept search: a study goes only by its name" in said
    assert kept(runs) == ["search"]
    assert command("pipeline", "clean", "search", cwd=folder)[0] == 0
    assert not list(runs.iterdir())


def test_clean_leaves_a_run_that_trains(runs, folder):
    with locked(runs / "aaaa.lock"):
        code, _, said = command("pipeline", "clean", cwd=folder)
    assert code == 6
    assert "aaaa" in said
    assert kept(runs) == ["aaaa", "aaaa.1", "bbbb", "search"]


def test_a_stage_started_in_the_wrong_folder_says_where_to_run():
    code, _, said = command("stages.evaluate", cwd=ROOT / "stages")
    assert (code, said.count("\n")) == (1, 1)
    assert "from the project's folder" in said


def test_a_file_that_cannot_be_written_is_named_in_a_line(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    assert exit_code_of(lambda: (tmp_path / "there").write_text("x")) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'there'}: is a directory")
    assert said.count("\n") == 1


@pytest.mark.parametrize("arguments", [["recipe", "lapto"], ["run"]])
def test_what_is_not_there_is_named_in_a_line(folder, arguments):
    code, _, said = command("pipeline", *arguments, cwd=folder)
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("program", [["-m", "pipeline", "doctor"], ["-m", "stages.train"], ["app.py"]])
def test_a_python_without_the_packages_is_told_in_a_line(program):
    no_packages = "-S"
    done = subprocess.run([sys.executable, no_packages, *program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {sys.executable} has no torch: activate")
    assert done.stderr.count("\n") == 1
