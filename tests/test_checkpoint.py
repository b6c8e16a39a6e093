"""Checkpoints: whole or not there, every altered bit found, the newest intact one wins."""

import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import checkpoint, files
from pipeline.checkpoint import checkpoint_steps, keep_newest, load_checkpoint, newest_valid, save_checkpoint
from pipeline.errors import IntegrityError, OutOfSpaceError

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
    tensors, facts = load_checkpoint(tmp_path, 7)
    assert tensors["weights"]["w"].numpy().tobytes() == exact.numpy().tobytes()
    assert facts == {"step": 7, "loss_scale": 1.0}


CALLS = [
    (checkpoint, "save_file"), (files, "fsync"), (files.os, "rename"), (files.os, "replace"), (files.shutil, "rmtree"),
    (Path, "write_text"), (Path, "mkdir"), (Path, "open"),
]  # fmt: skip


def save_and_die(folder, step, at_call):
    """In a child process: save `step`, but exit at the `at_call`-th call that touches the disk; return its code."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    countdown = iter(range(at_call - 1, -1, -1))

    def deadly(original):
        def call(*arguments, **named):
            if next(countdown, None) == 0:
                os._exit(77)
            return original(*arguments, **named)

        return call

    for module, name in CALLS:
        setattr(module, name, deadly(getattr(module, name)))
    save(folder, step)
    os._exit(0)


def test_a_process_that_dies_at_any_call_of_a_save_leaves_a_loadable_checkpoint(tmp_path):  # A3
    for i in range(1, 100):
        shutil.rmtree(folder := tmp_path / "run", ignore_errors=True)
        save(folder, 1)
        code = save_and_die(folder, 2, at_call=i)
        loaded = newest_valid(folder)
        assert not list(folder.glob(".*")), "leftovers are swept"
        if code == 0:
            assert loaded[1]["step"] == 2
            break
        assert code == 77
        assert loaded[1]["step"] in (1, 2)
    assert i > 10  # files, manifest, folder and its parent are each written, synced or renamed


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
        assert "falling back to the checkpoint before" in capsys.readouterr().err
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
    with pytest.raises(IntegrityError, match="python -m pipeline clean"):
        newest_valid(three)


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


def test_the_newest_and_the_best_are_kept(three):
    save(three, 4)
    keep_newest(three, 2, also=1)
    assert checkpoint_steps(three) == [4, 3, 1]


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
