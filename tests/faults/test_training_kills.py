"""A training that is killed, or whose disk is full, at any moment ends with the same bits."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from pipeline.model import weights
from pipeline.system import files
from pipeline.system.entrypoint import exit_code_of
from pipeline.system.errors import IntegrityError
from pipeline.system.files import verify_manifest
from pipeline.training import consumers
from pipeline.training import train as training
from pipeline.training.checkpoint import checkpoint_steps, keep_newest, newest_valid
from tests.trainings import (
    ROOT,
    STEPS,
    Untracked,
    at_step,
    bits,
    change,
    end,
    n_steps,
    output_of,
    run_folder,
    start,
    train,
)
from tests.unit.training.test_checkpoint import save
from tests.waiting import wait_until

SAVE_CALLS = [
    (weights, "save_file"), (files, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"),
    (Path, "write_text"), (Path, "mkdir"), (Path, "open"),
]  # fmt: skip
REMOVE_CALLS = [(os, "rename"), (os, "unlink"), (os, "rmdir")]


def at_nth_call(n, act, calls, half=False):
    """Replace the n-th of `calls` by `act`; with `half`, after a call that writes a file has written half of it."""
    countdown = iter(range(n - 1, -1, -1))

    def counted(original):
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
        setattr(module, name, counted(getattr(module, name)))


def exit_code_of_fork(work, nth_call, calls, half=False):
    """Fork a process that does `work`, but exits with 77 at its n-th of `calls`; return its exit code."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        at_nth_call(nth_call, lambda: os._exit(77), calls, half)
        work()
        code = 0
    finally:
        os._exit(code)  # the fork must never return to pytest


def is_intact(folder):
    try:
        verify_manifest(folder)
    except IntegrityError:
        return False
    return True


@pytest.mark.parametrize(("half", "damaged"), [(False, False), (True, True)])
def test_death_at_any_call_of_a_save_leaves_a_loadable_checkpoint(tmp_path, half, damaged):  # A3
    for i in range(1, 100):
        shutil.rmtree(folder := tmp_path / "run", ignore_errors=True)
        save(folder, 1)
        if damaged:  # the newest checkpoint is altered, and saved again
            altered = save(folder, 2) / "weights.safetensors"
            altered.write_bytes(altered.read_bytes()[:-1] + b"\7")
        code = exit_code_of_fork(lambda: save(folder, 2), i, SAVE_CALLS, half)
        renamed = (folder / "step-00000002").is_dir() and is_intact(folder / "step-00000002")
        loaded = newest_valid(folder)
        assert not list(folder.glob(".*")), "leftovers are removed"
        assert loaded[1]["step"] == (2 if renamed else 1)
        if code == 0:
            assert renamed
            break
        assert code == 77
    assert i > 20  # files, manifest, folder and its parent are each written, synced or renamed


def test_death_at_any_call_of_a_removal_leaves_whole_checkpoints(tmp_path):  # A17
    for i in range(1, 100):
        shutil.rmtree(folder := tmp_path / "run", ignore_errors=True)
        for step in (1, 2, 3, 4):
            save(folder, step)
        code = exit_code_of_fork(lambda: keep_newest(folder, 4, keep=2), i, REMOVE_CALLS)
        left = checkpoint_steps(folder)
        assert left[:2] == [4, 3]
        assert all(is_intact(folder / f"step-{step:08d}") for step in left), "a half removed one has another name"
        assert newest_valid(folder)[1]["step"] == 4
        assert not list(folder.glob(".*")), "leftovers are removed"
        if code == 0:
            break
        assert code == 77
    assert left == [4, 3]
    assert i == 2 * 6 + 1  # two folders of four files, each renamed, emptied and removed


def train_and_wait_after(step):
    at_step(pytest.MonkeyPatch(), step, lambda: time.sleep(600))  # until it is killed
    train()


def train_and_die_in_the_save_of(step, nth_call):
    """End this process by SIGKILL at the n-th call that touches the disk in the save of `step`."""
    save_checkpoint = consumers.save_checkpoint

    def deadly(folder, saved, *state):
        if saved == step:
            at_nth_call(nth_call, lambda: os.kill(os.getpid(), signal.SIGKILL), SAVE_CALLS)
        return save_checkpoint(folder, saved, *state)

    consumers.save_checkpoint = deadly
    train()


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(workspace, straight, chance):  # A1
    change(workspace, **{"checkpoint.interval_steps": 2})
    for n in (2, 5, 8):  # six kills: in or between two steps, and in the next save
        process = start(train_and_wait_after, n + 2)
        assert wait_until(lambda: n_steps() >= n or not process.is_alive(), 120)  # noqa: B023 (used at once)
        time.sleep(chance.uniform(0, 0.02))  # a random moment of a step, or of a save
        process.kill()
        assert end(process) == -signal.SIGKILL, output_of(process)
        in_save = max(checkpoint_steps(run_folder()), default=0) + 2
        process = start(train_and_die_in_the_save_of, in_save, chance.randint(4, 20))
        assert end(process) == -signal.SIGKILL, output_of(process)
        assert list(run_folder().glob(".unfinished-step-*")), "the next start removes it"
    process = start(train)
    assert end(process) == 0, output_of(process)
    assert bits() == bits(straight)


def train_on_a_small_disk():
    """In a mount namespace: train on a disk that is too small, on one that becomes full twice, and once more."""
    training.Recorder = Untracked
    disk = Path("checkpoints")
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)  # a checkpoint has 1.3 MB
    codes, left = [exit_code_of(train)], []
    assert not n_steps()
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)

    def fill(left_bytes):
        with (disk / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - left_bytes)

    for step, left_bytes in ((4, 0), (7, 100_000)):  # not even the next record fits; a record does, no checkpoint
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, step, lambda left_bytes=left_bytes: fill(left_bytes))
            codes.append(exit_code_of(train))
        left.append(sorted(path.name for path in run_folder().iterdir() if path.name.startswith((".", "step-"))))
        (disk / "filler").unlink()
    codes.append(exit_code_of(train))
    print(json.dumps([codes, left, bits()]))


def test_a_disk_that_is_too_small_is_refused_and_a_full_one_costs_nothing(workspace, straight):  # A6, A7
    if not shutil.which("unshare") or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("a process may not mount a file system of its own here")
    program = "from tests.faults.test_training_kills import train_on_a_small_disk as go; go()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(["unshare", "-Urm", sys.executable, "-c", program], env=environment, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes, left, found = json.loads(done.stdout.splitlines()[-1])
    assert codes == [5, 5, 5, 0]
    assert left == [["step-00000003"], ["step-00000003", "step-00000006"]]  # intact, and nothing half written
    assert found == bits(straight)
    small, no_record, no_checkpoint = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert re.search(r"may need [\d,]+ bytes of disk in .+checkpoints.*, [\d,]+ bytes are free: make room", small)
    assert re.search(r"disk full in .+: (.+ needed, )?0 bytes free, make room", no_record)
    assert re.search(r"disk full in .+: 1,2\d\d,\d\d\d bytes needed, [\d,]+ bytes free, make room", no_checkpoint)
    assert "Traceback" not in done.stderr


def train_in_a_terminal(name, under_nohup):
    """Train in a session with this terminal; wait after step 4 until the terminal is closed."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for descriptor in (0, 1, 2):
        os.dup2(terminal, descriptor)
    os.close(terminal)
    if under_nohup:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(pytest.MonkeyPatch(), 4, lambda: wait_until(Path("closed").exists, 120))
    train()


@pytest.mark.parametrize("under_nohup", [False, True])
def test_when_its_terminal_is_closed_a_training_stops_or_under_nohup_continues(
    workspace, straight, interruptible, under_nohup
):  # A8
    ours, its = os.openpty()
    process = start(train_in_a_terminal, os.ttyname(its), under_nohup)
    assert wait_until(lambda: n_steps() == 4 or not process.is_alive(), 120)
    os.close(its)
    os.close(ours)
    Path("closed").touch()
    assert end(process) == (0 if under_nohup else 128 + signal.SIGHUP)
    assert checkpoint_steps(run_folder())[0] == n_steps() == (STEPS if under_nohup else 4)
    train()
    assert bits() == bits(straight)


def test_ctrl_c_while_it_is_importing_ends_it_with_one_line(workspace, interruptible):  # A8
    process = subprocess.Popen([sys.executable, "-m", "stages.train"], env={**os.environ, "PYTHONPATH": str(ROOT)},
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    maps = Path(f"/proc/{process.pid}/maps")
    assert wait_until(lambda: "/torch/" in maps.read_text(), 120)  # before this, Python itself handles Ctrl-C
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=120)[1] == "error: interrupted: run the same command again to repeat it\n"
    # Python ends by the signal itself if it was caught inside of an `exec`, as that of a dataclass
    assert process.returncode in (128 + signal.SIGINT, -signal.SIGINT)
