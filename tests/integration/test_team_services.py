"""The services of compose.yaml as processes on this machine, from a sweep to a clone that pulls what was pushed.

Commands, variables and scripts are those of compose.yaml; only host names, ports and folders differ.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from base64 import b64encode
from contextlib import ExitStack
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
import yaml
from fixtures_postgresql import postgresql_server

from pipeline.config.recipes import apply_recipe, write_values
from pipeline.system.files import read_json
from pipeline.system.signals import die_with_parent
from pipeline.tracking.journal import TIMES
from tests.waiting import free_ports, wait_until

for package, extra in {"psycopg": "postgres", "dvc_s3": "s3", "flask_wtf": "team"}.items():
    pytest.importorskip(package, reason=f"the package {package} is in the extra {extra}")

ROOT = Path(__file__).parents[2]
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
BIN = Path(sys.executable).parent
PROXY = "mlflow.example.org"  # MLFLOW_HOST of the services
PATIENCE_S = 300  # for any command, on a machine that others use too


class Team:
    """The services of compose.yaml, with the secrets of the project's .env, for commands in any folder."""

    def __init__(self, project, stack):
        subprocess.run(["sh", "containers/env.sh"], cwd=project, check=True, stdout=subprocess.DEVNULL)
        lines = [line for line in (project / ".env").read_text().splitlines() if line and not line.startswith("#")]
        self.secrets = dict(line.split("=", 1) for line in lines)
        self.ports = dict(zip(("s3", "mlflow", "page"), free_ports(3), strict=True))
        self.project, self.stack = project, stack

    def text_of(self, value):
        """A value of compose.yaml with its variables, and with the addresses of this machine."""
        value = re.sub(r"\$\{MLFLOW_HOST:\+([^}]*)\}", lambda found: found[1].replace("$MLFLOW_HOST", PROXY), value)
        value = re.sub(r"\$\{(\w+)(?::[-?][^}]*)?\}", lambda found: self.secrets.get(found[1], ""), value)
        value = re.sub(r"http://(s3|mlflow):\d+", lambda found: self.address(found[1]), value)
        return value.replace("$$", "$").replace("0.0.0.0", "127.0.0.1")

    def address(self, service):
        return f"http://127.0.0.1:{self.ports[service]}"

    def environment(self, service):
        given = {name: self.text_of(value) for name, value in SERVICES[service].get("environment", {}).items()}
        if "PGHOST" in given:
            given |= {"PGHOST": "127.0.0.1", "PGPORT": str(self.ports["postgres"])}
        programs = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": programs, "MLFLOW_HTTP_REQUEST_TIMEOUT": "60", "PYTHONUNBUFFERED": "1", **given}

    def command(self, service):
        command = SERVICES[service]["command"]
        return [self.text_of(word) for word in (shlex.split(command) if isinstance(command, str) else command)]

    def start(self, service, command, folder=None):
        """Start a command of a service in the project's folder, or in another one, until the end of the test."""
        log = self.stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115 (closed by the stack)
        process = subprocess.Popen(command, cwd=folder or self.project, env=self.environment(service), stdout=log,
                                   stderr=subprocess.STDOUT, text=True, preexec_fn=die_with_parent)  # fmt: skip
        self.stack.callback(process.wait, 60)
        self.stack.callback(process.terminate)
        return process, log

    def wait(self, started, is_ready):
        """Wait until a service is ready."""
        process, log = started
        assert wait_until(lambda: is_ready() or process.poll() is not None, PATIENCE_S)
        assert process.poll() is None, content(log)

    def run(self, *command, service="train", folder=None):
        """What a command of a service prints; it must succeed."""
        return self.end(self.start(service, command, folder))

    def end(self, started):
        """Wait until a command has ended; return what it printed."""
        process, log = started
        assert process.wait(PATIENCE_S) == 0, content(log)
        return content(log)

    def start_s3(self):
        """compose.yaml's own server and script, or else moto's server, which knows neither users nor passwords."""
        if shutil.which("weed", path=self.environment("s3")["PATH"]) is None:
            from moto.server import ThreadedMotoServer

            server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.ports["s3"], verbose=False)
            server.start()
            self.stack.callback(server.stop)
            return
        (data := self.project / "../s3").mkdir()
        names = ("master.port", "volume.port", "filer.port", "s3.port.grpc", "master.port.grpc", "volume.port.grpc",
                 "filer.port.grpc")  # fmt: skip
        ports = {"s3.port": self.ports["s3"], **dict(zip(names, free_ports(len(names)), strict=True))}
        script = self.command("s3")[0].rstrip().replace("/tmp/s3.json", f"{data}.json").replace("/data", str(data))
        script += "".join(f" -{name}={port}" for name, port in ports.items()) + " -volume.preStopSeconds=0"
        health = SERVICES["s3"]["healthcheck"]["test"][-1].rpartition("/")[2]
        entrypoint = SERVICES["s3"]["entrypoint"]
        started = self.start("s3", [*entrypoint, script])
        self.wait(started, lambda: status(f"{self.address('s3')}/{health}") == 200)


def content(file):
    file.seek(0)
    return file.read()


def status(url, key=None, body=None, **headers):
    """The HTTP status of an answer; None if nobody answers."""
    return answer(url, key, body, **headers)[0]


def answer(url, key=None, body=None, **headers):
    headers |= {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urlopen(Request(url, json.dumps(body).encode() if body else None, headers), timeout=60) as reply:
            return reply.status, reply.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()
    except (URLError, ConnectionError):
        return None, ""


@pytest.fixture
def team(tmp_path, copy_project, commit_all):
    """A repository with the recipe smoke and a DVC remote, beside its team's servers."""
    project = tmp_path / "project"
    copy_project(project)
    apply_recipe("smoke", project / "params.yaml", project / "recipes")
    easy = {"target.loss": 5.0, "registry.max_target_loss": 5.0}  # nats per token, reached after some dozen steps
    write_values({"train.threads": 1, "samples.interval_steps": 0, **easy}, project / "params.yaml")
    remote = "[core]\n    remote = storage\n['remote \"storage\"']\n    url = s3://dvc/project\n"
    (project / ".dvc" / "config").write_text(remote)
    commit_all(project)
    with ExitStack() as stack:
        team = Team(project, stack)
        team.ports["postgres"] = stack.enter_context(postgresql_server(team.secrets["POSTGRES_PASSWORD"]))
        team.start_s3()
        for _ in range(2):  # as at each start
            team.run(*team.command("prepare"), service="prepare")
        server = [{"5000": str(team.ports["mlflow"]), "2": "1"}.get(word, word) for word in team.command("mlflow")]
        team.wait(team.start("mlflow", server), lambda: status(f"{team.address('mlflow')}/health") == 200)
        yield team


def test_what_a_team_trains_is_on_its_servers_and_in_another_clone(team, tmp_path, commit_all):
    project, clone = team.project, tmp_path / "clone"
    assert status(f"{team.address('mlflow')}/api/2.0/mlflow/experiments/search?max_results=1") == 401
    search = f"{team.address('mlflow')}/ajax-api/2.0/mlflow/runs/search"  # as MLflow's page behind a proxy with TLS
    login = b64encode(f"admin:{team.secrets['MLFLOW_ADMIN_PASSWORD']}".encode()).decode()
    request = {"body": {"experiment_ids": ["0"]}, "Host": PROXY, "Authorization": f"Basic {login}"}
    assert status(search, Origin=f"https://{PROXY}", **request) == 200
    assert status(search, Origin="https://other.example.org", **request) == 403
    arguments = ["--storage", "postgresql:///optuna", "--trials", "2", "--pruner", "none"]
    sweep = team.start("train", ["python", "-m", "pipeline", "sweep", *arguments])
    trials = project / "checkpoints" / "smoke"
    assert wait_until(lambda: list(trials.glob(f"*/{TIMES}")) or sweep[0].poll() is not None, PATIENCE_S)
    team.run("dvc", "repro")  # beside the trials
    assert "2 of 2 trials" in team.end(sweep)
    registered = read_json(project / "reports" / "registered.json")
    assert (registered["version"], registered["champion"]) == ("1", True)

    (elsewhere := tmp_path / "elsewhere").mkdir()
    command = [word.replace("app.py", str(project / "app.py")) for word in team.command("page")]
    page = team.start("page", [*command, "--port", str(team.ports["page"])], elsewhere)

    team.run("dvc", "push")  # while the page starts
    commit_all(project)
    team.run("git", "clone", "-q", str(project), str(clone))
    team.run("dvc", "pull", "--allow-missing", folder=clone)
    missing = {"register": [{"changed outs": {"reports/registered.json": "deleted"}}]}  # of this clone's registry
    assert json.loads(team.run("dvc", "status", "--json", folder=clone)) == missing

    team.wait(page, lambda: status(f"{team.address('page')}/health") == 200)
    assert registered["model"] in answer(f"{team.address('page')}/health")[1]
    completions, body = f"{team.address('page')}/v1/completions", {"prompt": "First", "max_tokens": 5}
    assert status(completions, body=body) == 401
    code, text = answer(completions, team.secrets["TOTARGET_API_KEY"], body)
    assert (code, json.loads(text)["usage"]["completion_tokens"]) == (200, 5)
    assert not [*elsewhere.iterdir()]  # the folder may be read-only

    team.run("dvc", "repro", folder=clone)
    assert read_json(clone / "reports" / "registered.json")["version"] == "1"  # the server has it: no second one
    assert json.loads(team.run("dvc", "status", "--json", folder=clone)) == {}
