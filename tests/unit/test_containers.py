"""The files for containers: what compose.yaml locks down, secrets, ignored files, and commands that exist."""

import json
import re
import shlex
from pathlib import Path

import pathspec
import pytest
import yaml

from tests.commands import check

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "compose.yaml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_locked_down(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service.get("cap_add", []) == (["CHOWN"] if name == "s3-volume" else [])
    assert (service["user"] == "root") is (name == "s3-volume")
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert re.search(r":\d[\w.-]*$|^gpt2-to-target:", service["image"])  # a version, not `latest`
    ends = name in ("s3-volume", "prepare") or name.startswith("train")
    assert service.get("restart") == (None if ends else "unless-stopped")
    own_check = "healthcheck" in service and "disable" not in service["healthcheck"]
    assert own_check is (not ends and name != "page")  # the image has that of the page
    for other, condition in service.get("depends_on", {}).items():
        waits = "service_completed_successfully" if other in ("s3-volume", "prepare") else "service_healthy"
        assert condition == {"condition": waits}


def test_one_service_builds_an_image_of_the_project_and_none_pulls_it():
    """Compose builds all services at once, and fails if two of them export the same image."""
    images = {service["image"] for service in SERVICES.values() if service["image"].startswith("gpt2-to-target:")}
    builders = [name for name, service in SERVICES.items() if "build" in service]
    assert builders == ["prepare", "train-cuda"]
    assert {SERVICES[name]["image"] for name in builders} == images
    assert "profiles" not in SERVICES["prepare"]  # so that `docker compose up --build` builds it
    for service in SERVICES.values():
        assert (service.get("pull_policy") == "never") is (service["image"] in images)


def test_each_secret_is_required_and_its_place_is_in_the_example():
    required = {*re.findall(r"\$\{(\w+):\?run sh containers/env.sh\}", TEXT)}
    example = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert {name for name, value in example.items() if not value} == required
    optional = {*re.findall(r"\$\{(\w+):[-+]", TEXT)}
    assert {name for name, value in example.items() if value} <= optional
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|API_KEY", name):
                assert re.fullmatch(r"\$\{\w+:\?run sh containers/env.sh\}", value)


def test_the_image_gets_no_secret_and_nothing_that_git_ignores():
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".dockerignore").read_text().splitlines())
    hidden = [".env", ".env.local", ".git/config", ".dvc/config.local", "data/corpus.txt", "models/run.json",
              "mlflow.db", "mlflow.db-wal", "optuna.journal", "texts/diary.txt", "weights/gpt2/model.safetensors",
              "checkpoints/a/steps.jsonl", ".venv/bin/python", ".venv-lowest/x", "mlruns/1/x", "reports/metrics.json",
              "plans/x.yaml", "pipeline/__pycache__/x.pyc", ".netrc", "id.pem"]  # fmt: skip
    assert [path for path in hidden if not ignored.match_file(path)] == []
    needed = ["app.py", "params.yaml", "dvc.yaml", "recipes/smoke.yaml", "pipeline/__main__.py", "README.md",
              "texts/README.md", "weights/README.md", ".dvc/config", "containers/prepare.py"]  # fmt: skip
    assert [path for path in needed if ignored.match_file(path)] == []
    by_git = pathspec.GitIgnoreSpec.from_lines((ROOT / ".gitignore").read_text().splitlines())
    assert by_git.match_file(".env")
    assert not by_git.match_file(".env.example")


def test_the_folders_that_programs_write_to_are_writable_in_a_read_only_container():
    places = dict(re.findall(r"^(?:ENV| {3}) (\w+)=(\S+)", DOCKERFILE, re.MULTILINE))
    assert places["HOME"] == "/tmp"
    for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR", "DVC_SITE_CACHE_DIR"):
        assert places[name].startswith("/tmp/")
    assert all("/tmp" in tmpfs for service in SERVICES.values() for tmpfs in service["tmpfs"][:1])


def test_the_commands_of_the_services_exist():
    assert SERVICES["train"]["command"] == SERVICES["train-cuda"]["command"] == ["totarget", "repro"]
    guide = (ROOT / "docs" / "guides" / "containers.md").read_text().replace("\\\n", " ")
    lines = [" ".join(SERVICES["train"]["command"])]
    lines += re.findall(
        r"^(?:docker compose run --rm|  gpt2-to-target:cpu) (?:train(?:-cuda)? )?(\w[^#\n]*)", guide, re.M
    )
    assert sum(map(check, lines)) >= 5
    for name in ("prepare", "page"):
        python, script, *_ = SERVICES[name]["command"]
        assert (python, (ROOT / script).is_file()) == ("python", True)
    assert json.loads(re.search(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)[1]) == SERVICES["page"]["command"][:4]
    assert shlex.split(SERVICES["mlflow"]["command"])[:4] == ["mlflow", "server", "--app-name", "basic-auth"]
    database = SERVICES["mlflow"]["command"].partition("--backend-store-uri ")[2].split()[0]
    assert f"docker compose run --rm mlflow mlflow db upgrade {database}`" in guide
    assert (ROOT / SERVICES["mlflow"]["environment"]["MLFLOW_AUTH_CONFIG_PATH"]).is_file()


def test_the_devcontainer_installs_the_project_with_make():
    text = (ROOT / ".devcontainer" / "devcontainer.json").read_text()
    config = json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert config["postCreateCommand"].removeprefix("make ") in targets
    assert {str(port) for port in config["forwardPorts"]} == config["portsAttributes"].keys()
