"""make: what it installs when, which build of torch, and folders that git does not track."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ECHO = "#!/bin/sh\necho dvc $@\n"
MADE_OF = (
    "Makefile",
    "pyproject.toml",
    *(f"requirements/{name}.txt" for name in ("base", "torch", "dev", "docs", "s3")),
)
UNTRACKED = "git does not track this folder: DVC will work without git, and runs record no commit"
GIT_FAILS = "mkdir ../bin && printf '#!/bin/sh\nexit 127' >../bin/git && chmod +x ../bin/git"


def program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)


def copied(folder: Path) -> Path:
    """What make reads, and programs that only print their arguments."""
    for name in (*MADE_OF, "dvc.yaml", ".dvc/config"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("python", "dvc", "mkdocs"):
        program(folder / ".venv/bin" / name, ECHO)
    return folder


@pytest.mark.parametrize(
    ("command", "tracked"),
    [
        (":", False),  # a ZIP download
        ("rm -r .dvc", False),  # an upload without hidden folders
        ("mkdir .git", False),
        ("echo gitdir: /nowhere/.git/worktrees/x >.git", False),  # a worktree, or a submodule, that was copied
        ("git -C .. init -q", False),  # within another repository
        (f"git init -q && git add . && {GIT_FAILS}", False),
        ("git init -q && git add .", True),
    ],
)
def test_make_configures_dvc_where_git_does_not_track_the_folder(tmp_path, monkeypatch, command, tracked):
    folder = copied(tmp_path / "project")
    subprocess.run(command, shell=True, cwd=folder, check=True)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")

    def made(*arguments: str) -> list[str]:
        return subprocess.check_output(["make", "--silent", *arguments], cwd=folder, text=True).splitlines()

    without_git = [] if tracked else ["dvc config --local core.no_scm true", UNTRACKED]
    install = "requirements/install.py .venv base project --torch auto"
    assert made(".venv/installed", "PYTHON=echo") == [install, *without_git]
    assert (folder / ".dvc").is_dir()
    for target, last in (("install", []), ("repro", ["dvc -m pipeline repro"]), ("sweep", ["dvc -m pipeline sweep"])):
        assert made(target) == [*without_git, *last]  # .git may be removed later
    (folder / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    with_git_again = ["dvc config --local --unset core.no_scm"] if tracked else []
    assert made("repro") == [*with_git_again, "dvc -m pipeline repro"]


def test_make_repro_stops_where_git_refuses_a_folder_of_another_user(tmp_path, monkeypatch):
    folder = copied(tmp_path)
    (folder / ".venv/installed").touch()
    subprocess.run("git init -q && git add .", shell=True, cwd=folder, check=True)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    done = subprocess.run(["make", "--silent", "repro"], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "git config --global --add safe.directory" in done.stderr


def test_each_target_installs_what_it_needs_once(tmp_path):
    folder = copied(tmp_path)
    subprocess.run("git init -q && git add .", shell=True, cwd=folder, check=True)

    def made(*arguments: str) -> list[str]:
        command = ["make", "--silent", *arguments, "PYTHON=echo"]
        return subprocess.check_output(command, cwd=folder, text=True).splitlines()

    learn = ("learn", "TEXT=a friend's diary.txt", "OPTIONS=--time 1m --yes")
    last = "dvc -m pipeline learn --time 1m --yes a friend's diary.txt"
    assert made(*learn) == ["requirements/install.py .venv base project --torch auto", last]
    assert made(*learn) == [last]
    assert made("install") == []
    assert made("sweep", f"VENV={folder}/.venv") == ["dvc -m pipeline sweep"]
    assert made("install", "EXTRAS=s3") == ["requirements/install.py .venv s3"]
    assert made("docs", "EXTRAS=s3") == ["requirements/install.py .venv docs", "dvc build --strict"]
    assert made("test")[0] == "requirements/install.py .venv dev"
    assert len(made("test", "check", "faults")) == 3
    later = (folder / ".venv/installed-dev").stat().st_mtime + 1
    os.utime(folder / "requirements/base.txt", (later, later))
    assert made("install", "TORCH=cpu") == ["requirements/install.py .venv base project --torch cpu"]
    failed = subprocess.run(["make", "--silent", "learn"], cwd=folder, capture_output=True, text=True)
    assert (failed.returncode, failed.stderr.splitlines()[0]) == (2, "error: name a text: make learn TEXT=diary.txt")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one build of torch")
@pytest.mark.parametrize("tool", ["uv", "pip"])
@pytest.mark.parametrize(
    ("has_gpu", "options", "cpu_fails", "builds"),  # which builds of torch are tried
    [
        (False, [], False, ["cpu"]),
        (False, [], True, ["cpu", "default"]),
        (True, [], False, ["default"]),
        (True, ["--torch", "cpu"], False, ["cpu"]),
        (False, ["--torch", "cuda"], False, ["default"]),
    ],
)
def test_the_cpu_build_of_torch_is_chosen_where_there_is_no_nvidia_driver(
    tmp_path, monkeypatch, tool, has_gpu, options, cpu_fails, builds
):
    if not has_gpu and not options and Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has an NVIDIA driver")
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    fails = "case $* in *--index-url*) exit 1;; esac\n" if cpu_fails else ""
    has_pip = "case $* in *--version) exit;; esac\n"
    script = f'#!/bin/sh\n{has_pip}echo "{{tool}} $@" >>{tmp_path}/log\n{fails}'
    program(tmp_path / "venv/bin/python", script.format(tool="pip"))
    (tmp_path / "bin").mkdir()
    if tool == "uv":
        program(tmp_path / "bin/uv", script.format(tool="uv"))
    if has_gpu:
        program(tmp_path / "bin/nvidia-smi", "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    command = [sys.executable, "requirements/install.py", "venv", "base", "project", *options]
    said = subprocess.check_output(command, cwd=tmp_path, text=True)
    lines = (tmp_path / "log").read_text().splitlines()
    assert {line.split()[0] for line in lines} == {tool}
    torch = [line for line in lines if line.endswith("requirements/torch.txt")]
    assert ["cpu" if "--index-url" in line else "default" for line in torch] == builds
    assert sum("--no-deps --require-hashes" in line for line in lines) == 1
    assert lines[-1].endswith(f"--no-deps --no-build-isolation --editable {tmp_path}")
    assert ("is out of reach" in said) is cpu_fails


def test_an_environment_without_pip_is_completed_without_uv(tmp_path, monkeypatch):
    """As after Ctrl-C while venv installs pip, and on Debian without its package python3-venv."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    create = f"import install; install.create({str(tmp_path / 'venv')!r})"
    subprocess.run([sys.executable, "-c", create], cwd=ROOT / "requirements", check=True)
    assert b"pip" in subprocess.check_output([tmp_path / "venv/bin/python", "-m", "pip", "--version"])


def test_after_ctrl_c_the_installation_ends_with_one_line(tmp_path, monkeypatch, interruptible):
    program(tmp_path / "bin/uv", "#!/bin/sh\necho traceback >&2\nkill -INT $PPID\n/bin/sleep 9\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    command = [sys.executable, ROOT / "requirements/install.py", tmp_path / "venv", "base"]
    done = subprocess.run(command, capture_output=True, text=True)
    line = "error: interrupted; the same command tries it again\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", line)
