"""Install locked packages into a Python environment, with uv where it is installed, otherwise with pip."""

import argparse
import os
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
PARTS = ("base", "project", "dev", "docs", "postgres", "s3", "team")
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
UV = shutil.which("uv")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("environment", help="its folder; it is created if it does not exist")
    parser.add_argument("parts", nargs="+", metavar="PART", help=f"{', '.join(PARTS)}: base is torch and base.txt")
    parser.add_argument("--torch", choices=("auto", "cpu", "cuda"), default="auto", help="build of torch on Linux")
    args = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 (an older Python must be told)
        version = sys.version.split()[0]
        sys.exit(f"error: {sys.executable} is Python {version}: 3.11 or newer is needed, name one with PYTHON=")
    if not set(args.parts) <= set(PARTS):
        sys.exit(f"error: {' '.join(args.parts)}: choose from {', '.join(PARTS)}")
    try:
        create(args.environment)
        for part in args.parts:
            install_part(args.environment, part, args.torch)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or b"").decode(errors="replace")
        sys.exit(
            f"{said}error: the installation failed (exit code {error.returncode}); the same command tries it again"
        )
    except KeyboardInterrupt:
        print("error: interrupted; the same command tries it again", file=sys.stderr)
        sys.exit(130)


def create(environment):
    """Create the environment, or complete it, with pip: the program downloads wheels with it."""
    if has_pip(environment):
        return
    uv_venv = [UV, "venv", "--quiet", "--seed", "--allow-existing", "--python", sys.executable]
    command = uv_venv if UV else [sys.executable, "-m", "venv"]
    subprocess.run([*command, environment], check=True, stderr=subprocess.PIPE)  # no traceback after Ctrl-C


def has_pip(environment):
    command = [python(environment), "-m", "pip", "--version"]
    return os.path.exists(command[0]) and subprocess.run(command, capture_output=True).returncode == 0


def install_part(environment, part, build):
    if part == "project":
        project = ["--no-deps", "--no-build-isolation", "--editable", os.path.dirname(HERE)]
        subprocess.run([*installer(environment), *project], check=True)
        return
    torch = start_cpu_build(environment) if part == "base" and wants_cpu_build(build) else None
    lock = os.path.join(HERE, f"{part}.txt")
    with open(lock) as file:
        n_packages = sum("==" in line for line in file)
    tool = "uv" if UV else "pip"
    print(f"installing {n_packages} packages of requirements/{part}.txt with {tool}", flush=True)
    try:
        subprocess.run([*installer(environment), "--no-deps", "--require-hashes", "-r", lock], check=True)
    except BaseException:
        if torch:
            torch.terminate()
        raise
    if part == "base" and (torch is None or torch.wait() != 0):
        if torch:
            print(f"{CPU_BUILDS} is out of reach: installing PyPI's torch, which is larger", flush=True)
        subprocess.run([*installer(environment), "-r", os.path.join(HERE, "torch.txt")], check=True)


def wants_cpu_build(build):
    has_gpu = shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia")
    return sys.platform == "linux" and (build == "cpu" or (build == "auto" and not has_gpu))


def start_cpu_build(environment):
    """Start to install torch's CPU build, beside the other packages, since pip uses one core."""
    command = [*installer(environment), "--no-deps", "--index-url", CPU_BUILDS, "-r", os.path.join(HERE, "torch.txt")]
    limits = {"PIP_DEFAULT_TIMEOUT": "15", "PIP_RETRIES": "1", "UV_HTTP_TIMEOUT": "15", "UV_HTTP_RETRIES": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env={**os.environ, **limits}, **quiet)


def installer(environment):
    if UV:
        return [UV, "pip", "install", "--python", python(environment)]
    return [python(environment), "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-compile"]


def python(environment):
    return os.path.join(environment, "bin", "python")


if __name__ == "__main__":
    main()
