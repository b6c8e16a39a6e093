"""Checkpoints are complete or absent, every altered bit is found, the newest intact one is loaded."""

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.sections import ModelConfig
from pipeline.data.vocab import Vocabulary
from pipeline.model import weights
from pipeline.model.gpt import GPT
from pipeline.model.weights import load_model, save_model
from pipeline.system import files
from pipeline.system.errors import IntegrityError, OutOfSpaceError
from pipeline.system.files import verify_manifest, write_manifest
from pipeline.training import checkpoint
from pipeline.training.checkpoint import (
    checkpoint_steps,
    keep_newest,
    load_checkpoint,
    newest_valid,
    save_checkpoint,
)

pytestmark = pytest.mark.fault


def save(folder, step):
    tensors = {"weights": {"w": torch.full((64,), float(step))}, "rng": {"cpu": torch.arange(16, dtype=torch.uint8)}}
    return save_checkpoint(folder, step, tensors, {"step": step})


@pytest.fixture
def three(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    return tmp_path


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    exact = torch.tensor([0.1, -0.0, 1e-45])
    save_checkpoint(tmp_path, 7, {"weights": {"w": exact}, "optimizer": {}}, {"step": 7, "loss_scale": 1.0})
    tensors, scalars = load_checkpoint(tmp_path, 7)
    assert tensors["weights"]["w"].numpy().tobytes() == exact.numpy().tobytes()
    assert scalars == {"step": 7, "loss_scale": 1.0}


CALLS = [
    (weights, "save_file"), (files, "fsync"), (files.os, "rename"), (files.os, "replace"), (files.shutil, "rmtree"),
    (Path, "write_text"), (Path, "mkdir"), (Path, "open"),
]  # fmt: skip


REMOVALS = [(os, "rename"), (os, "unlink"), (os, "rmdir")]


def at_nth_call(n, act, calls=CALLS, half=False):
    """From now on, have `act` called in the place of the n-th of `calls`; what that writes is `half` there before."""
    countdown = iter(range(n - 1, -1, -1))

    def deadly(original):
        def call(*arguments, **named):
            if next(countdown, None) != 0:
                return original(*arguments, **named)
            if half and original.__name__ in ("save_file", "write_text"):
                original(*arguments, **named)
                path = Path(arguments[1] if original.__name__ == "save_file" else arguments[0])
                os.truncate(path, path.stat().st_size // 2)
            return act()

        return call

    for module, name in calls:
        setattr(module, name, deadly(getattr(module, name)))


def in_a_child(work, *deadly, **named):
    """Fork a process that does `work`, but exits with 77 as `at_nth_call` says; return its code."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1  # unless what follows says otherwise; the child must never go on as pytest
    try:
        at_nth_call(deadly[0], lambda: os._exit(77), *deadly[1:], **named)
        work()
        code = 0
    finally:
        os._exit(code)


def is_intact(folder):
    try:
        verify_manifest(folder)
    except IntegrityError:
        return False
    return True


def damage_newest(folder):
    path = folder / "step-00000002" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("again", [False, True])  # the newest one is altered: it is passed over, and saved once more
def test_a_process_that_dies_at_any_call_of_a_save_leaves_a_loadable_checkpoint(tmp_path, half, again):  # A3
    for i in range(1, 100):
        shutil.rmtree(folder := tmp_path / "run", ignore_errors=True)
        save(folder, 1)
        if again:
            save(folder, 2)
            damage_newest(folder)
        code = in_a_child(lambda: save(folder, 2), i, half=half)
        renamed = (folder / "step-00000002").is_dir() and is_intact(folder / "step-00000002")
        loaded = newest_valid(folder)
        assert not list(folder.glob(".*")), "leftovers are swept"
        assert loaded[1]["step"] == (2 if renamed else 1)
        if code == 0:
            assert renamed
            break
        assert code == 77
    assert i > 20  # files, manifest, folder and its parent are each written, synced or renamed


def test_every_file_is_on_the_disk_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):  # A4
    calls = []
    for name in ("fsync", "rename"):
        module = files if name == "fsync" else files.os
        original = getattr(module, name)

        def noted(*paths, name=name, original=original):
            calls.append((name, os.path.basename(paths[0])))
            return original(*paths)

        monkeypatch.setattr(module, name, noted)
    save(tmp_path, 1)
    renamed = calls.index(("rename", ".unfinished-step-00000001"))
    before = {name for call, name in calls[:renamed] if call == "fsync"}
    assert {
        "weights.safetensors",
        "rng.safetensors",
        "state.json",
        "manifest.json",
        ".unfinished-step-00000001",
    } <= before
    assert calls[renamed + 1 :] == [("fsync", tmp_path.name)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_of_any_file_is_found_and_passed_over(three, capsys, data):  # A5
    folder = three / "step-00000003"
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    whole = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    altered = bytearray(whole)
    altered[bit // 8] ^= 1 << bit % 8
    path.write_bytes(altered)
    try:
        loaded = newest_valid(three)
        assert loaded[1]["step"] == 2
        warned = capsys.readouterr().err
        assert "falling back to the previous checkpoint" in warned
        assert path.name in warned or path.name == "manifest.json"  # which may then name the file that it is about
        assert folder.name in warned
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("damage", ["truncate", "empty", "remove"])
@pytest.mark.parametrize("name", ["weights.safetensors", "rng.safetensors", "state.json", "manifest.json"])
def test_a_file_that_is_cut_emptied_or_missing_is_named_and_passed_over(three, capsys, name, damage):  # A5
    path = three / "step-00000003" / name
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:-1])
    assert newest_valid(three)[1]["step"] == 2
    assert name in capsys.readouterr().err


def test_where_none_is_intact_it_is_an_error_that_says_what_to_do(three):  # A5
    for step in (1, 2, 3):
        (three / f"step-{step:08d}" / "state.json").write_text("{}")
    with pytest.raises(IntegrityError, match="python -m pipeline clean") as error:
        newest_valid(three)
    assert error.value.exit_code == 3


def test_a_checkpoint_after_the_best_step_needs_that_one_too(three, capsys):
    (three / "step-00000002" / "weights.safetensors").unlink()
    assert newest_valid(three, best=3)[1]["step"] == newest_valid(three)[1]["step"] == 3
    assert not capsys.readouterr().err
    assert newest_valid(three, best=2)[1]["step"] == 1
    assert "step-00000002" in capsys.readouterr().err


def test_a_folder_that_a_user_keeps_beside_them_is_no_checkpoint(three):
    shutil.copytree(three / "step-00000001", three / "step-00000009.mine")
    assert checkpoint_steps(three) == [3, 2, 1]
    keep_newest(three, 1, also=None)
    assert (three / "step-00000009.mine").is_dir()


def test_a_full_disk_names_the_bytes_and_leaves_the_last_checkpoint(tmp_path):  # A6
    """A limit on file size stands for the full disk: the system refuses the write half way, and it needs no root."""
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"weights": {"w": torch.zeros(1_000_000)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OutOfSpaceError, match=r"4,000,000 bytes needed, [\d,]+ bytes free"):
            save_checkpoint(tmp_path, 2, large, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert newest_valid(tmp_path)[1]["step"] == 1


# A hostile model: whoever can write the files can write their manifest


CONFIG = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=50257, dropout=0.0, fold_vocab=True)
VOCABULARY = Vocabulary.of(np.arange(50257) < 5, 50257)


@pytest.fixture(scope="module")
def model():
    return GPT(CONFIG, VOCABULARY).initialise(seed=1)


def write_manifest_anew(folder):
    (folder / "manifest.json").unlink()
    write_manifest(folder)


@pytest.mark.security
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{}"),
        ("config.json", "[" * 100_000),
        ("config.json", '{"model": {"n_layer": "many"}, "trained_length": 4}'),
        ("config.json", json.dumps({"model": CONFIG.updated(n_layer=1000, n_embd=2**16).model_dump(),
                                    "trained_length": 4})),  # a hundred terabytes, if it were made
        ("config.json", json.dumps({"model": CONFIG.model_dump(), "trained_length": 10**9})),
        ("config.json", json.dumps({"model": CONFIG.model_dump(), "trained_length": None})),
        ("model.safetensors", "nothing of the kind"),
        ("model.safetensors", ""),
    ],
)  # fmt: skip
def test_a_model_that_is_none_is_refused_by_name_before_it_is_made(model, tmp_path, bpe, name, content):
    save_model(folder := tmp_path / "model", model, bpe)
    load_model(folder)
    (folder / name).write_text(content)
    write_manifest_anew(folder)
    with pytest.raises(IntegrityError, match=rf"{name}|model.safetensors"):
        load_model(folder)


@pytest.mark.security
def test_a_text_with_ids_that_the_model_does_not_know_is_refused(model, tmp_path, bpe):
    save_model(folder := tmp_path / "model", model, bpe)
    counts = np.ones(60000, np.int64)
    with pytest.raises(IntegrityError, match="has 50257 ids, the text has ids beyond them"):
        load_model(folder, counts)


def test_the_newest_and_the_best_are_kept(three):
    save(three, 4)
    keep_newest(three, 2, also=1)
    assert checkpoint_steps(three) == [4, 3, 1]


def test_a_process_that_dies_at_any_call_of_a_removal_leaves_whole_checkpoints(tmp_path):  # A17
    for i in range(1, 100):
        shutil.rmtree(folder := tmp_path / "run", ignore_errors=True)
        for step in (1, 2, 3, 4):
            save(folder, step)
        code = in_a_child(lambda: keep_newest(folder, 2, also=None), i, REMOVALS)
        left = checkpoint_steps(folder)
        assert left[:2] == [4, 3]
        assert all(is_intact(folder / f"step-{step:08d}") for step in left), (
            "what is half removed does not bear the name of one"
        )
        assert newest_valid(folder)[1]["step"] == 4
        assert not list(folder.glob(".*")), "leftovers are swept"
        if code == 0:
            break
        assert code == 77
    assert left == [4, 3]
    assert i == 2 * 6 + 1  # two folders of four files, each renamed, emptied and removed


def test_dying_in_a_removal_leaves_the_newest_whole(three, monkeypatch):  # A17
    def die(path):
        os.unlink(path / "state.json")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        keep_newest(three, 1, also=None)
    monkeypatch.undo()
    assert checkpoint_steps(three) == [3, 1]  # that of step 2 is gone as a whole
    assert newest_valid(three)[1]["step"] == 3
    assert not list(three.glob(".*")), "leftovers are swept"
